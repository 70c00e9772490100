"""Quantizing a whole model: MLX's own modes and NF4, and what it costs a parameter."""

from __future__ import annotations

import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .adapter import Adapter
from .config import AdapterConfig
from .errors import ConfigError, ModelError
from .initialisation import loftq_pair
from .layers import check_rank, dense_weight, is_quantized, kind, use_blas
from .model import adapters_on
from .mounted import base_of
from .quant import dequantize_nf4, quantize_nf4
from .quant.model import quantize_to_nf4
from .selection import layer_paths, select

# Mode -> (bits it comes in, group sizes, the default pair).
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128), (4, 64)),
    "mxfp4": ((4,), (32,), (4, 32)),
    "mxfp8": ((8,), (32,), (8, 32)),
    "nvfp4": ((4,), (16,), (4, 16)),
    "nf4": ((4,), (32, 64, 128, 256, 512, 1024, 2048, 4096), (4, 64)),
}


@dataclass(frozen=True)
class Quantized:
    """What became of a model."""

    mode: str
    layers: int  # quantized
    kept: list[str]  # paths of the layers that stayed floats
    bits_per_weight: float  # of the quantized layers' weights, scales included, constant tables not
    bits_per_parameter: float  # of the whole model
    bytes: int  # of the whole model
    error: float  # relative: |W - Q| / |W| over all quantized weights


def quantize(
    model: nn.Module,
    mode: str = "affine",
    *,
    bits: int | None = None,
    group_size: int | None = None,
    double_quant: bool = False,
) -> Quantized:
    """Quantize ``model`` in place.

    MLX's modes take the layers that mlx-lm's ``convert`` takes, embeddings and experts included. NF4 takes the linears
    inside the layers, as bitsandbytes does: embeddings and the head stay floats.

    Args:
        mode: one of ``MODES``.
        bits, group_size: the mode's own by default.
        double_quant: NF4: store the scales in 8 bits, too (4.127 bits a weight in place of 4.5).

    Raises: ConfigError: settings; ModelError: a model that is quantized already, has adapters, or holds experts (nf4).
    """
    bits, group_size = check_mode(mode, bits, group_size, double_quant)
    before = _check_model(model, mode)
    if mode == "nf4":
        inside = tuple(f"{path}." for path in layer_paths(model))
        quantize_to_nf4(model, double_quant, group_size, keep=lambda path: not path.startswith(inside))
    else:
        from mlx_lm.utils import quantize_model

        base = base_of(model)
        config = dict(base.config) if base else {}
        with redirect_stdout(StringIO()):  # it prints a line
            quantize_model(model, config, group_size, bits, mode=mode)
    report = _report(model, mode, before)
    use_blas(model)
    return report


