"""What ``attach`` or ``mount`` changed on a model, and how to undo it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..base.fingerprint import Fingerprint
from ..base.modules import Frozen, base_dtype, kind
from ..base.origin import checked
from ..config import AdapterConfig
from ..errors import AdapterError, MLXLoRAError
from ..layers import AdapterLayer, MultiLoRALinear, SplitEmbedding, TokenRows

_STATE, _CHANGED, _BIASES = "_mlx_lora_state", "_mlx_lora_changed", "_mlx_lora_biases"
_WRAPPERS = (AdapterLayer, TokenRows)
HEAD = "lm_head"  # the path of a tied output head while the embedding is split


@dataclass(eq=False)
class State:
    """Everything on a model besides its adapter layers, and the original values. Two states are never equal."""

    config: AdapterConfig
    frozen: Frozen  # the frozen parameters of each module before
    projections: tuple[mx.array, mx.array] | None = None  # VeRA's, as drawn or loaded, float32
    full_parameters: list[tuple[str, str]] = field(default_factory=list)  # (module path, name) of trained parameters
    original_arrays: list[tuple[nn.Module, str, mx.array]] = field(default_factory=list)  # their values before
    original_modules: dict[str, nn.Module] = field(default_factory=dict)  # original modules that were replaced, by path
    accelerated: list[nn.Module] = field(default_factory=list)  # modules whose class fast.accelerate changed
    fingerprint: Fingerprint | None = None  # of the base


@dataclass
class Removed:
    """What ``take_off`` removed from a model, for ``put_back``."""

    state: State | None
    modules: dict[str, nn.Module]  # by path
    arrays: list[tuple[nn.Module, str, mx.array]]
    training: bool
    split: tuple[str, SplitEmbedding] | None = None


def set_state(model: nn.Module, state: State) -> None:
    """Store ``state`` with the model, outside its parameters."""
    setattr(model, _STATE, state)


def state_of(model: nn.Module) -> State | None:
    """The state that ``attach`` or ``mount`` stored; None if the model has no adapter. A new one for every adapter."""
    return checked(model).__dict__.get(_STATE)


def discard_state(model: nn.Module) -> State | None:
    """Remove the state from the model, so that ``unmount`` has nothing to undo. Returns it."""
    return model.__dict__.pop(_STATE, None)


def mark_changed(model: nn.Module, biases: list[str] | None = None) -> None:
    """Record that the model's weights have changed since it was loaded.

    Args:
        biases: paths of layers that got a bias, which the model's class does not have.
    """
    setattr(model, _CHANGED, object())
    setattr(model, _BIASES, new_biases(model) | set(biases or ()))


def new_biases(model: nn.Module) -> frozenset[str]:
    """Paths of the layers that got a bias, which the model's class does not have."""
    return model.__dict__.get(_BIASES, frozenset())


def refuse_biases(paths: Iterable[str], error: type[MLXLoRAError] = AdapterError) -> None:
    """Raise ``error`` if there are ``paths`` of layers with a bias that the model's class does not have."""
    if paths := sorted(paths):
        named = f"{', '.join(paths[:3])}{', ...' * (len(paths) > 3)}"
        raise error(
            f"{named}: the adapter has biases (lora_bias) for layers without a bias, which a model folder cannot hold",
            "Keep the adapter separate: generate, chat and serve use it unmerged.",
        )


