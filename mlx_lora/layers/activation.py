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
from .base import AdapterLayer, derived, dims, kind
from .siblings import joined, siblings_of


class Shape(NamedTuple):
    """An MLP that is ``last(f(first(x), ...))``."""

    first: tuple[str, ...]  # names of the projections of its input
    last: str


def shape_of(mlp: nn.Module, call: Callable) -> Shape | None:
    """How ``call(mlp, x)`` computes; None where it is nothing of the kind, or f is more than a function of its inputs:
    has parameters, draws random numbers, differs in training, or leaves something behind.
    """
    if not _is_plain(call) or sum(map(_is_projection, mlp.values())) < 2:
        return None
    trial, random = _Stand(mlp, None, None), mx.random.state[0].tolist()
    try:
        result = call(trial, _INPUT)
    except Exception:  # whatever the module does with what is no array
        return None
    if result is not _RESULT or not trial.first or trial.last in (None, *trial.first):
        return None
    if mx.random.state[0].tolist() != random:
        return None
    return Shape(tuple(trial.first), trial.last)


def function_of(mlp: nn.Module, call: Callable, shape: Shape) -> Callable[..., mx.array]:
    """f: the input of the last projection by the results of the first ones."""

    def f(*given: mx.array) -> mx.array:
        return call(_Stand(mlp, dict(zip(shape.first, given, strict=True)), shape.last), _INPUT)

    return f


def trained(mlp: nn.Module, call: Callable, shape: Shape, x: mx.array) -> mx.array:
    """``call(mlp, x)``, of which autograd keeps x and the results of the first projections."""
    inputs, last = [getattr(mlp, name)(x) for name in shape.first], getattr(mlp, shape.last)
    siblings = siblings_of(last)
    shares = siblings is not None and siblings.wanted and siblings.only(last)
    y, *low = recomputed(function_of(mlp, call, shape), inputs, siblings.matrices if shares else [])
    if shares:
        siblings.give(y, joined, low)
    return last(y)


def recompute_activation(experts: nn.Module) -> None:
    """Let the ``activation`` of a mixture's experts, a module of its own in mlx-lm, be made again too."""
    activation = experts.get("activation")
    if not _is_activation(activation) or hasattr(activation, "_recomputed"):
        return
    if not any(map(_is_switch, experts.values())):
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

    return derived(_recomputed, activation, __call__=__call__, _recomputed=True)


def _is_switch(value: Any) -> bool:
    return isinstance(value, nn.Module) and kind(_base(value)) == "switch"


class _Nothing:
    """Stands for an array that must only be handed on."""


_INPUT, _RESULT = _Nothing(), _Nothing()


class _Stand:
    """An MLP with given results of its projections. On trial (None given) it finds out which those are.

    Of the module's attributes it has what cannot be, hold or change anything that is trained: constants, plain
    functions, activations. Nothing can be set on it.
    """

    __slots__ = ("_given", "_mlp", "first", "last")

    def __init__(self, mlp: nn.Module, given: dict[str, mx.array] | None, last: str | None):
        for name, value in (("_mlp", mlp), ("_given", given), ("first", []), ("last", last)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def __getattr__(self, name: str) -> Any:
        if self._given is not None and name in self._given:
            return lambda x: self._given[name]
        if self._given is not None and name == self.last:
            return lambda x: x
        value = getattr(self._mlp, name)
        if self._given is None and _is_projection(value):
            return lambda x: self._projected(name, value, x)
        if name == "training" or not _is_constant(value):
            raise AttributeError(name)
        return value

    def _projected(self, name: str, projection: nn.Module, x: Any) -> Any:
        if x is _INPUT and name not in self.first and self.last is None:
            self.first.append(name)
            return mx.zeros((1, dims(_base(projection))[1]))
        if isinstance(x, mx.array) and self.last is None:
            object.__setattr__(self, "last", name)
            return _RESULT
        raise TypeError(name)


_COMPILED = type(mx.compile(lambda x: x))


def _is_constant(value: Any) -> bool:
    if isinstance(value, functools.partial):
        return all(map(_is_constant, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, nn.Module):
        return _is_activation(value)
    return value is None or isinstance(value, (bool, int, float, str, _COMPILED)) or _is_plain(value)


def _is_plain(value: Any) -> bool:
    """A function that holds nothing (classes, for ``super()``, excepted), or one of MLX's own."""
    if inspect.isfunction(value):
        return all(isinstance(cell.cell_contents, type) for cell in value.__closure__ or ())
    return inspect.isbuiltin(value) or type(value).__name__ == "nb_func"


def _is_activation(module: Any) -> bool:
    """One of MLX's or mlx-lm's, without parameters and random numbers."""
    known = type(module).__module__.startswith(("mlx.nn.layers.activations", "mlx_lm.models."))
    return isinstance(module, nn.Module) and known and not module.parameters() and not module.children()


def _is_projection(value: Any) -> bool:
    return isinstance(value, nn.Module) and kind(_base(value)) == "linear"


def _base(projection: nn.Module) -> nn.Module:
    return projection.base if isinstance(projection, AdapterLayer) else projection
