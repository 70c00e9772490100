"""What an MLP computes between its projections, made again in the backward pass instead of kept.

Of SwiGLU autograd keeps the sigmoid, its product with the gate, and the result, which the last projection's adapter
needs as well: three arrays of the widest size in the model. Here gate and up projection are what is kept. No formula is
written down here: an MLP of any kind is tried out once, with arrays for the results of its projections. Of a mixture's
experts the activation alone is made again, and its result kept.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..kernels import enabled
from ..kernels.recomputed import recomputed
from .base import AdapterLayer, dims, kind
from .siblings import Siblings, joined


class Shape(NamedTuple):
    """An MLP that is ``last(f(first(x), ...))``."""

    first: tuple[str, ...]  # names of the projections of its input
    last: str


def shape_of(mlp: nn.Module, call: Callable) -> Shape | None:
    """How ``call(mlp, x)`` computes, None where it is nothing of the kind, or f has parameters or random numbers."""
    if not inspect.isfunction(call) or sum(map(_is_projection, mlp.values())) < 2:
        return None
    trial = _Stand(mlp, None, None)
    try:
        result = call(trial, _INPUT)
    except Exception:  # whatever the module does with what is no array
        return None
    if result is not _RESULT or not trial.first or trial.last in (None, *trial.first):
        return None
    return Shape(tuple(trial.first), trial.last)


def trained(mlp: nn.Module, call: Callable, shape: Shape, x: mx.array) -> mx.array:
    """``call(mlp, x)``, of which autograd keeps x and the results of the first projections."""
    inputs, last = [mlp[name](x) for name in shape.first], mlp[shape.last]

    def f(*given: mx.array) -> mx.array:
        return call(_Stand(mlp, dict(zip(shape.first, given, strict=True)), shape.last), _INPUT)

    shares = isinstance(last, AdapterLayer) and hasattr(last, "siblings") and last.dropout._p_1 == 1
    y, *low = recomputed(f, inputs, [last.lora_a] if shares else [])
    if shares:
        if last.siblings is None:
            object.__setattr__(last, "siblings", Siblings([last]))
        last.siblings.give(y, joined, low)
    return last(y)


def recompute_activation(experts: nn.Module) -> None:
    """Let the ``activation`` of a mixture's experts, a module of its own in mlx-lm, be made again too."""
    activation = experts.get("activation")
    plain = isinstance(activation, nn.Module) and not activation.parameters() and not _draws(activation)
    if not plain or hasattr(activation, "_recomputed") or not any(map(_is_switch, experts.values())):
        return
    # A copy: in mlx-lm one object serves all layers of all models.
    experts.activation = copy.copy(activation)
    experts.activation.__class__ = _recomputed(type(activation))


@functools.cache
def _recomputed(activation: type) -> type:
    def __call__(self, *inputs: mx.array) -> mx.array:
        if not (self.training and enabled()):
            return activation.__call__(self, *inputs)
        return recomputed(functools.partial(activation.__call__, self), list(inputs), [])[0]

    return type(activation.__name__, (activation,), {"__call__": __call__, "_recomputed": True})


def _is_switch(value: Any) -> bool:
    return isinstance(value, nn.Module) and kind(_base(value)) == "switch"


class _Nothing:
    """Stands for an array that must only be handed on."""


_INPUT, _RESULT = _Nothing(), _Nothing()


class _Stand:
    """An MLP with given results of its projections. On trial (None given) it finds out which those are."""

    def __init__(self, mlp: nn.Module, given: dict[str, mx.array] | None, last: str | None):
        self._mlp, self._given = mlp, given
        self.first, self.last = [], last

    def __getattr__(self, name: str) -> Any:
        if self._given is not None and name in self._given:
            return lambda x: self._given[name]
        if self._given is not None and name == self.last:
            return lambda x: x
        value = getattr(self._mlp, name)
        if self._given is None and _is_projection(value):
            return lambda x: self._projected(name, value, x)
        if isinstance(value, mx.array) or (isinstance(value, nn.Module) and (value.parameters() or _draws(value))):
            raise AttributeError(name)  # f would need it
        return value

    def _projected(self, name: str, projection: nn.Module, x: Any) -> Any:
        if x is _INPUT and name not in self.first and self.last is None:
            self.first.append(name)
            return mx.zeros((1, dims(_base(projection))[1]))
        if isinstance(x, mx.array) and self.last is None:
            self.last = name
            return _RESULT
        raise TypeError(name)


def _is_projection(value: Any) -> bool:
    return isinstance(value, nn.Module) and kind(_base(value)) == "linear"


def _base(projection: nn.Module) -> nn.Module:
    return projection.base if isinstance(projection, AdapterLayer) else projection


def _draws(module: nn.Module) -> bool:
    return any(isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Dropout3d)) for m in module.modules())