def quantize_with_loftq(
    model: nn.Module,
    rank: int,
    iterations: int = 1,
    *,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    double_quant: bool = False,
) -> tuple[Quantized, Adapter]:
    """``quantize``, and a LoftQ adapter (scale 1) over the linears and experts of all layers that goes with the result.

    Args:
        rank: of the adapter.
        iterations: rounds of quantizing and fitting; with more than one the weights quantized are not ``model``'s own.

    Raises: as ``quantize``.
    """
    bits, group_size = check_mode(mode, bits, group_size, double_quant)
    if rank < 1 or iterations < 1:
        raise ConfigError(
            "LoftQ wants a rank and a number of rounds of at least 1",
            "Give a rank such as 16, and 1 to 5 rounds: each fits the adapter to what the last one left.",
        )
    _check_model(model, mode)

    def through(weight: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
        exact = mx.array(weight).astype(dtype)
        if mode == "nf4":
            return np.array(dequantize_nf4(quantize_nf4(exact, double_quant, group_size)))
        settings = dict(group_size=group_size, bits=bits, mode=mode)
        packed = mx.quantize(exact, **settings)
        return np.array(mx.dequantize(*packed, **settings, dtype=mx.float32))

    config = AdapterConfig(rank=rank, scale=1.0, num_layers=-1)
    weights = {}
    for path, module in select(model, config).items():
        check_rank(module, rank)
        weight, dtype = np.array(dense_weight(module)), module.weight.dtype
        if mode != "nf4" and weight.shape[-1] % group_size:  # stays as it is: a start as of any LoRA
            bound = 1 / math.sqrt(weight.shape[-1])
            a = np.array(mx.random.uniform(-bound, bound, (*weight.shape[:-2], rank, weight.shape[-1])))
            b = np.zeros((*weight.shape[:-1], rank), np.float32)
        else:
            (a, b), target = loftq_pair(weight, lambda w, dtype=dtype: through(w, dtype), rank, 1.0, iterations)
            module.weight = mx.array(target).astype(dtype)
        if a.ndim == 2:
            a, b = a.T, b.T
        weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = (mx.array(np.ascontiguousarray(x)) for x in (a, b))
    report = quantize(model, mode, bits=bits, group_size=group_size, double_quant=double_quant)
    return report, Adapter(config, weights).check()


def check_mode(mode: str, bits: int | None, group_size: int | None, double_quant: bool) -> tuple[int, int]:
    """(bits, group size) for ``mode``, or one error with all that is wrong."""
    if mode not in MODES:
        raise ConfigError(
            f"mode must be one of {', '.join(MODES)}, not {mode!r}",
            "Leave it out for affine, which mlx-lm loads; nf4 is QLoRA's, which transformers loads.",
        )
    widths, groups, (default_bits, default_group) = MODES[mode]
    faults = []
    if bits is not None and bits not in widths:
        faults.append(f"{mode} comes in {' or '.join(map(str, widths))} bits, not in {bits}")
    if group_size is not None and group_size not in groups:
        faults.append(f"{mode} comes in groups of {' or '.join(map(str, groups))}, not of {group_size}")
    if double_quant and mode != "nf4":
        faults.append(f"double quantization is for nf4, not for {mode}")
    if faults:
        raise ConfigError(
            "\n".join(faults),
            f"Leave them out: {mode} takes {default_bits} bits in groups of {default_group} by default.",
        )
    return bits or default_bits, group_size or default_group


def _check_model(model: nn.Module, mode: str) -> dict[str, nn.Module]:
    """The layers that could be quantized, by path; refuses a model that cannot be."""
    if adapters_on(model):
        raise ModelError("the model has adapters on it", "Merge them with fuse(model), or take them off.")
    if any(is_quantized(module) for module in model.modules()):
        raise ModelError(
            "the model is quantized already", "Quantize the original: each time some of the weights is lost."
        )
    layers = {path: module for path, module in model.named_modules() if kind(module)}
    experts = [path for path, module in layers.items() if kind(module) == "switch"]
    if mode == "nf4" and experts:
        raise ModelError(
            f"{experts[-1]}: NF4 is for linear layers, not for stacks of experts", "Use affine, mxfp4 or nvfp4."
        )
    return layers


def _report(model: nn.Module, mode: str, before: dict[str, nn.Module]) -> Quantized:
    modules = dict(model.named_modules())
    packed = {path: modules[path] for path in before if is_quantized(modules[path])}
    weights = stored = lost = total = 0.0
    for path, module in packed.items():
        exact = dense_weight(before[path])
        difference = (exact - dense_weight(module)).square().sum()
        lost, total = lost + difference.item(), total + exact.square().sum().item()
        weights += exact.size
        own = {name: array for name, array in module.items() if isinstance(array, mx.array)}
        stored += sum(array.nbytes for name, array in own.items() if name not in ("bias", "nested_map"))
    everything = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    floats = sum(a.size for p, m in modules.items() if p not in packed for a in m.values() if isinstance(a, mx.array))
    biases = sum(module.bias.size for module in packed.values() if "bias" in module)
    if not packed:
        raise ModelError(
            "no layer of the model could be quantized",
            "Choose a group size that divides the widths of its layers, such as 32.",
        )
    return Quantized(
        mode=mode,
        layers=len(packed),
        kept=sorted(path for path in before if path not in packed),
        bits_per_weight=8 * stored / weights,
        bits_per_parameter=8 * everything / (weights + floats + biases),
        bytes=everything,
        error=math.sqrt(lost / total) if total else 0.0,
    )
