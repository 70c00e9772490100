"""Changing a module's class in place, and changing it back.

A module keeps its parameters, its name and its place in the model; only methods such as ``__call__`` differ. The new
class derives from the old one, so ``isinstance`` still holds, and such a module can be copied and pickled. Data kept
between calls is in private attributes: ``keep`` stores data derived from the module's attributes, ``computed`` arrays
derived from the values of other arrays.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_KEPT, _COMPUTED, GROUP = "_fast_kept", "_fast_computed", "_fast_group"
_OWN = (_KEPT, _COMPUTED, GROUP)
_BYTE = ctypes.c_char * 1
# While a plan traces a step, see `traced_only`.
_stand_in: ContextVar[Callable[[nn.Module, str, Callable[[], mx.array]], mx.array] | None] = ContextVar(
    "stand_in", default=None
)


@contextmanager
def traced_only(stand_in: Callable[[nn.Module, str, Callable[[], mx.array]], mx.array]) -> Iterator[None]:
    """A context in which nothing is evaluated: ``stand_in(module, name, compute)`` replaces ``computed``."""
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


def is_traced_only() -> bool:
    """Whether the code runs within ``traced_only``."""
    return _stand_in.get() is not None


class Changes:
    """Mixin that drops the data stored by ``keep`` whenever one of the module's attributes is set."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__.pop(_KEPT, None)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if not key.startswith("_"):  # such as MLX's `_training`, which does not affect the values
            self.__dict__.pop(_KEPT, None)


def keep(module: nn.Module, name: str, value: Any) -> Any:
    """Keep ``value`` under ``name`` until one of the module's attributes is set. Returns it."""
    module.__dict__.setdefault(_KEPT, {})[name] = value
    return value


def kept(module: nn.Module, name: str) -> Any:
    """The data stored by ``keep``; None if there is none."""
    found = module.__dict__.get(_KEPT)
    return None if found is None else found.get(name)


def computed(
    module: nn.Module, name: str, arrays: list[mx.array], compute: Callable[[], mx.array], key: Any = None
) -> mx.array:
    """``compute()``, kept with the module while ``arrays`` and ``key`` are unchanged.

    An array counts as changed if it is another object, or if its data lies elsewhere: MLX gives the result of an
    operation in place (``m *= 2``, ``m[0] = 1``, also through another name) a new buffer. While a function is traced,
    arrays have no data, and nothing is kept.
    """
    if (stand_in := _stand_in.get()) is not None:
        return stand_in(module, name, compute)
    store = module.__dict__.setdefault(_COMPUTED, {})
    if name in store:
        value, known, old_key = store[name]
        same = old_key == key and len(known) == len(arrays)
        if same and all(a is b and address(a) == place for a, (b, _, place) in zip(arrays, known, strict=True)):
            return value
        del store[name]
    value = compute()
    places = [address(array) for array in arrays]
    if None not in places and evaluated(value):
        # The alias shares the data: it keeps a buffer from being freed, and its address from being used again.
        aliases = [array.astype(array.dtype) for array in arrays]
        store[name] = value, list(zip(arrays, aliases, places, strict=True)), key
    return value


def address(array: mx.array) -> int | None:
    """The address of an array's data; None while a function is traced, or if the array is not contiguous."""
    if _stand_in.get() is not None:
        return id(array)
    try:
        return ctypes.addressof(_BYTE.from_buffer(array))
    except (RuntimeError, ValueError, TypeError, BufferError):
        return None


def evaluated(array: mx.array) -> bool:
    """Evaluate ``array``. False if it depends on arguments of a traced function."""
    try:
        mx.eval(array)
    except ValueError:
        return False
    return True


def swap(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` before the module's class."""
    module.__class__ = _derived(type(module), mixin)


def is_swapped(module: nn.Module) -> bool:
    return hasattr(type(module), "_plain")


def plain_class(module: nn.Module) -> type:
    """The module's class as it was before ``swap``."""
    return getattr(type(module), "_plain", type(module))


def undo(modules: Iterable[nn.Module]) -> None:
    """Give modules their own class back."""
    for module in modules:
        if is_swapped(module):
            module.__class__ = plain_class(module)
        for name in _OWN:
            module.__dict__.pop(name, None)


@functools.cache
def _derived(plain: type, mixin: type) -> type:
    def __reduce_ex__(self, protocol: int) -> tuple:
        found = plain.__reduce_ex__(self, protocol)
        state = found[2]
        if isinstance(state, dict):  # a copy or a pickle recomputes its kept data
            state = {name: value for name, value in state.items() if name not in _OWN}
        return (_blank, (plain, mixin), state, *found[3:])

    members = {"__module__": plain.__module__, "__reduce_ex__": __reduce_ex__, "_plain": plain}
    return type(plain.__name__, (mixin, plain), members)


def _blank(plain: type, mixin: type) -> nn.Module:
    made = _derived(plain, mixin)
    return made.__new__(made)
