"""What is known of a model: where it came from, what stands on it, and what that took the place of. Computes nothing.

Both are kept on the model itself, outside its parameters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import AdapterConfig
from .errors import AdapterError
from .layers import AdapterLayer, ManyLoRALinear, TokenRows

_BASE, _STATE = "_mlx_lora_base", "_mlx_lora_state"
_WRAPPERS = (AdapterLayer, TokenRows)


@dataclass(frozen=True)
class Base:
    """Where a model came from: the name it was asked for by, its folder and its config."""

    name: str
    folder: Path
    config: dict[str, Any]


@dataclass
class State:
    """What is on a model besides its adapter layers, and what it takes to undo it."""

    config: AdapterConfig
    shared: tuple[mx.array, mx.array] | None = None  # VeRA's projections as drawn or loaded, float32
    whole: list[tuple[str, str]] = field(default_factory=list)  # (module path, parameter name) of whole parameters
    arrays: dict[tuple[str, str], mx.array] = field(default_factory=dict)  # what they were
    modules: dict[str, nn.Module] = field(default_factory=dict)  # quantized modules that dense ones stand in for


def remember(model: nn.Module, what: Base | State) -> None:
    """Keep ``what`` with the model, for ``base_of`` or ``state_of``."""
    object.__setattr__(model, _BASE if isinstance(what, Base) else _STATE, what)


def base_of(model: nn.Module) -> Base | None:
    """What ``load`` knew of the model; None for one that was made elsewhere."""
    return model.__dict__.get(_BASE)


def state_of(model: nn.Module) -> State | None:
    """What ``attach`` or ``mount`` left to undo; None where nothing is on the model."""
    return model.__dict__.get(_STATE)


def forget(model: nn.Module) -> State | None:
    """The model keeps what it computes now for its own: ``unmount`` has nothing left to put back. What there was."""
    return model.__dict__.pop(_STATE, None)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that wraps a module of the bare model, by path: adapter layers and rows of embeddings."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, _WRAPPERS)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path as they would be without adapters. Raises AdapterError where there are many at once."""
    modules = model.named_modules()
    if any(isinstance(module, ManyLoRALinear) for _, module in modules):
        raise AdapterError("the model has many adapters on it at once", "Take them off with ManyAdapters.unmount().")
    adapted = {path: m for path, m in reversed(modules) if isinstance(m, _WRAPPERS)}
    inside = tuple(path + "." for path in adapted)
    bare = {p: m for p, m in modules if not (inside and p.startswith(inside))}
    return bare | {path: layer.base for path, layer in adapted.items()}


def model_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype most of the model's float parameters have."""
    count: Counter = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            count[array.dtype] += array.size
    return count.most_common(1)[0][0] if count else mx.float32
