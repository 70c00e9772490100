"""What is on a model besides its base, and what it takes to undo it. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..config import AdapterConfig
from ..errors import AdapterError
from ..layers import AdapterLayer, MultiLoRALinear, TokenRows

_STATE = "_mlx_lora_state"
_WRAPPERS = (AdapterLayer, TokenRows)


@dataclass
class State:
    """What is on a model besides its adapter layers, and what it takes to undo it."""

    config: AdapterConfig
    shared: tuple[mx.array, mx.array] | None = None  # VeRA's projections as drawn or loaded, float32
    whole: list[tuple[str, str]] = field(default_factory=list)  # (module path, parameter name) of whole parameters
    arrays: dict[tuple[str, str], mx.array] = field(default_factory=dict)  # what they were
    modules: dict[str, nn.Module] = field(default_factory=dict)  # quantized modules that dense ones stand in for


def set_state(model: nn.Module, state: State) -> None:
    """Keep ``state`` with the model, outside its parameters, for ``state_of``."""
    object.__setattr__(model, _STATE, state)


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
    if any(isinstance(module, MultiLoRALinear) for _, module in modules):
        raise AdapterError("the model has many adapters on it at once", "Take them off with MultiLoRA.unmount().")
    adapted = {path: m for path, m in reversed(modules) if isinstance(m, _WRAPPERS)}
    inside = tuple(path + "." for path in adapted)
    bare = {p: m for p, m in modules if not (inside and p.startswith(inside))}
    return bare | {path: layer.base for path, layer in adapted.items()}
