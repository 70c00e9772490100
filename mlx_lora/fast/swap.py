"""Changing a module's class in place, and changing it back.

A module keeps its parameters, its name and its place in the model; only ``__call__`` and the like differ. The new class
derives from the old one, so ``isinstance`` still holds, and such a module can be copied and pickled. What the new class
keeps between calls lies under one attribute, ``_kept``, outside the module's dictionary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_KEPT = "_kept"


class Changes:
    """Mixin that drops what a module has kept whenever one of its attributes is set.

    In-place changes count too: ``layer.m *= 2`` ends in an assignment, and so does ``Module.update``.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.__dict__.pop(_KEPT, None)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        self.__dict__.pop(_KEPT, None)


def keep(module: nn.Module, value: Any) -> Any:
    """Keep ``value`` with the module until one of its attributes is set. Returns it."""
    module.__dict__[_KEPT] = value
    return value


def kept(module: nn.Module) -> Any:
    """What ``keep`` stored; None where there is nothing, or no longer."""
    return module.__dict__.get(_KEPT)


def evaluated(arrays: Any) -> bool:
    """Evaluate ``arrays``. False where they depend on the arguments of a function being traced: not to be kept."""
    try:
        mx.eval(arrays)
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
            module.__dict__.pop(_KEPT, None)


@functools.cache
def _derived(plain: type, mixin: type) -> type:
    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, state, *rest = (*plain.__reduce_ex__(self, protocol), None)[:5]
        return (_blank, (plain, mixin), _without_kept(state), *rest)

    members = {"__module__": plain.__module__, "__reduce_ex__": __reduce_ex__, "_plain": plain}
    return type(plain.__name__, (mixin, plain), members)


def _without_kept(state: Any) -> Any:
    """A copy or a pickle makes what it keeps anew."""
    return {k: v for k, v in state.items() if k != _KEPT} if isinstance(state, dict) else state


def _blank(plain: Callable[..., type], mixin: type) -> nn.Module:
    made = _derived(plain, mixin)
    return made.__new__(made)
