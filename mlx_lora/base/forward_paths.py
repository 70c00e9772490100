"""Ensure that training computes what generation computes: compare both first, and train with a cache if needed.

Trainers call a model without a cache. Generation calls it with one, first on the prompt, then on one token at a time.
Some of mlx-lm's models compute something else without a cache: the last layers of gemma3n share keys and values, which
they find only in the cache. An adapter trained without a cache would fit another model than the one that generates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from . import older_mlx_lm
from .modes import mode

COMPARED, DECODED = 32, 8  # tokens of the row; how many of them, at its end, are decoded one by one
_compared: set[int] = set()  # ids of the models inside `as_generated`
_UNTRAINABLE = {"dbrx": "in training, mlx-lm's class computes the chosen experts in NumPy, which has no gradient"}
# Norm of the difference divided by the norm of the logits. Half precision causes up to 0.1 if a rounding error makes a
# router choose other experts. TF32 causes up to 0.01 in float32. gemma3n differs by 0.3 and more.
_TOLERANCE = {mx.float32: 0.01, mx.bfloat16: 0.15, mx.float16: 0.15}


THROUGH_CACHE = (
    "without a cache this model computes other logits than in generation, so every loss is computed through a fresh "
    "cache"
)


@contextmanager
def as_generated(model: nn.Module, row: Sequence[int], grad_checkpoint: bool = False) -> Iterator[bool]:
    """While the context is open, the model computes in training what it computes in generation.

    The outermost context of a model compares both on `row` and gives the model a cache if it needs one. Nested contexts
    do nothing, so a run compares once.

    Yields: whether this context gives the model a cache. Raises: ModelError, see `check_trainable`, `needs_cache`.
    """
    older_mlx_lm.patch_mlx()
    check_trainable(model)
    if id(model) in _compared:
        yield False
        return
    with through_cache(model, needed := needs_cache(model, row, grad_checkpoint)):
        _compared.add(id(model))
        try:
            yield needed
        finally:
            _compared.discard(id(model))


def check_trainable(model: nn.Module) -> None:
    """Refuse a model whose class in mlx-lm has no gradient. Raises: ModelError."""
    if (name := getattr(model, "model_type", None)) in _UNTRAINABLE:
        raise ModelError(f"The model {name} cannot be trained: {_UNTRAINABLE[name]}.", "Train another model.")


def needs_cache(model: nn.Module, row: Sequence[int], grad_checkpoint: bool = False) -> bool:
    """Whether training must call the model with a fresh cache to compute what generation computes.

    The logits of the first tokens of ``row`` are compared, with dropout off: as training computes them, and as
    generation does with a cache, both all at once and one token at a time. A model that cannot generate with mlx-lm's
    caches is not compared.

    Raises: ModelError if training cannot compute what generation does, or if ``grad_checkpoint`` would be needed
        together with a cache.
    """
    if not _takes_cache(model) or len(row) < 2:
        return False
    tokens = mx.array([[int(token) for token in row[:COMPARED]]])
    generated = _generate(model, tokens)
    with _training_without_dropout(model):
        plain = model(tokens)
    with mode(model, training=False):
        prefill = model(tokens, cache=_fresh(model))
    tolerance = _TOLERANCE.get(generated.dtype, 0.15)
    name = getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    if (off := difference(generated, prefill)) > tolerance:
        raise ModelError(
            f"{name} computes other logits one token at a time than for all tokens at once: the logits differ by "
            f"{off:.0%}. A loss can only be computed for all tokens at once.",
            "Use another model, or a version of mlx-lm in which both agree.",
        )
    if difference(plain, generated) <= tolerance:
        return False
    with _training_without_dropout(model):
        cached = model(tokens, cache=_fresh(model))
    if (off := difference(cached, generated)) > tolerance:
        raise ModelError(
            f"{name} computes other logits in training than in generation, even with a cache: the logits differ by "
            f"{off:.0%}.",
            "Use another model, or a version of mlx-lm in which both agree.",
        )
    if grad_checkpoint:
        raise ModelError(
            f"{name} must be trained through a cache, and grad_checkpoint would write to the cache twice.",
            "Train without grad_checkpoint, or with a smaller batch_size.",
        )
    return True


@contextmanager
def through_cache(model: nn.Module, needed: bool = True) -> Iterator[None]:
    """While the context is open, give the model a fresh cache in each call without one, if ``needed``.

    This changes the ``__class__`` of this model only.
    """
    own = type(model)
    try:
        if needed:
            model.__class__ = _cached(own)
        yield
    finally:
        model.__class__ = own


def difference(logits: mx.array, expected: mx.array) -> float:
    """Norm of the difference divided by the norm of the expected logits [..., vocab].

    A constant added to all logits of a token changes no probability, so each token's mean is subtracted first.
    """
    a, b = (x.astype(mx.float32) for x in (logits, expected))
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return (mx.linalg.norm(a - b) / mx.maximum(mx.linalg.norm(b), 1e-20)).item()


def _takes_cache(model: nn.Module) -> bool:
    has_layers = hasattr(model, "make_cache") or hasattr(model, "layers")
    return has_layers and "cache" in inspect.signature(type(model).__call__).parameters


def _fresh(model: nn.Module) -> list:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def _generate(model: nn.Module, tokens: mx.array) -> mx.array:
    """The logits [1, T, vocab] of ``tokens`` [1, T] as generation computes them: a prompt, then one token at a time."""
    length = tokens.shape[1]
    start = max(1, length - DECODED)
    with mode(model, training=False):
        cache = _fresh(model)
        parts = [model(tokens[:, :start], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(start, length)]
    return mx.concatenate(parts, axis=1)


@contextmanager
def _training_without_dropout(model: nn.Module) -> Iterator[None]:
    with mode(model, training=True):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module._set_training_mode(False)
        yield


def _cached(own: type) -> Callable:
    """A subclass of the model class ``own`` that creates a cache if it is called without one."""

    def __call__(self, inputs, cache=None, *args, **kwargs):
        return own.__call__(self, inputs, _fresh(self) if cache is None else cache, *args, **kwargs)

    return type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})
