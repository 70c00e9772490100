"""A point between two layers at which hidden states are recorded or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class Seam:
    """The output of `layer`. While `open` is active, the `__class__` of this module (only) is changed."""

    def __init__(self, layer: nn.Module):
        self._layer = layer
        self._replace: Callable[[mx.array], mx.array] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        own, seam = type(self._layer), self

        def __call__(layer, *args, **kwargs):
            output = own.__call__(layer, *args, **kwargs)
            return output if seam._replace is None else seam._replace(output)

        try:
            self._layer.__class__ = type(own.__name__, (own,), {"__call__": __call__, "__module__": own.__module__})
            yield
        finally:
            self._layer.__class__ = own

    @contextmanager
    def given(self, hidden: mx.array) -> Iterator[None]:
        """The layer returns `hidden`; MLX never computes its own output, because nothing reads it."""
        with self._replaced(lambda _: hidden):
            yield

    @contextmanager
    def recording(self) -> Iterator[list]:
        """Yields a list that receives what the layer returns, once for each call."""
        seen: list = []
        with self._replaced(lambda output: (seen.append(output), output)[1]):
            yield seen

    @contextmanager
    def _replaced(self, replace: Callable) -> Iterator[None]:
        before, self._replace = self._replace, replace
        try:
            yield
        finally:
            self._replace = before


@contextmanager
def skipped(layers: list[nn.Module]) -> Iterator[None]:
    """While the context is open, the layers return their first argument unchanged."""

    def __call__(self, *args, **kwargs):
        return [*args, *kwargs.values()][0]

    classes = {id(layer): (layer, type(layer)) for layer in layers}
    try:
        for layer, own in classes.values():
            layer.__class__ = type(own.__name__, (own,), {"__call__": __call__})
        yield
    finally:
        for layer, own in classes.values():
            layer.__class__ = own
