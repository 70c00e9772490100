"""Choose the modules of a model to adapt. Nothing is changed."""

from __future__ import annotations

import difflib
import re
from typing import Any

import mlx.nn as nn

from ..adapter import raise_faults, split_layer
from ..base.modules import dims, kind, layer_paths
from ..config import AdapterConfig, match_pattern
from ..errors import AdapterError
from .state import HEAD, bare_modules

ALL_LINEAR = "all-linear"


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that can be adapted, by path, in the model's order. Existing adapters on the model are ignored."""
    return {path: module for path, module in bare_modules(model).items() if kind(module)}


def routers(model: nn.Module) -> set[str]:
    """Paths of the linears that route tokens: in a block with experts, with one output per expert or a single one."""
    modules = bare_modules(model)
    found = set()
    for path, module in modules.items():
        if kind(module) != "switch":
            continue
        # The block that contains router and experts is one or two levels up: mlp.switch_mlp.gate_proj, mlp.gate.
        blocks = {path.rpartition(".")[0], path.rpartition(".")[0].rpartition(".")[0]}
        found |= {
            name
            for name, other in modules.items()
            if name.rpartition(".")[0] in blocks
            and kind(other) == "linear"
            and dims(other)[1] in (module.num_experts, 1)
        }
    return found


def select(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that ``config.keys`` and ``config.num_layers`` select, by path.

    ``num_layers`` limits every key except complete paths.

    Raises: AdapterError: a key matches nothing; the hint lists the model's modules.
    """
    layers = layer_paths(model)
    count = config.last_layers(len(layers))
    kept = layers[-count:]
    if config.layers_to_transform is not None:
        if beyond := [i for i in config.layers_to_transform if i >= len(layers)]:
            raise AdapterError(
                f"layers_to_transform: {', '.join(map(str, beyond))}, but the model has {len(layers)} layers",
                "Layers are numbered from 0.",
            )
        kept = [layers[i] for i in sorted(set(config.layers_to_transform))]
    where = f"the last {count} layers" if config.layers_to_transform is None else "layers_to_transform"
    chosen = tuple(path + "." for path in kept)
    every = tuple(path + "." for path in layers)
    modules = adaptable(model)
    outside = {path for path in modules if not path.startswith(every)}
    keys = None if config.keys is None and config.target_parameters is None else (*(config.keys or ()),)
    if keys is None or ALL_LINEAR in keys:
        _refuse_own_adapters(model, chosen)
    if keys is None:
        skip = routers(model)
        found = {path for path in modules if path.startswith(chosen) and path not in skip}
        if not found:
            raise AdapterError(f"{where}: no linear layers to adapt", "Name modules with --keys.")
        return {path: modules[path] for path in modules if path in found}
    found, faults = set(), []
    for key in [*keys, *(config.target_parameters or ())]:
        matches = _matches(key, modules, model) if key in keys else _parameters(key, modules)
        inside = {p for p in matches if p.startswith(chosen) or p in outside or p == key}
        found |= inside
        if not inside:
            faults.append(_no_match(key, matches, modules, where))
    raise_faults(faults, f"The model has: {', '.join(_names(modules))}.")
    return {path: module for path, module in modules.items() if path in found}


def names_head(config: AdapterConfig) -> bool:
    """Whether ``config`` may name the output head: only then does a tied head become a module."""
    return any(
        HEAD in name
        for name in (*(config.keys or ()), *(config.modules_to_save or ()), *config.trainable_token_indices)
    )


def check_patterns(config: AdapterConfig, chosen: dict[str, nn.Module]) -> None:
    """Refuse settings that act on none of the modules ``chosen``: patterns, and the side of an embedding.

    Raises: AdapterError that names each, with the modules that a pattern may have meant.
    """
    faults, decided = [], {}
    for name in ("rank_pattern", "scale_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        keyed = {pattern: pattern for pattern in patterns}
        decided[name] = {path: match_pattern(keyed, path, None) for path in chosen if patterns}
        for pattern in patterns.keys() - set(decided[name].values()):
            matches = [path for path in chosen if match_pattern({pattern: pattern}, path, None)]
            if matches:
                faults.append(f"{name} {pattern!r} has no effect: an earlier pattern matches {matches[0]} as well")
            else:
                meant = f"; did you mean {near!r}?" if (near := _near(pattern, chosen)) else ""
                faults.append(f"{name} {pattern!r} matches no adapted module{meant}")
    for path in chosen:
        both = [decided[name].get(path) for name in ("scale_pattern", "alpha_pattern")]
        if all(both):
            faults.append(f"{path}: scale_pattern {both[0]!r} and alpha_pattern {both[1]!r} both set its scale")
    raise_faults(sorted(faults), f"The adapter's modules: {', '.join(_names(chosen))}.")


def check_side(config: AdapterConfig, embeddings: list[str]) -> None:
    """Refuse ``embedding_side`` if none of a model's ``embeddings`` is trained. Raises: AdapterError."""
    if config.embedding_side != "both" and not embeddings:
        raise AdapterError(
            f"embedding_side {config.embedding_side!r} has no effect: no embedding or head is trained",
            "Leave it out, or name the embedding in keys or modules_to_save, such as embed_tokens.",
        )


def _near(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module name, or last part of one, whose spelling is closest to ``name``."""
    names = _names(modules)
    found = difflib.get_close_matches(name, [*names, *(n.rpartition(".")[2] for n in names)], n=1)
    return found[0] if found else None


def select_named(model: nn.Module, names: dict[str, Any]) -> dict[str, Any]:
    """``names`` with complete paths as keys; a key may be the end of one or several paths.

    Raises: AdapterError: a name matches nothing.
    """
    modules = bare_modules(model)
    found, faults = {}, []
    for name, value in names.items():
        paths = [path for path in modules if path and (path == name or path.endswith("." + name))]
        if not paths:
            leaves = sorted({path.rpartition(".")[2] for path in modules if path})
            near = difflib.get_close_matches(name, [*modules, *leaves], n=1)
            faults.append(f"the model has no module {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        found |= dict.fromkeys(paths, value)
    hint = f"The model has: {', '.join(_names({p: m for p, m in modules.items() if p and not m.children()}))}."
    if "lm_head" in names:
        hint = "An output head that shares the embedding's weight is not a module: name the embedding. " + hint
    raise_faults(faults, hint)
    return found


# PEFT's parameter names of experts -> mlx-lm's module names in the same block.
_EXPERT_PARAMETERS = {
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "down_proj": ("down_proj",),
}


def _parameters(name: str, modules: dict[str, nn.Module]) -> set[str]:
    """Paths of the modules with the parameter called ``name`` in PEFT's ``target_parameters``.

    Such as ``mlp.experts.gate_up_proj``, a router's ``mlp.gate.weight``, or any ``<module>.weight``.
    """
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return {p for p in modules if p == stem or p.endswith("." + stem)}
    block = stem.removesuffix("experts").removesuffix(".")
    suffix = f".{block}" if block else ""
    found = set()
    for path, module in modules.items():
        parent, _, own = path.rpartition(".")
        above = parent.rpartition(".")[0]
        in_block = f".{above}".endswith(suffix) or f".{parent}".endswith(suffix)
        if in_block and kind(module) == "switch" and own in _EXPERT_PARAMETERS.get(leaf, (leaf,)):
            found.add(path)
    return found


def _refuse_own_adapters(model: nn.Module, chosen: tuple[str, ...]) -> None:
    """Refuse layers with an adapter class of their own (afm7's, which split their output) instead of skipping them."""
    own = {p: m for p, m in bare_modules(model).items() if hasattr(m, "to_lora") and p.startswith(chosen)}
    raise_faults(
        [f"{path}: {type(module).__name__} cannot be adapted" for path, module in own.items()],
        "Name the modules to adapt with --keys.",
    )


def _matches(key: str, modules: dict[str, nn.Module], model: nn.Module) -> set[str]:
    if key == ALL_LINEAR:
        skip = routers(model)
        return {
            p for p, m in modules.items() if split_layer(p)[0] is not None and kind(m) != "embedding" and p not in skip
        }
    exact = {p for p in modules if p == key or p.endswith("." + key)}
    if exact:
        return exact
    try:
        pattern = re.compile(key)
    except re.error:
        return set()
    return {p for p in modules if pattern.fullmatch(p)}


def _no_match(key: str, matches: set[str], modules: dict[str, nn.Module], where: str) -> str:
    if matches:
        return f"key {key!r} matches only outside {where}" + (" (num_layers)" if "last" in where else "")
    near = _near(key, modules)
    return f"key {key!r} matches no module" + (f"; did you mean {near!r}?" if near else "")


def _names(modules: dict[str, nn.Module]) -> list[str]:
    """Paths relative to a layer, without repetitions."""
    return list(dict.fromkeys(split_layer(path)[1] for path in modules))
