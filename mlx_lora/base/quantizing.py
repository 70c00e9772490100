"""Quantizing a model in MLX's modes or NF4, and reporting size and error."""

from __future__ import annotations

import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, ModelError
from .modules import dense_weight, has_adapters, is_quantized, kind, layer_paths, total_bytes, unique
from .nf4_checkpoint import quantize_to_nf4
from .origin import base_of

# Mode -> (allowed bits, allowed group sizes, default pair).
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128), (4, 64)),
    "mxfp4": ((4,), (32,), (4, 32)),
    "mxfp8": ((8,), (32,), (8, 32)),
    "nvfp4": ((4,), (16,), (4, 16)),
    "nf4": ((4,), (32, 64, 128, 256, 512, 1024, 2048, 4096), (4, 64)),
}


@dataclass(frozen=True)
class Quantized:
    """The result of quantizing a model."""

    mode: str
    layers: int  # number of quantized layers
    kept: list[str]  # paths of the layers that stayed floats
    bits_per_weight: float  # of the quantized layers' weights, including scales, excluding constant tables
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

    MLX's modes quantize the same layers as mlx-lm's ``convert``, embeddings and experts included. NF4 quantizes the
    linears inside the transformer layers, as bitsandbytes does; embeddings and the output head stay floats.

    Args:
        mode: one of ``MODES``.
        bits, group_size: the mode's default if None.
        double_quant: NF4: store the scales in 8 bits, too (4.127 instead of 4.5 bits per weight).

    Raises:
        ConfigError: a setting that the mode does not have.
        ModelError: the model is already quantized, has adapters, or (nf4) has experts.
    """
    bits, group_size = check_mode(mode, bits, group_size, double_quant)
    before = check_model(model, mode)
    if mode == "nf4":
        inside = tuple(f"{path}." for path in layer_paths(model))
        quantize_to_nf4(model, double_quant, group_size, keep=lambda path: not path.startswith(inside))
    else:
        from mlx_lm.utils import quantize_model

        base = base_of(model)
        config = dict(base.config) if base else {}
        with redirect_stdout(StringIO()):  # quantize_model prints a line
            quantize_model(model, config, group_size, bits, mode=mode)
    return _report(model, mode, before)


def check_mode(mode: str, bits: int | None, group_size: int | None, double_quant: bool) -> tuple[int, int]:
    """(bits, group size) for ``mode``. Raises: ConfigError: lists everything that is wrong."""
    if mode not in MODES:
        raise ConfigError(
            f"mode must be one of {', '.join(MODES)}, not {mode!r}",
            "Leave it out for affine, which mlx-lm loads. nf4 is QLoRA's type, which transformers loads.",
        )
    widths, groups, (default_bits, default_group) = MODES[mode]
    faults = {}  # with their hints
    for name, value, choices in (("bits", bits, widths), ("group_size", group_size, groups)):
        if value is not None and value not in choices:
            near = sorted(sorted(choices, key=lambda choice, value=value: abs(choice - value))[:2])
            hint = f"Choose {name} {' or '.join(map(str, near))}." if len(choices) > 1 else f"Leave {name} out."
            faults[f"{name} of {mode} can be {', '.join(map(str, choices))}, not {value}"] = hint
    if double_quant and mode != "nf4":
        faults[f"double quantization is for nf4, not for {mode}"] = "Leave it out, or choose the mode nf4."
    if faults:
        raise ConfigError("\n".join(faults), "\n".join(faults.values()))
    return bits or default_bits, group_size or default_group


def check_model(model: nn.Module, mode: str) -> dict[str, nn.Module]:
    """The layers that could be quantized, by path. Raises: ModelError: the model cannot be quantized."""
    if has_adapters(model):
        raise ModelError("the model has adapters", "Merge them with fuse(model), or call unmount(model).")
    if any(is_quantized(module) for module in model.modules()):
        raise ModelError(
            "the model is quantized already", "Quantize the original model: quantizing twice loses more precision."
        )
    layers = {path: module for path, module in model.named_modules() if kind(module)}
    experts = [path for path, module in layers.items() if kind(module) == "switch"]
    if mode == "nf4" and experts:
        raise ModelError(f"{experts[-1]}: NF4 is for linear layers, not for experts", "Use affine, mxfp4 or nvfp4.")
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
    everything = total_bytes(model)
    dense = unique(module for path, module in modules.items() if path not in packed)
    floats = sum(array.size for module in dense for array in module.values() if isinstance(array, mx.array))
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
