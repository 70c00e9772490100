"""Adapter methods over a frozen base layer, and the table of them.

A new method is a file here and a row of ``METHODS``: {kind of base: layer class}. The table is read by the rooms above,
never by its own rows. ``make_layers`` turns a config's settings into layers.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import AdapterConfig
from ..errors import AdapterError
from ..kernels import enabled
from .base import AdapterLayer, base_dtype, check_rank, dense_weight, dims, is_quantized, kind
from .cpu import use_blas
from .difference import DifferenceLinear, DifferenceSwitchLinear
from .dora import DoRAEmbedding, DoRALinear, DoRASwitchLinear
from .lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from .many import ManyLoRALinear, Rows
from .mlp import fuse_mlps
from .norms import recompute_norms
from .siblings import introduce
from .tokens import TokenRows, UntiedEmbedding
from .variants import ON_INPUT, WITH_BIAS
from .vera import VeRALinear, VeRASwitchLinear, draw_projections, shared_dims

METHODS = {
    "lora": {"linear": LoRALinear, "embedding": LoRAEmbedding, "switch": LoRASwitchLinear},
    "dora": {"linear": DoRALinear, "embedding": DoRAEmbedding, "switch": DoRASwitchLinear},
    "vera": {"linear": VeRALinear, "switch": VeRASwitchLinear},
}
# LoRA from a start that the base must give up.
DIFFERENCES = {"linear": DifferenceLinear, "switch": DifferenceSwitchLinear}


def make_layers(
    bases: dict[str, nn.Module],
    config: AdapterConfig,
    ranks: dict[str, int],
    dtype: mx.Dtype,
    shared: tuple[mx.array, mx.array] | None = None,
    difference: bool = False,
) -> dict[str, AdapterLayer]:
    """Fresh layers over ``bases`` as ``config`` describes them, by path.

    Args:
        ranks: of each layer.
        dtype: of the adapter's arrays where a base's storage does not tell one.
        difference: layers of ``DIFFERENCES``, whose start is to be set.
        shared: VeRA's projections; drawn from ``config.projection_prng_key`` by default.

    Raises: AdapterError: naming every module that the method, or a setting, cannot adapt.
    """
    classes, faults = {}, []
    for path, base in bases.items():
        layer = (DIFFERENCES if difference else METHODS[config.method]).get(kind(base))
        if config.lora_bias:
            layer = WITH_BIAS.get(layer)
        elif config.embedding_side == "input":
            layer = ON_INPUT.get(layer, layer)
        if layer is None:
            what = "lora_bias" if config.lora_bias else f"init {config.init}" if difference else config.method
            faults.append(f"{path}: {what} does not adapt {kind(base)} layers")
        classes[path] = layer
    if faults:
        raise AdapterError("\n".join(faults), "Leave them out: name the modules to adapt with --keys.")
    layers, casts = {}, {}
    if config.method == "vera" and bases and shared is None:
        shared = draw_projections(config.rank, *shared_dims(bases.values()), config.projection_prng_key)
    for path, base in bases.items():
        if enabled() and not is_quantized(base):
            base.weight = mx.contiguous(base.weight)  # GPT-2's are transposed as they are read
        extra = {}
        if shared is not None:
            own = base_dtype(base) or dtype
            pair = casts.setdefault(own, tuple(array.astype(own) for array in shared))  # one copy for all layers
            extra = {"shared": pair, "d_initial": config.d_initial}
        layers[path] = classes[path](base, ranks[path], config.scale_of(path), config.dropout, dtype, **extra)
    return layers


__all__ = [
    "DIFFERENCES",
    "METHODS",
    "AdapterLayer",
    "ManyLoRALinear",
    "Rows",
    "TokenRows",
    "UntiedEmbedding",
    "base_dtype",
    "check_rank",
    "dense_weight",
    "dims",
    "fuse_mlps",
    "introduce",
    "draw_projections",
    "is_quantized",
    "kind",
    "make_layers",
    "recompute_norms",
    "shared_dims",
    "use_blas",
]
