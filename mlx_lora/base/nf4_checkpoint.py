"""Models with NF4 layers: quantizing them, and reading and writing bitsandbytes checkpoints.

transformers with bitsandbytes loads the folders written here, and this module loads theirs. mlx-lm's own loader refuses
them, because it does not know their arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ModelError
from .nf4_linear import STATE, NF4Linear, read_checkpoint

_FIX = "Download it again, or quantize the original with mlx-lora quantize --mode nf4."


def check_bitsandbytes(name: Any, config: dict[str, Any]) -> None:
    """Refuse bitsandbytes checkpoints in other types than NF4 (FP4, LLM.int8). Raises: ModelError."""
    section = config.get("quantization_config") or {}
    if section.get("quant_method") != "bitsandbytes":
        return
    kind = section.get("bnb_4bit_quant_type", "fp4") if section.get("load_in_4bit") else "LLM.int8"
    if kind != "nf4":
        raise ModelError(
            f"{name}: its weights are in bitsandbytes' {kind}, which mlx-lora does not read",
            "Use the unquantized model, and quantize it with mlx-lora quantize.",
        )


def replace_with_nf4(model: nn.Module, weights: list[tuple[str, mx.array]] | Any) -> Any:
    """Replace linears of ``model`` by the NF4 layers in ``weights``; return the weights under the new layers' names."""
    if not isinstance(weights, list):
        return weights
    arrays = dict(weights)
    paths = [name.removesuffix("." + STATE) for name in arrays if name.endswith("." + STATE)]
    modules, layers = dict(model.named_modules()), {}
    for path in paths:
        if not isinstance(modules.get(path), nn.Linear):
            raise ModelError(f"{path}: NF4 weights, but the model has no linear layer there", _FIX)
        own = [name for name in arrays if name == f"{path}.weight" or name.startswith(f"{path}.weight.")]
        bias = arrays.pop(f"{path}.bias", None)
        layers[path] = read_checkpoint(path, {name[len(path) + 1 :]: arrays.pop(name) for name in own}, bias)
        if layers[path].unpacked_shape != modules[path].weight.shape:
            raise ModelError(
                f"{path}: NF4 weights of shape {list(layers[path].unpacked_shape)}, "
                f"the model's are {list(modules[path].weight.shape)}",
                _FIX,
            )
    if layers:
        model.update_modules(tree_unflatten(list(layers.items())))
        arrays |= {
            f"{path}.{name}": a for path, layer in layers.items() for name, a in tree_flatten(layer.parameters())
        }
    return list(arrays.items())


class CheckpointView:
    """Presents ``model`` to mlx-lm's ``save_model`` with NF4 arrays under bitsandbytes' names."""

    def __init__(self, model: nn.Module):
        self._model = model

    def parameters(self) -> dict[str, mx.array]:
        arrays = dict(tree_flatten(self._model.parameters()))
        for path, module in self._model.named_modules():
            if isinstance(module, NF4Linear):
                for name, _ in tree_flatten(module.parameters()):
                    del arrays[f"{path}.{name}"]
                arrays |= {f"{path}.{name}": array for name, array in module.checkpoint().items()}
        return arrays

    def leaf_modules(self) -> Any:
        return self._model.leaf_modules()


def nf4_config(model: nn.Module, layers: dict[str, NF4Linear]) -> dict[str, Any]:
    """The ``quantization_config`` that transformers reads. It lists the linears that are not quantized."""
    first = next(iter(layers.values()))
    dense = [p for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": "nested_absmax" in first,
        "bnb_4bit_compute_dtype": str(first.dtype).rpartition(".")[2],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(dense) or None,
    }


def quantize_to_nf4(model: nn.Module, double: bool, block: int, keep: Callable[[str], bool]) -> list[str]:
    """Replace the dense linears of ``model`` by NF4 layers, except where ``keep(path)``. Returns the replaced paths."""
    paths = []
    for path, module in reversed(model.named_modules()):
        if type(module) is nn.Linear and not keep(path):
            layer = NF4Linear.from_linear(module, double, block)
            mx.eval(layer.parameters())
            model.update_modules(tree_unflatten([(path, layer)]))
            paths.append(path)
    return paths
