"""Changing a module's class in place, and changing it back.

A module keeps its parameters, its name and its place in the model; only ``__call__`` and the like differ. The new class
derives from the old one, so ``isinstance`` still holds, and such a module can be copied and pickled. What the new class
keeps between calls lies in one private dictionary beside the module's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_KEPT, _VERSION, GROUP = "_fast_kept", "_fast_version", "_fast_group"
_OWN = (_KEPT, _VERSION, GROUP)


class Changes:
    """Mixin that forgets what a module has kept whenever one of its attributes is set, and counts the times.

    In-place changes count too: ``layer.m *= 2`` ends in an assignment, and so does ``Module.update``.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        _changed(self.__dict__)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        if not key.startswith("_"):  # such as MLX's `_training`, which says nothing of the numbers
            _changed(self.__dict__)


def _changed(state: dict[str, Any]) -> None:
    state.pop(_KEPT, None)
    state[_VERSION] = state.get(_VERSION, 0) + 1


def version(module: nn.Module) -> int:
    """How often an attribute of a module with ``Changes`` has been set."""
    return module.__dict__.get(_VERSION, 0)


def keep(module: nn.Module, name: str, value: Any) -> Any:
    """Keep ``value`` under ``name`` until one of the module's attributes is set. Returns it."""
    module.__dict__.setdefault(_KEPT, {})[name] = value
    return value


def kept(module: nn.Module, name: str) -> Any:
    """What ``keep`` stored; None where there is nothing, or no longer."""
    found = module.__dict__.get(_KEPT)
    return None if found is None else found.get(name)


def evaluated(array: mx.array) -> bool:
    """Evaluate ``array``. False where it depends on arguments of a function being traced: then it must not be kept."""
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
        if isinstance(state, dict):  # a copy or a pickle makes what it keeps anew
            state = {name: value for name, value in state.items() if name not in _OWN}
        return (_blank, (plain, mixin), state, *found[3:])

    members = {"__module__": plain.__module__, "__reduce_ex__": __reduce_ex__, "_plain": plain}
    return type(plain.__name__, (mixin, plain), members)


def _blank(plain: type, mixin: type) -> nn.Module:
    made = _derived(plain, mixin)
    return made.__new__(made)
