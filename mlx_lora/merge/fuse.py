"""Merging an adapter into the weights, and measuring how much of the update survives rounding.

Storing a merged weight rounds it. 4-bit steps are larger than most updates, so requantizing to 4 bits returns the base
model without the adapter. The loss is measured for every layer in float32: with the update D = W' - W and the stored
update D', cosine(D, D') and ||D' - D|| / ||D||.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..base.loading import DTYPES, check_dtype
from ..base.modules import base_dtype, dense_weight, is_quantized, kind, model_dtype
from ..base.nf4_linear import NF4Linear
from ..base.origin import checked
from ..errors import AdapterError, ConfigError
from ..fast import accelerate, undo
from ..layers import AdapterLayer, TokenRows
from ..model.full_parameters import dense_module
from ..model.state import (
    HEAD,
    bare_modules,
    discard_state,
    join_head,
    mark_changed,
    place,
    refuse_biases,
    split_of,
    state_of,
    wrappers,
)
from .untie import untie

# Bounds within which the update counts as kept; otherwise the layer is stored with more bits.
SURVIVES_COSINE, SURVIVES_ERROR = 0.99, 0.1


@dataclass(frozen=True)
class FusedLayer:
    """How well one layer's update was stored."""

    path: str
    storage: str  # such as "8-bit" or "bfloat16"
    cosine: float  # between stored and exact update; 1 is best
    relative_error: float  # norm of their difference / norm of the exact update; 0 is best
    update_norm: float  # norm of the exact update / norm of the base weight

    @property
    def survives(self) -> bool:
        return self.update_norm == 0 or (self.cosine >= SURVIVES_COSINE and self.relative_error <= SURVIVES_ERROR)


def fuse(
    model: nn.Module,
    *,
    bits: int | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
) -> list[FusedLayer]:
    """Merge the adapter on ``model`` into its weights, in place.

    Args:
        bits: bits of the adapted layers of a quantized base. By default a layer is stored at 8 bits if its update
            survives that, otherwise as floats. Fewer than 8 bits lose the adapter and need ``force``.
        dtype: dtype of layers stored as floats; the model's own by default.
        dequantize: store all quantized layers of the model as floats, including layers without an adapter.
        force: allow ``bits`` below 8.

    Returns: a report for each adapted layer; ``survives`` is True if the stored weight contains its update.

    Raises: ConfigError: the arguments contradict each other or do not suit the model.
    """
    checked(model)
    check_options(bits, dtype, dequantize, force)
    floats = DTYPES[dtype] if dtype else None
    default = model_dtype(model)
    adapted = wrappers(model)
    if not adapted and state_of(model) is None and not dequantize:
        raise AdapterError(
            "the model has no adapter to merge",
            "Mount one first. Inside disable_adapter there is none: call fuse after it.",
        )
    if bits is not None and not adapted:
        raise ConfigError("bits is for adapted layers, and this adapter has none", "Leave bits out.")
    if bits is not None and adapted and not any(is_quantized(layer.base) for layer in adapted.values()):
        raise ConfigError("bits applies to quantized bases; this one is not", "Fuse first, then quantize the model.")
    _untie(model)
    adapted, reports, new, biases = wrappers(model), [], {}, _new_biases(model)
    for path, layer in adapted.items():
        target = floats or base_dtype(layer.base) or default
        new[path], report = fuse_layer(path, layer, target, bits, dequantize or floats is not None)
        reports.append(report)
    for path, module in bare_modules(model).items():
        if path in adapted:
            continue
        if dequantize and is_quantized(module) and kind(module):
            new[path] = dense_module(module, dense_weight(module), floats or base_dtype(module) or default)
    place(model, new)
    if (state := discard_state(model)) is not None:
        undo([module for module in state.accelerated if not kind(module)])  # classes for modules with adapters
    mark_changed(model, biases)
    accelerate(model)
    model.eval()
    mx.eval(model.parameters())
    return reports


def check_options(bits: int | None, dtype: str | None, dequantize: bool, force: bool = True) -> None:
    """Refuse arguments of ``fuse`` that are invalid or contradict each other. Raises: ConfigError."""
    if bits is not None and (isinstance(bits, bool) or bits not in (2, 3, 4, 5, 6, 8)):
        raise ConfigError(
            f"bits must be one of 2, 3, 4, 5, 6, 8, not {bits!r}",
            "Leave bits out: each layer is then stored at 8 bits if its update survives that, otherwise as floats.",
        )
    for name, value in (("dequantize", dequantize), ("dtype", dtype)):
        if bits is not None and value:
            raise ConfigError(f"bits and {name} contradict each other: {name} stores floats", "Choose one.")
    if bits is not None and bits < 8 and not force:
        raise ConfigError(
            f"storing merged weights at {bits} bits loses most of the adapter",
            "Leave --bits out, keep the adapter separate, or add --force and check the report.",
        )
    check_dtype(dtype)


