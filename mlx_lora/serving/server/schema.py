"""``response_format``: answers that are JSON, by llguidance's grammars."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .state import Server


def response_processors(server: Server, wanted: dict[str, Any] | None) -> tuple:
    """Logits processors that keep an answer to the format. Raises: ConfigError."""
    if wanted is None or wanted.get("type") == "text":
        return ()
    raise ConfigError("response_format: only text is supported", "Leave it out.")
