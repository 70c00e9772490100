"""Running a function of mlx-lm with another value for one of its module's names; the module itself stays as it is."""

from __future__ import annotations

import types
from collections.abc import Callable


def with_global(f: Callable, name: str, value: object) -> Callable:
    """``f`` with another value for one of the global names that it reads."""
    changed = types.FunctionType(f.__code__, {**f.__globals__, name: value}, f.__name__, f.__defaults__, f.__closure__)
    changed.__kwdefaults__ = f.__kwdefaults__
    return changed
