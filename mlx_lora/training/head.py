"""The loss in chunks: apply the output head to a few tokens at a time, so that the full logits are never in memory.

The head is separated from the model's body (embedding and layers) by calling the model with the body replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..kernels.chunked_sum import chunked_losses, chunked_sum

# Bytes of float32 logits: above WHOLE they are computed in chunks of PIECE. MLX runs about ten operations at a time, so
# a few large chunks would save no memory.
WHOLE, PIECE = 1 << 29, 1 << 26


def loss_in_chunks(
    model: nn.Module, tokens: mx.array, targets: mx.array, mask: mx.array | None, losses: Callable, **options: Any
) -> mx.array | None:
    """The sum of the losses of the learned tokens, in chunks; None if that saves nothing or is impossible.

    Without a `mask`, the loss of each token [B, T].

    It is possible for mlx-lm's models that call their body once, on tokens, and apply the rest (head, tied head,
    scaling, soft caps) to each hidden state.

    Args:
        tokens, targets: [B, T]. mask: [B, T], True where the target is learned.
        losses: function of (logits [..., vocab], targets [...]), returns the losses [...].
        options: further arguments for the model, such as its cache.
    """
    if not type(model).__module__.startswith("mlx_lm.models.") or 4 * tokens.size * _widest(model) <= WHOLE:
        return None
    if (path := _body_path(model)) is None:
        return None
    seen: list = []
    logits = _with_body(model, path, lambda body: _Recorder(body, seen))(tokens, **options)  # only their shape is used
    if len(seen) != 1 or seen[0] is logits:
        return None
    (hidden,), vocabulary = seen, logits.shape[-1]
    if not isinstance(hidden, mx.array) or hidden.shape[:2] != tokens.shape or hidden.ndim != 3:
        return None
    trained = {p: a for p, a in tree_flatten(model.trainable_parameters()) if _of_head(p, path)}

    def piece(parameters: dict[str, mx.array], hidden: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        try:
            shallow = _with_body(model, path, lambda body: _Answer(body, hidden[None]))
            logits = shallow(mx.zeros((1, hidden.shape[0]), mx.int32))
        finally:
            model.update(tree_unflatten(list(trained.items())))
        return losses(logits[0], targets)

    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = piece_rows(vocabulary)
    if mask is None:
        return chunked_losses(piece, trained, flat, targets.reshape(-1), rows).reshape(targets.shape)
    return chunked_sum(piece, trained, flat, targets.reshape(-1), mask.reshape(-1), rows, model.training)


def piece_rows(vocabulary: int) -> int:
    """The number of tokens whose logits are computed at a time."""
    return max(64, PIECE // (4 * vocabulary))


def _widest(model: nn.Module) -> int:
    """Rows of the largest embedding: the vocabulary size."""
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    return max((m.weight.shape[0] for m in embeddings), default=0)


def _body_path(model: nn.Module) -> list[str] | None:
    """The attributes that lead to the body. Vision-language models contain a language model that has the body."""
    path: list[str] = []
    while isinstance(model.get("language_model"), nn.Module):
        path.append("language_model")
        model = model["language_model"]
    name = next((n for n in ("model", "backbone", "transformer") if isinstance(model.get(n), nn.Module)), None)
    return None if name is None else [*path, name]


def _of_head(parameter: str, path: list[str]) -> bool:
    """Whether the head can use a parameter: those outside the body, and those of the body outside its layers."""
    inside = ".".join(path) + "."
    return not parameter.startswith(inside) or not any(part.isdigit() for part in parameter.split("."))


def _with_body(model: nn.Module, path: list[str], stand_in: Callable[[nn.Module], Any]) -> nn.Module:
    """A shallow copy of the model with its body replaced."""
    first, *rest = path
    shallow = copy.copy(model)
    inner = _with_body(model[first], rest, stand_in) if rest else stand_in(model[first])
    dict.__setitem__(shallow, first, inner)
    return shallow


class _Body:
    """Replaces the body of a model and has its attributes."""

    def __init__(self, body: nn.Module):
        self._body = body

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _Recorder(_Body):
    """Calls the body and records what it returns."""

    def __init__(self, body: nn.Module, seen: list):
        super().__init__(body)
        self._seen = seen

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        self._seen.append(self._body(*args, **kwargs))
        return self._seen[-1]


class _Answer(_Body):
    """Stands in for the body and returns the given hidden states."""

    def __init__(self, body: nn.Module, hidden: mx.array):
        super().__init__(body)
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._hidden
