"""Gradient checkpointing: keep the input of each layer, recompute the rest in the backward pass (arXiv:1604.06174).

`mx.checkpoint` calls a layer's Python code a second time for the backward pass. Two things follow. The layer's
parameters must be its arguments, or they get no gradient. And a layer that draws random numbers from the global state
would draw others the second time, so that the gradient would belong to another dropout mask than the loss (in MLX
0.32 it does); here each layer draws from a key of its own, which is an argument as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..errors import TrainingError

_DRAWS = ("bernoulli", "normal", "uniform")  # what dropout and noise layers call


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Recompute the layers of this model (the modules in `model.layers`) while the context is open.

    Only these objects change, by way of their `__class__`; other models of the same class stay as they are.
    """
    layers = {id(layer): layer for layer in getattr(model, "layers", None) or [] if isinstance(layer, nn.Module)}
    if not layers:
        raise TrainingError(
            f"grad_checkpoint needs the layers of the model, and {type(model).__name__} has no `layers`.",
            "Train without grad_checkpoint, or with a smaller batch_size.",
        )
    found = [(layer, type(layer)) for layer in layers.values()]
    try:
        for layer, kind in found:
            layer.__class__ = _recomputed(kind)
        yield
    finally:
        for layer, kind in found:
            layer.__class__ = kind


def _recomputed(kind: type) -> type:
    """A subclass of the layer class `kind` that keeps nothing but its input for the backward pass."""

    def __call__(self, *args, **kwargs):
        if not self.training:
            return kind.__call__(self, *args, **kwargs)

        def layer(parameters, key, *args, **kwargs):
            before = self.trainable_parameters()
            self.update(parameters)
            try:
                with _drawing_from(mx.stop_gradient(key)):  # random bits have no gradient, and MLX would ask for it
                    return kind.__call__(self, *args, **kwargs)
            finally:
                self.update(before)  # the tracers of the recomputation must not outlive it

        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        return mx.checkpoint(layer)(self.trainable_parameters(), key, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


@contextmanager
def _drawing_from(key: mx.array) -> Iterator[None]:
    """Draws without a key of their own take theirs from `key`. (MLX offers no way to set its state to a traced key.)"""
    draws = {name: getattr(mx.random, name) for name in _DRAWS}

    def keyed(draw):
        def call(*args, **kwargs):
            nonlocal key
            if kwargs.get("key") is None:
                key, kwargs["key"] = mx.random.split(key)
            return draw(*args, **kwargs)

        return call

    try:
        for name, draw in draws.items():
            setattr(mx.random, name, keyed(draw))
        yield
    finally:
        for name, draw in draws.items():
            setattr(mx.random, name, draw)
