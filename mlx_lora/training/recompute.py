"""Gradient checkpointing: keep the input of each layer, recompute the rest in the backward pass (arXiv:1604.06174).

`mx.checkpoint` runs a layer's Python code a second time for the backward pass. So the layer's parameters must be
arguments of the checkpointed function, or they get no gradient. And dropout must draw the same mask both times, or the
gradient would belong to another mask than the loss. MLX's own random state gives a new mask each time; here the layer's
`nn.Dropout` modules draw from a key that is an argument as well. A layer that draws random numbers in any other way
cannot be checkpointed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..errors import TrainingError
from ..kernels import checkpointed


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Recompute the layers of this model (the modules in `model.layers`) while the context is open.

    This changes the `__class__` of these layers and their dropout modules only. Other models and other threads are not
    affected.
    """
    layers = [layer for layer in getattr(model, "layers", None) or [] if isinstance(layer, nn.Module)]
    if not layers:
        raise TrainingError(
            f"grad_checkpoint needs the layers of the model, and {type(model).__name__} has no `layers`.",
            "Train without grad_checkpoint, or with a smaller batch_size.",
        )
    dropouts = [module for layer in layers for module in _dropouts(layer)]
    classes = {id(module): (module, type(module)) for module in [*layers, *dropouts]}  # one object may appear twice
    try:
        for module, own in classes.values():
            module.__class__ = _keyed(own) if isinstance(module, nn.Dropout) else _recomputed(own)
        yield
    finally:
        for module, own in classes.values():
            module.__class__ = own


def _dropouts(layer: nn.Module) -> list[nn.Dropout]:
    return list({id(module): module for module in layer.modules() if isinstance(module, nn.Dropout)}.values())


class _Keys:
    """An endless sequence of random keys derived from a first one."""

    def __init__(self, key: mx.array):
        self._key = key

    def next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key


def _keyed(own: type) -> type:
    """A subclass of the dropout class `own` that draws from `self.mask_keys` if a checkpointed layer has set it."""

    def __call__(self, x):
        if self.mask_keys is None or self._p_1 == 1 or not self.training:
            return own.__call__(self, x)
        mask = mx.random.bernoulli(self._p_1, x.shape, self.mask_keys.next())
        return (mask * x) * (1 / self._p_1)

    return type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__, "mask_keys": None})


def _recomputed(own: type) -> type:
    """A subclass of the layer class `own` that keeps nothing but its input for the backward pass."""

    def __call__(self, *args, **kwargs):
        if not self.training:
            return own.__call__(self, *args, **kwargs)

        # Masks have no gradient. As arguments, their values would be unknown in the recomputation, and attention in
        # blocks could not skip fully masked blocks.
        masks = {place: x for place, x in [*enumerate(args), *kwargs.items()] if _is_mask(x)}
        args = [None if place in masks else x for place, x in enumerate(args)]
        kwargs = {name: None if name in masks else x for name, x in kwargs.items()}

        def layer(parameters, key, *args, **kwargs):
            before = self.trainable_parameters()
            self.update(parameters)
            try:
                # A random mask has no gradient, yet MLX would ask for the key's.
                with _drawing_from(mx.stop_gradient(key), _dropouts(self)):
                    args = [masks.get(place, x) for place, x in enumerate(args)]
                    return own.__call__(self, *args, **{name: masks.get(name, x) for name, x in kwargs.items()})
            finally:
                self.update(before)  # the tracers of the recomputation must not outlive it

        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        return checkpointed(layer)(self.trainable_parameters(), key, *args, **kwargs)

    return type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})


def _is_mask(x: object) -> bool:
    return isinstance(x, mx.array) and x.dtype == mx.bool_


@contextmanager
def _drawing_from(key: mx.array, dropouts: list[nn.Dropout]) -> Iterator[None]:
    """Let `dropouts` draw their masks from `key`."""
    keys = _Keys(key)
    try:
        for dropout in dropouts:
            dropout.mask_keys = keys
        yield
    finally:
        for dropout in dropouts:
            del dropout.mask_keys
