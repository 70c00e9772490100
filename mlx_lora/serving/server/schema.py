"""``response_format`` and ``tool_choice``: llguidance's grammars restrict answers to JSON or tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import ConfigError
from .tool_choice import Tools
from .tool_grammar import calls_grammar

_TYPES = "text, json_object or json_schema"


def processors_for(
    tokenizer: Any, vocab_size: int, response_format: dict[str, Any] | None, tools: Tools, thinks: bool = False
) -> tuple:
    """Create logits processors that restrict an answer to a ``response_format`` or to required tool calls.

    Args:
        response_format: OpenAI's field. The model may call tools instead.
        thinks: whether the prompt ends in the model's reasoning. The restriction starts after the reasoning.

    Raises: ConfigError: no grammar can express the restriction.
    """
    schema = _schema_of(response_format)
    if schema is None and not tools.forced:
        return ()
    tokens, name = _tokens_of(tokenizer, vocab_size), "tool_choice" if tools.forced else "response_format"
    if tools.shown:
        grammar = calls_grammar(tokenizer, tools.shown, tools.one_call, None if tools.forced else schema)
    else:
        grammar = _grammar_of(schema)
    return (Grammar(tokens, grammar, name, tokenizer.rfind_think_end if thinks else None),)


def _schema_of(wanted: Any) -> dict[str, Any] | None:
    """Return the JSON schema of a ``response_format``; None for text. Raises: ConfigError."""
    kind = "text" if wanted is None else wanted.get("type") if isinstance(wanted, dict) else wanted
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise ConfigError(f"response_format: unknown type {kind!r}", f"Use {_TYPES}.")
    # llama.cpp and others accept a schema together with "json_object".
    described = wanted.get("json_schema") if kind == "json_schema" else {"schema": {"type": "object"}, **wanted}
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ConfigError(
            f"response_format: {kind} has no schema", 'Send {"json_schema": {"name": ..., "schema": {...}}}.'
        )
    return schema


def _grammar_of(schema: dict[str, Any]) -> str:
    """Return a grammar without blanks between values; a small model may repeat blanks forever. Raises: ConfigError."""
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    except Exception as error:  # ValueError, among others
        raise _refused("response_format", str(error)) from None


class Grammar:
    """A logits processor for one answer: it allows only tokens that the grammar accepts next.

    Args:
        tokens: llguidance's view of the tokenizer.
        name: the field of the request that needs the grammar, for errors.
        find_end: returns where the reasoning ends in a list of tokens, or -1. Before that, all tokens are allowed.
    """

    def __init__(self, tokens: Any, grammar: str, name: str, find_end: Callable[[list[int]], int] | None = None):
        from llguidance import LLMatcher

        try:
            self._matcher = LLMatcher(tokens, grammar)
        except Exception as error:  # ValueError, among others, for unsupported schemas
            raise _refused(name, str(error)) from None
        if problem := self._matcher.get_error():
            raise _refused(name, problem)
        self._name, self._find_end = name, find_end
        self._read: int | None = None  # consumed tokens of the prompt and the answer

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """tokens: so far [L]; logits: [1, vocab]. Raises: ConfigError: no token fits, or the grammar is too large."""
        if self._read is None:
            self._read = len(tokens)
        new = tokens[self._read :].tolist()
        if self._find_end is not None:
            if self._find_end(new) < 0:
                return logits
            new, self._find_end = [], None
        self._read = len(tokens)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        if problem := self._matcher.get_error():
            raise _refused(self._name, problem)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
        allowed = np.pad(allowed, (0, logits.shape[-1] - len(allowed)))
        return mx.where(mx.array(allowed), logits, -mx.inf)


def _refused(name: str, problem: str) -> ConfigError:
    text = f"{name}: this schema is not supported: {problem.splitlines()[0][:300]}"
    return ConfigError(text, "Send a simpler JSON schema.")


@lru_cache(maxsize=1)
def _tokens_of(tokenizer: Any, vocab_size: int) -> Any:
    """Return llguidance's version of a tokenizer. Creating it takes about a second. Raises: ConfigError."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise ConfigError(
            "response_format and tool_choice need the package llguidance", "Run pip install llguidance."
        ) from None
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    try:
        return from_tokenizer(inner, n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))
    except ValueError as error:
        raise ConfigError(f"response_format: {error}", "Use a model with a fast tokenizer.") from None