def check_biases(model: nn.Module) -> None:
    """Refuse an adapter with biases (``lora_bias``) if the model's layers have none: a model folder cannot hold them.

    ``fuse`` still merges them in memory. Raises: AdapterError.
    """
    refuse_biases(_new_biases(model))


def _new_biases(model: nn.Module) -> list[str]:
    return [p for p, layer in wrappers(model).items() if "lora_bias" in layer and "bias" not in layer.base]


def fuse_layer(
    path: str, layer: AdapterLayer | TokenRows, dtype: mx.Dtype, bits: int | None, as_floats: bool
) -> tuple[nn.Module, FusedLayer]:
    """The base layer of ``layer`` with the update merged, and how well it was stored. Arguments as for ``fuse``."""
    base = layer.base
    before = dense_weight(base)
    merged = layer.merged_weight(before)
    mx.eval(before, merged)
    choices = []
    if is_quantized(base) and not as_floats:
        choices = [_quantized_module(layer, merged, dtype, bits or 8)]
        choices = [module for module in choices if module is not None]
    if bits is None or not choices:
        choices.append(None)  # floats; computed only if needed
    for module in choices:
        module = module if module is not None else _merged_module(layer, merged, dtype)
        report = _measure(path, module, before, merged)
        if report.survives:
            break
    mx.eval(module.parameters())
    return module, report


def _measure(path: str, module: nn.Module, before: mx.array, merged: mx.array) -> FusedLayer:
    exact, kept = merged - before, dense_weight(module) - before
    norm, kept_norm = mx.linalg.norm(exact.flatten()), mx.linalg.norm(kept.flatten())
    size = norm.item()
    cosine = ((exact * kept).sum() / mx.maximum(norm * kept_norm, 1e-30)).item() if size else 1.0
    error = (mx.linalg.norm((kept - exact).flatten()) / norm).item() if size else 0.0
    storage = f"{module.bits}-bit" if is_quantized(module) else str(module.weight.dtype).rpartition(".")[2]
    relative = size / max(mx.linalg.norm(before.flatten()).item(), 1e-30)
    return FusedLayer(path, storage, cosine, error, relative)


def _merged_module(layer: AdapterLayer | TokenRows, weight: mx.array, dtype: mx.Dtype) -> nn.Module:
    """A dense layer with the merged ``weight`` and bias."""
    made = dense_module(layer.base, weight, dtype)
    bias = layer.merged_bias() if isinstance(layer, AdapterLayer) else None
    if bias is not None:
        made.bias = bias.astype(dtype if "bias" not in layer.base else layer.base.bias.dtype)
        made.freeze()
    return made


def _quantized_module(
    layer: AdapterLayer | TokenRows, weight: mx.array, dtype: mx.Dtype, bits: int
) -> nn.Module | None:
    """``weight`` quantized to ``bits``, in the base's mode if it has this many bits, otherwise in affine mode.

    None if the row size is not a multiple of the group size (NF4's blocks may span rows, MLX's groups may not).
    """
    base = layer.base
    if isinstance(base, NF4Linear) and bits == base.bits:
        return NF4Linear.from_linear(_merged_module(layer, weight, dtype), "nested_absmax" in base, base.group_size)
    same = bits == base.bits
    mode = base.mode if same else "affine"
    group = base.group_size if same or base.mode == "affine" else 32
    if weight.shape[-1] % group:
        return None
    made = _merged_module(layer, weight, dtype).to_quantized(group_size=group, bits=bits, mode=mode)
    made.freeze()
    return made


def _untie(model: nn.Module) -> None:
    """Join a split embedding again or, if it and the head were trained separately, give the model its own head.

    Raises: ConfigError: the model's class cannot have its own head.
    """
    split = split_of(model)
    if split is None:
        return
    (path, module), bare = split, bare_modules(model)
    apart = {path, HEAD} & wrappers(model).keys() or bare[path].weight is not bare[HEAD].weight
    if apart and not untie(model, module.lm_head):
        raise ConfigError(
            f"{path}, {HEAD}: the adapter changes the embedding and the output head differently, and "
            f"{type(model).__module__.rpartition('.')[2]} models have one matrix for both in mlx-lm",
            "Keep the adapter separate: generate, chat and serve use it unmerged.",
        )
    join_head(model)
