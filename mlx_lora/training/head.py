"""The output head of a model apart from its body, so that the loss can take the logits of a few tokens at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..kernels.chunked_sum import chunked_sum

# Bytes of logits, counted in float32: from how many on they are cut, and into what. MLX has some ten operations under
# way at a time, so that few large pieces would save nothing.
WHOLE, PIECE = 1 << 29, 1 << 26


def loss_in_chunks(
    model: nn.Module, tokens: mx.array, targets: mx.array, mask: mx.array, losses: Callable
) -> mx.array | None:
    """The sum of the losses that count, without all logits at once; None where that saves nothing or is not possible.

    It is possible for models of mlx-lm whose ``model`` attribute makes hidden states of tokens; whatever their
    ``__call__`` does to those (head, tied head, scaling, soft caps) happens to each piece.

    Args:
        tokens, targets, mask: [B, T]. losses: (logits [..., vocab], targets [...]) -> [...].
    """
    vocabulary = getattr(getattr(model, "args", None), "vocab_size", None)
    if not isinstance(vocabulary, int) or 4 * tokens.size * vocabulary <= WHOLE:
        return None
    body = getattr(model, "model", None)
    if not isinstance(body, nn.Module) or not type(model).__module__.startswith("mlx_lm.models."):
        return None
    hidden = body(tokens)
    if not isinstance(hidden, mx.array) or hidden.shape[:2] != tokens.shape or hidden.ndim != 3:
        return None
    # Of the head: its own parameters, and those of an embedding that may be tied to it.
    trained = {p: a for p, a in tree_flatten(model.trainable_parameters()) if ".layers." not in p}

    def piece(parameters: dict[str, mx.array], hidden: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        try:
            logits = _apply_head(model, body, hidden[None])
        finally:
            model.update(tree_unflatten(list(trained.items())))
        return losses(logits[0], targets)

    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = piece_rows(vocabulary)
    return chunked_sum(piece, trained, flat, targets.reshape(-1), mask.reshape(-1), rows, model.training)


def piece_rows(vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(64, PIECE // (4 * vocabulary))


def _apply_head(model: nn.Module, body: nn.Module, hidden: mx.array) -> mx.array:
    """What the model makes of hidden states [1, n, D]: its own ``__call__`` over a body that answers with them."""
    shallow = copy.copy(model)
    dict.__setitem__(shallow, "model", _Answer(body, hidden))
    return shallow(mx.zeros(hidden.shape[:2], mx.int32))


class _Answer:
    """Stands in for a body: gives the hidden states it was made with, and the body's attributes."""

    def __init__(self, body: nn.Module, hidden: mx.array):
        self._body, self._hidden = body, hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)
