"""Whole parameters that are trained: modules_to_save and biases beside an adapter, all of a layer under "full".

A quantized module that is trained whole gets a dense one in its place; ``State`` remembers what was there.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..base.modules import base_dtype, dense_weight, is_quantized, kind, layer_paths, model_dtype
from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError
from ..layers import UntiedEmbedding
from .compatibility import own_arrays
from .state import State, bare_modules, set_state, wrappers
from .targets import select_named


def whole_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names and of everything in them that holds parameters."""
    named = select_named(model, dict.fromkeys(config.modules_to_save or ()))
    modules = dict(model.named_modules())
    inside = [p for p in modules if any(p == name or p.startswith(name + ".") for name in named)]
    return [path for path in reversed(inside) if own_arrays(modules[path])]


def biased(bare: dict[str, nn.Module], config: AdapterConfig, adapted: list[str]) -> list[str]:
    """Paths of the modules whose bias is trained."""
    paths = {"none": [], "all": list(reversed(bare)), "lora_only": adapted}[config.bias]
    found = [path for path in paths if isinstance(bare[path].get("bias"), mx.array)]
    if config.bias != "none" and not found:
        where = "the model has" if config.bias == "all" else "the adapted layers have"
        raise AdapterError(
            f"bias {config.bias!r}: {where} none to train",
            "Leave bias out; an update gets a bias of its own by lora_bias.",
        )
    return found


def make_whole(
    model: nn.Module, state: State, names: list[tuple[str, str]], values: dict[tuple[str, str], mx.array] | None = None
) -> None:
    """Make these parameters trainable, with ``values`` in place of their own; remember in ``state`` what they were."""
    bare = bare_modules(model)
    for path in dict.fromkeys(path for path, leaf in names if leaf == "weight"):
        base = bare[path]
        one_sided = state.config.embedding_side == "input" and kind(base) == "embedding"
        if one_sided or is_quantized(base):
            weight = dense_weight(base, base_dtype(base) or model_dtype(model))
            made = UntiedEmbedding(base, weight) if one_sided else dense_module(base, weight, weight.dtype)
            made.train(model.training)
            state.modules[path], bare[path] = base, made.freeze()
            if (layer := wrappers(model).get(path)) is not None:  # adapted as well: below the adapter
                layer[layer.slot] = made
            else:
                model.update_modules(tree_unflatten([(path, made)]))
    for path, leaf in names:
        module = bare[path]
        if path not in state.modules:
            state.arrays[path, leaf] = module[leaf]
        if values is not None:
            module[leaf] = values[path, leaf].astype(module[leaf].dtype)
        module.unfreeze(recurse=False, keys=leaf)
    state.whole = list(names)
    set_state(model, state)


def dense_module(base: nn.Module, weight: mx.array, dtype: mx.Dtype) -> nn.Module:
    """A plain layer of ``base``'s kind with ``weight`` and ``base``'s bias, frozen."""
    which = kind(base)
    if not is_quantized(base):
        made = copy.copy(base)
    elif which == "linear":
        made = nn.Linear(1, 1, bias=False)
    elif which == "embedding":
        made = nn.Embedding(1, 1)
    else:
        from mlx_lm.models.switch_layers import SwitchLinear

        made = SwitchLinear(1, 1, 1, bias=False)
    made.weight = weight.astype(dtype)
    if "bias" in base:
        made.bias = base.bias
    made.freeze()
    return made


def unfreeze_layers(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Make the last ``num_layers`` layers trainable themselves, and nothing else; their paths.

    Raises: ConfigError: settings that choose less than layers; a quantized layer.
    """
    if config.keys is not None or config.rank_pattern or config.scale_pattern or config.alpha_pattern:
        raise ConfigError("full fine-tuning trains whole layers: keys and patterns do not apply", "Use --num-layers.")
    paths = layer_paths(model)
    paths = paths[-config.num_layers :] if config.num_layers > 0 else paths
    modules = dict(model.named_modules())
    if any(is_quantized(m) for path in paths for m in modules[path].modules()):
        raise ConfigError(
            "full fine-tuning cannot train quantized layers", "Use lora or dora, or a model that is not quantized."
        )
    model.freeze()
    for path in paths:
        modules[path].unfreeze()
    return paths
