"""What ``attach`` or ``mount`` changed on a model, and how to undo it."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..base.fingerprint import Fingerprint
from ..base.modules import Frozen, base_dtype
from ..config import AdapterConfig
from ..errors import AdapterError
from ..layers import AdapterLayer, MultiLoRALinear, TokenRows, UntiedEmbedding

_STATE, _CHANGED = "_mlx_lora_state", "_mlx_lora_changed"
_WRAPPERS = (AdapterLayer, TokenRows)


@dataclass(eq=False)
class State:
    """What is on a model besides its adapter layers, and the values from before. Two states are never equal."""

    config: AdapterConfig
    frozen: Frozen  # the frozen parameters of each module before
    projections: tuple[mx.array, mx.array] | None = None  # VeRA's, as drawn or loaded, float32
    full_parameters: list[tuple[str, str]] = field(default_factory=list)  # (module path, name) of trained parameters
    original_arrays: list[tuple[nn.Module, str, mx.array]] = field(default_factory=list)  # their values before
    original_modules: dict[str, nn.Module] = field(default_factory=dict)  # modules that others replace, by path
    accelerated: list[nn.Module] = field(default_factory=list)  # modules whose class fast.accelerate changed
    fingerprint: Fingerprint | None = None  # of the base


@dataclass
class Removed:
    """What ``take_off`` removed from a model, for ``put_back``."""

    state: State | None
    modules: dict[str, nn.Module]  # by path
    arrays: list[tuple[nn.Module, str, mx.array]]
    training: bool


def set_state(model: nn.Module, state: State) -> None:
    """Store ``state`` with the model, outside its parameters."""
    setattr(model, _STATE, state)


def state_of(model: nn.Module) -> State | None:
    """The state that ``attach`` or ``mount`` stored; None if the model has no adapter. A new one for every adapter."""
    return model.__dict__.get(_STATE)


def discard_state(model: nn.Module) -> State | None:
    """Remove the state from the model, so that ``unmount`` has nothing to undo. Returns it."""
    return model.__dict__.pop(_STATE, None)


def mark_changed(model: nn.Module) -> None:
    """Record that the weights of the model are no longer those it was loaded with."""
    setattr(model, _CHANGED, object())


def identity(model: nn.Module) -> tuple:
    """What the model computes with now: differs after every ``attach``, ``mount``, ``unmount`` and ``fuse``."""
    return state_of(model), model.__dict__.get(_CHANGED)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers around modules of the base, by path: adapter layers, and embeddings with trained rows."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, _WRAPPERS)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by path as if it had no adapter layers, in the order of definition.

    Raises: AdapterError: the model has several adapters (MultiLoRA).
    """
    modules = list(reversed(model.named_modules()))
    if any(isinstance(module, MultiLoRALinear) for _, module in modules):
        raise AdapterError("the model has several adapters (MultiLoRA)", "Remove them with MultiLoRA.unmount().")
    inner = tuple(f"{path}." for path, m in modules if isinstance(m, (*_WRAPPERS, UntiedEmbedding)))
    return {
        path: module.base if isinstance(module, _WRAPPERS) else module
        for path, module in modules
        if not (inner and path.startswith(inner))
    }


def place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put ``modules`` into the model at their paths."""
    if modules:
        model.update_modules(tree_unflatten(list(modules.items())))


def set_mode(layer: nn.Module, training: bool) -> None:
    """Put a new layer into training or evaluation mode, but not the base layer in it, which has its own."""
    inside = {id(module) for module in layer.base.modules()}
    for module in layer.modules():
        if id(module) not in inside:
            module._set_training_mode(training)


def take_off(model: nn.Module) -> Removed:
    """Remove everything that ``attach`` or ``mount`` put on the model, which then computes as its base.

    Which parameters are frozen and the classes that fast.accelerate changed stay as they are.
    """
    layers, state = wrappers(model), discard_state(model)
    base = {path: layer.base for path, layer in layers.items()}
    if state is None:
        place(model, base)
        return Removed(None, layers, [], model.training)
    present = dict(model.named_modules())
    for path, original in state.original_modules.items():
        # The trained replacement may have been cast by set_dtype since; the original was not in the model then.
        dtype, before = base.get(path, present[path]).weight.dtype, base_dtype(original)
        if before is not None and before != dtype:
            original.set_dtype(dtype)
    replaced = {path: present[path] for path in (*layers, *state.original_modules)}
    arrays = [(module, leaf, module[leaf]) for module, leaf, _ in state.original_arrays]
    place(model, base | state.original_modules)
    for (module, leaf, original), (_, _, trained) in zip(state.original_arrays, arrays, strict=True):
        module[leaf] = original if original.dtype == trained.dtype else original.astype(trained.dtype)
    return Removed(state, replaced, arrays, model.training)


def put_back(model: nn.Module, removed: Removed) -> None:
    """Undo ``take_off``."""
    for module, leaf, array in removed.arrays:
        module[leaf] = array
    place(model, removed.modules)
    for module in removed.modules.values() if model.training != removed.training else ():
        module.train(model.training)
    if removed.state is not None:
        set_state(model, removed.state)