def identity(model: nn.Module) -> tuple:
    """Identifies the model's current weights; changes with every ``attach``, ``mount``, ``unmount`` and ``fuse``."""
    return state_of(model), model.__dict__.get(_CHANGED)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers around modules of the base, by path: adapter layers, and embeddings with trained rows."""
    return {path: m for path, m in named_modules(model) if isinstance(m, _WRAPPERS)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by path as if it had no adapter layers, in the order of definition.

    Raises: AdapterError: the model has several adapters (MultiLoRA).
    """
    modules = named_modules(model)
    if any(isinstance(module, MultiLoRALinear) for _, module in modules):
        raise AdapterError("the model has several adapters (MultiLoRA)", "Remove them with MultiLoRA.unmount().")
    inner = tuple(f"{path}." for path, m in modules if isinstance(m, _WRAPPERS))
    return {
        path: module.base if isinstance(module, _WRAPPERS) else module
        for path, module in modules
        if not (inner and path.startswith(inner))
    }


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) in the order of definition. The parts of a split embedding have the paths that PEFT gives them."""
    modules = list(reversed(model.named_modules()))
    split = next((path for path, m in modules if isinstance(m, SplitEmbedding)), None)
    if split is None:
        return modules
    own, found = ((f"{split}.embedding", split), (f"{split}.{HEAD}", HEAD)), []
    for path, module in modules:
        for inside, name in own:
            if path == inside or path.startswith(inside + "."):
                path = name + path[len(inside) :]
                break
        else:
            if path == split:
                continue
        found.append((path, module))
    return found


def place(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put ``modules`` into the model at their paths, which are those of ``named_modules``."""
    split = split_of(model)
    own = {split[0]: f"{split[0]}.embedding", HEAD: f"{split[0]}.{HEAD}"} if split else {}
    _update(model, {own.get(path, path): module for path, module in modules.items()})


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of ``named_modules``, without walking through the model; None if there is none."""
    try:
        found = model
        for name in path.split("."):
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found
    except (KeyError, IndexError, ValueError, TypeError):  # also for a split embedding
        return next((module for name, module in named_modules(model) if name == path), None)


def _update(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    if modules:
        model.update_modules(tree_unflatten(list(modules.items())))


def split_of(model: nn.Module) -> tuple[str, SplitEmbedding] | None:
    """The path and module of the embedding that ``split_head`` split; None if there is none."""
    return next(((p, m) for p, m in model.named_modules() if isinstance(m, SplitEmbedding)), None)


def split_head(model: nn.Module) -> bool:
    """Split the embedding that is tied to the output head, so that the head is a module at ``lm_head``.

    The model computes the same as before. Returns False, and changes nothing, if the head is not tied.
    """
    if split_of(model) is not None:
        return True
    bare = bare_modules(model)
    path = None if any(f".{name}".endswith(f".{HEAD}") for name in bare) else tied_embedding(model)
    if path is not None:
        _update(model, {path: SplitEmbedding(bare[path])})
    return path is not None


def join_head(model: nn.Module) -> None:
    """Undo ``split_head``: the embedding, with its adapter, replaces both parts."""
    if (split := split_of(model)) is not None:
        _update(model, {split[0]: split[1].embedding})


def tied_embedding(model: nn.Module) -> str | None:
    """The path of the embedding that also computes the model's logits; None if the head has its own weight."""
    for path, module in bare_modules(model).items():
        if kind(module) == "embedding" and _is_called(model, module):
            return path
    return None


def _is_called(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether the model calls ``embedding.as_linear``. Runs the model on one token without computing anything."""
    called = []

    def as_linear(x: mx.array) -> mx.array:
        called.append(True)
        return type(embedding).as_linear(embedding, x)

    embedding.__dict__["as_linear"] = as_linear
    try:
        model(mx.zeros((1, 1), mx.int32))
    except Exception:  # the model needs further inputs
        return bool(called)
    finally:
        del embedding.__dict__["as_linear"]
    return bool(called)


def set_mode(layer: nn.Module, training: bool) -> None:
    """Put a new layer into training or evaluation mode, but not its base layer, which has its own mode."""
    inside = {id(module) for module in layer.base.modules()}
    for module in layer.modules():
        if id(module) not in inside:
            module._set_training_mode(training)


def take_off(model: nn.Module) -> Removed:
    """Remove everything that ``attach`` or ``mount`` put on the model, which then computes as its base.

    Frozen parameters stay frozen, and the classes that fast.accelerate changed stay.
    """
    layers, state = wrappers(model), discard_state(model)
    base = {path: layer.base for path, layer in layers.items()}
    split = split_of(model)
    if state is None:
        place(model, base)
        join_head(model)
        return Removed(None, layers, [], model.training, split)
    present = dict(named_modules(model))
    for path, original in state.original_modules.items():
        # set_dtype may have cast the trained replacement, but not the original, which was not in the model.
        dtype, before = base.get(path, present[path]).weight.dtype, base_dtype(original)
        if before is not None and before != dtype:
            original.set_dtype(dtype)
    replaced = {path: present[path] for path in (*layers, *state.original_modules)}
    arrays = [(module, leaf, module[leaf]) for module, leaf, _ in state.original_arrays]
    place(model, base | state.original_modules)
    join_head(model)
    for (module, leaf, original), (_, _, trained) in zip(state.original_arrays, arrays, strict=True):
        module[leaf] = original if original.dtype == trained.dtype else original.astype(trained.dtype)
    return Removed(state, replaced, arrays, model.training, split)


def put_back(model: nn.Module, removed: Removed) -> None:
    """Undo ``take_off``."""
    for module, leaf, array in removed.arrays:
        module[leaf] = array
    if removed.split is not None:
        _update(model, dict([removed.split]))
    place(model, removed.modules)
    for module in removed.modules.values() if model.training != removed.training else ():
        module.train(model.training)
    if removed.state is not None:
        set_state(model, removed.state)
