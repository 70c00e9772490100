"""``response_format``: answers that are JSON, by llguidance's grammars."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import ConfigError

_TYPES = "text, json_object or json_schema"


def response_processors(tokenizer: Any, vocab_size: int, wanted: dict[str, Any] | None) -> tuple:
    """Logits processors that keep one answer to OpenAI's ``response_format``. Raises: ConfigError."""
    kind = "text" if wanted is None else wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind == "text":
        return ()
    if kind not in ("json_object", "json_schema"):
        raise ConfigError(f"response_format: {kind!r} is no type", f"Use {_TYPES}.")
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise ConfigError(
                "response_format: json_schema has no schema", 'Send {"json_schema": {"name": ..., "schema": {...}}}.'
            )
    return (Grammar(_tokens_of(tokenizer, vocab_size), json.dumps(schema)),)


class Grammar:
    """A logits processor for one answer: only tokens that continue a text of the schema stay possible."""

    def __init__(self, tokens: Any, schema: str):
        from llguidance import LLMatcher

        try:
            # Without blanks between values, of which a small model may write any number.
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            self._matcher = LLMatcher(tokens, grammar)
        except Exception as error:  # ValueError, among others, for schemas that it does not know
            raise _refused(str(error)) from None
        if problem := self._matcher.get_error():
            raise _refused(problem)
        self._read: int | None = None  # tokens of the prompt and the answer that were consumed

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens: so far [L]; logits: [1, vocab]. Raises: ConfigError: no token fits, or the grammar is too large."""
        new = [] if self._read is None else tokens[self._read :].tolist()
        self._read = len(tokens)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        if problem := self._matcher.get_error():
            raise _refused(problem)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
        allowed = np.pad(allowed, (0, logits.shape[-1] - len(allowed)))
        return mx.where(mx.array(allowed), logits, -mx.inf)


def _refused(problem: str) -> ConfigError:
    text = f"response_format: this schema cannot be followed: {problem.splitlines()[0][:300]}"
    return ConfigError(text, "Send a simpler JSON schema.")


@lru_cache(maxsize=1)
def _tokens_of(tokenizer: Any, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer, which takes about a second to make. Raises: ConfigError."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise ConfigError("response_format needs the package llguidance", "pip install llguidance") from None
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    try:
        return from_tokenizer(inner, n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))
    except ValueError as error:
        raise ConfigError(f"response_format: {error}", "Use a model with a fast tokenizer.") from None
