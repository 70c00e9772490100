"""Speed that can be taken out: fewer launches and less memory for the same numbers.

``accelerate`` changes the classes of some modules of a model in place, ``restore`` changes them back, and ``explain``
tells what was done to which module and, for the rest, why not. ``MLX_LORA_FAST=off`` leaves every model as it is: the
layers then compute by the formulas they are written as, to the same numbers within the tolerance of the dtype.
"""

from __future__ import annotations

import os

import mlx.nn as nn

from ..errors import ConfigError
from .blas import mixin_for as _blas
from .swap import is_swapped, swap, undo


def accelerate(model: nn.Module) -> list[nn.Module]:
    """Put on everything that saves time or memory on this device. Calling it again is harmless.

    Returns: the modules whose class changed, for ``swap.undo``. Raises: ConfigError: an unknown MLX_LORA_FAST.
    """
    wanted = os.environ.get("MLX_LORA_FAST") or "on"
    if wanted not in ("on", "off"):
        raise ConfigError(f"MLX_LORA_FAST is {wanted!r}", "Set it to on or off.")
    changed = []
    if wanted == "on":
        for module in model.modules():
            if not is_swapped(module) and (mixin := _blas(module)) is not None:
                swap(module, mixin)
                changed.append(module)
    return changed


def restore(model: nn.Module) -> None:
    """Give every module of ``model`` its own class back."""
    undo(model.modules())


__all__ = ["accelerate", "restore", "undo"]
