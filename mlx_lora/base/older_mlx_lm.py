"""What mlx-lm 0.31, the newest version for Python 3.10, lacks. Nothing here is used with mlx-lm 0.32."""

from __future__ import annotations

from functools import lru_cache, wraps
from importlib.metadata import version
from typing import Any

import mlx.core as mx

# Keyed by module of mlx_lm.models: wrong in mlx-lm 0.31 for a batch of different lengths, right in 0.32.
_NAMES = """
falcon_h1 gemma3n granitemoehybrid internlm2 internlm3 kimi_linear mamba2 minicpm3 phixtral plamo2 qwen3_5 qwen3_5_moe
qwen3_next
"""
NOT_BATCHED = dict.fromkeys(_NAMES.split(), "padding changes its answers in this version of mlx-lm")
# The same for packed rows: these two build no attention mask from a list of caches.
NOT_PACKED = frozenset({"minicpm3", "phixtral"})

State = tuple[str, str]  # (kind of the text that comes next, text held back)


@lru_cache(maxsize=1)
def is_used() -> bool:
    """Whether mlx-lm 0.31 is installed."""
    return tuple(map(int, version("mlx-lm").split(".")[:2])) < (0, 32)


@lru_cache(maxsize=1)
def patch_mlx() -> None:
    """Make MLX accept the calls of mlx-lm 0.31's models and samplers; do nothing with mlx-lm 0.32.

    Its mixtures of experts choose experts without ``stop_gradient``, and MLX then refuses to compute gradients. Its
    min-p sampling passes a bool where MLX needs an array.
    """
    if not is_used():
        return
    argpartition, put_along_axis = mx.argpartition, mx.put_along_axis

    @wraps(argpartition)
    def without_gradient(*args: Any, **options: Any) -> mx.array:
        return mx.stop_gradient(argpartition(*args, **options))

    @wraps(put_along_axis)
    def put_array(a: mx.array, indices: mx.array, values: Any, *args: Any, **options: Any) -> mx.array:
        values = values if isinstance(values, mx.array) else mx.array(values, a.dtype)
        return put_along_axis(a, indices, values, *args, **options)

    mx.argpartition, mx.put_along_axis = without_gradient, put_array


def never_empty(processors: list) -> list:
    """The logits processors of a row, at least one with mlx-lm 0.31.

    There a batch without any processor does not forget the rows that leave it, and the processors of a row that joins
    later then act on another row, or on none.
    """
    return processors or ([lambda tokens, logits: logits] if is_used() else [])


class TextStateMachine:
    """Splits an answer into reasoning, tool calls and other text, as mlx-lm 0.32's class of this name does.

    It knows one pair of markers for each, as the tokenizers of mlx-lm 0.31 do.
    """

    def __init__(self, tokenizer: Any):
        self._next: dict[str, dict[str, str]] = {}  # kind -> {marker: kind of the text after it}
        if tokenizer.has_thinking:
            self._next["normal"] = {tokenizer.think_start: "reasoning"}
            self._next["reasoning"] = {tokenizer.think_end: "normal"}
        if tokenizer.has_tool_calling:
            for kind in ("normal", *self._next):
                self._next.setdefault(kind, {})[tokenizer.tool_call_start] = "tool"
            self._next["tool"] = {tokenizer.tool_call_end: "normal"} if tokenizer.tool_call_end else {}

    def make_state(self, kind: str) -> State:
        return kind, ""

    def split(self, state: State, text: str) -> tuple[State, list[tuple[str, str]]]:
        """The next state, and pairs (kind, text) of the text that cannot be part of a marker."""
        kind, held = state
        text, found = held + text, []
        while hits := [(at, -len(m), m) for m in self._next.get(kind, {}) if (at := text.find(m)) >= 0]:
            at, _, marker = min(hits)
            found.append((kind, text[:at]))
            kind, text = self._next[kind][marker], text[at + len(marker) :]
        begun = (n for m in self._next.get(kind, {}) for n in range(1, len(m)) if text.endswith(m[:n]))
        end = len(text) - max(begun, default=0)
        return (kind, text[end:]), [*found, (kind, text[:end])]

    def flush(self, state: State) -> tuple[State, str, str]:
        """(the next state, the text held back, its kind), at the end of an answer."""
        kind, held = state
        return (kind, ""), held, kind
