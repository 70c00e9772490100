"""Where a model was loaded from. ``load`` records it on the model; saving, fusing and serving read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ModelError

_ORIGIN = "_mlx_lora_base"


@dataclass(frozen=True)
class Base:
    """Where a model was loaded from: the name the caller gave, its local folder and its config."""

    name: str
    folder: Path
    config: dict[str, Any]


def set_base(model: nn.Module, base: Base) -> None:
    """Record where ``model`` was loaded from. The record is not a parameter of the model."""
    setattr(model, _ORIGIN, base)


def base_of(model: nn.Module) -> Base | None:
    """What ``load`` recorded about ``model``; None for a model that was not loaded by ``load``."""
    return checked(model).__dict__.get(_ORIGIN)


def checked(model: Any) -> nn.Module:
    """``model``, if it is one. Raises: ModelError."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a model is needed, not {type(model).__name__}", "Load it first: model, tokenizer = mlx_lora.load(path)."
        )
    return model
