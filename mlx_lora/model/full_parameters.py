"""Training full parameters: modules_to_save and biases together with an adapter, or layers with "full".

A quantized module whose weight is trained is replaced by a dense one; ``State`` keeps the original.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapter import split_layer
from ..base.modules import base_dtype, dense_weight, is_quantized, kind, layer_paths, model_dtype
from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError
from .compatibility import own_parameters
from .state import State, bare_modules, place, wrappers
from .targets import select_named


def modules_to_save(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules that ``config.modules_to_save`` names, and of all modules in them that have parameters."""
    named = select_named(model, dict.fromkeys(config.modules_to_save or ()))
    bare = bare_modules(model)
    inside = [p for p in bare if any(p == name or p.startswith(name + ".") for name in named)]
    return [path for path in inside if own_parameters(bare[path])]


def trained_biases(bare: dict[str, nn.Module], config: AdapterConfig, adapted: list[str]) -> list[str]:
    """Paths of the modules whose bias is trained. Raises: AdapterError: ``config.bias`` matches no bias."""
    paths = {"none": [], "all": list(bare), "lora_only": adapted}[config.bias]
    found = [path for path in paths if isinstance(bare[path].get("bias"), mx.array)]
    if config.bias != "none" and not found:
        where = "the model has" if config.bias == "all" else "the adapted layers have"
        others = dict.fromkeys(split_layer(path)[1] for path, module in bare.items() if "bias" in module)
        hint = f"Name modules that have one with keys: {', '.join(others)}." if others else "Leave bias out."
        raise AdapterError(f"bias {config.bias!r}: {where} no biases to train", hint)
    return found


def train_full_parameters(
    model: nn.Module, state: State, names: list[tuple[str, str]], values: dict[tuple[str, str], mx.array] | None = None
) -> None:
    """Make the parameters ``names`` (module path, name) trainable, and set them to ``values`` if given.

    ``state`` receives the original arrays and modules.
    """
    bare, layers = bare_modules(model), wrappers(model)
    for path in dict.fromkeys(path for path, leaf in names if leaf == "weight"):
        base = bare[path]
        if is_quantized(base):
            weight = dense_weight(base, base_dtype(base) or model_dtype(model))
            made = dense_module(base, weight, weight.dtype)
            made.train(model.training)
            state.original_modules[path], bare[path] = base, made.freeze()
            if path in layers:  # the module has an adapter as well: the replacement becomes its base
                layers[path][layers[path].slot] = made
            else:
                place(model, {path: made})
    for path, leaf in names:
        module = bare[path]
        if path not in state.original_modules:
            remember_original(state, module, leaf)
        if values is not None:
            module[leaf] = values[path, leaf].astype(module[leaf].dtype)
        module.unfreeze(recurse=False, keys=leaf)
    state.full_parameters = list(names)


def remember_original(state: State, module: nn.Module, leaf: str) -> None:
    """Store a parameter in ``state``, and give the module another array object with the same data.

    In-place operations on the trained parameter then do not change the original.
    """
    original = module[leaf]
    state.original_arrays.append((module, leaf, original))
    module[leaf] = original.astype(original.dtype)


def dense_module(base: nn.Module, weight: mx.array, dtype: mx.Dtype) -> nn.Module:
    """A dense layer of ``base``'s kind with ``weight`` and ``base``'s bias, frozen."""
    made = _new_dense(kind(base)) if is_quantized(base) else copy.copy(base)
    made.weight = weight.astype(dtype)
    if "bias" in base:
        made.bias = base.bias
    return made.freeze()


def _new_dense(which: str) -> nn.Module:
    """A layer without arrays. Its ``__init__`` is not called: that would draw from ``mx.random``."""
    if which == "switch":
        from mlx_lm.models.switch_layers import SwitchLinear as layer
    else:
        layer = nn.Embedding if which == "embedding" else nn.Linear
    made = layer.__new__(layer)
    nn.Module.__init__(made)
    return made


def unfreeze_layers(model: nn.Module, config: AdapterConfig, state: State) -> list[str]:
    """Make the last ``num_layers`` layers trainable, and nothing else. Returns their paths.

    Raises: ConfigError: a layer that cannot be trained, or more layers than there are.
    """
    paths = layer_paths(model)
    paths = paths[-config.last_layers(len(paths)) :]
    modules = dict(model.named_modules())
    if any(is_quantized(m) for path in paths for m in modules[path].modules()):
        raise ConfigError(
            "full fine-tuning cannot train quantized layers", "Use lora or dora, or a model that is not quantized."
        )
    model.freeze()
    for path in paths:
        modules[path].unfreeze()
    names = [tuple(name.rpartition(".")[::2]) for name, _ in tree_flatten(model.trainable_parameters())]
    if nested := [f"{path}.{leaf}" for path, leaf in names if path not in modules]:
        raise ConfigError(
            f"{', '.join(nested[:3])}: parameters in lists cannot be trained", "Use lora or dora for this model."
        )
    train_full_parameters(model, state, names)
    return paths
