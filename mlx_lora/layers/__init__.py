"""Adapter methods over a frozen base layer, and the table of them.

A new method is a file here and a row of ``METHODS``: {kind of base: layer class}. The table is read by the rooms above,
never by its own rows. ``make_layers`` turns a config's settings into layers.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, kind
from ..config import AdapterConfig
from ..errors import AdapterError
from .base import AdapterLayer, check_rank
from .difference import DifferenceLinear, DifferenceSwitchLinear
from .dora import DoRAEmbedding, DoRALinear, DoRASwitchLinear
from .ia3 import IA3Linear
from .lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from .multi_lora import MultiLoRALinear, Rows
from .tokens import SplitEmbedding, TokenRows, as_head
from .variants import WITH_BIAS
from .vera import Projections, VeRALinear, VeRASwitchLinear

METHODS = {
    "lora": {"linear": LoRALinear, "embedding": LoRAEmbedding, "switch": LoRASwitchLinear},
    "dora": {"linear": DoRALinear, "embedding": DoRAEmbedding, "switch": DoRASwitchLinear},
    "vera": {"linear": VeRALinear, "switch": VeRASwitchLinear},
    "ia3": {"linear": IA3Linear},
}
# LoRA layers that subtract their initial pair in the forward pass.
DIFFERENCES = {"linear": DifferenceLinear, "switch": DifferenceSwitchLinear}


def make_layers(
    bases: dict[str, nn.Module],
    config: AdapterConfig,
    ranks: dict[str, int],
    dtype: mx.Dtype,
    *,
    shared: tuple[mx.array, mx.array] | None = None,
    difference: bool = False,
    key: mx.array | None = None,
) -> dict[str, AdapterLayer]:
    """New layers over ``bases`` as ``config`` describes them, by path.

    Args:
        ranks: of each layer.
        dtype: of the adapter's arrays if a base's storage does not determine one.
        shared: VeRA's projections, float32.
        difference: make layers of ``DIFFERENCES``, whose initial pair is set later.
        key: random key for all layers' initial values, if the caller replaces them; by default MLX's global state is
            used.

    Raises: AdapterError: naming every module that the method, or a setting, cannot adapt.
    """
    classes, faults = {}, []
    for path, base in bases.items():
        layer = (DIFFERENCES if difference else METHODS[config.method]).get(kind(base))
        if config.lora_bias:
            layer = WITH_BIAS.get(layer)
        if layer is None:
            what = "lora_bias" if config.lora_bias else f"init {config.init}" if difference else config.method
            faults.append(f"{path}: {what} does not adapt {kind(base)} layers")
        classes[path] = layer
    if faults:
        raise AdapterError("\n".join(faults), "Name the modules to adapt with --keys, without these.")
    layers, projections = {}, {}
    for path, base in bases.items():
        extra = {"feedforward": config.is_feedforward(path)} if config.method == "ia3" else {}
        if shared is not None:
            own = base_dtype(base) or dtype
            if own not in projections:  # one object for all layers of a dtype
                projections[own] = Projections(*(array.astype(own) for array in shared))
            extra = {"shared": projections[own], "d_initial": config.d_initial}
        scale = config.scale_of(path)
        layers[path] = classes[path](base, ranks[path], scale, config.dropout, dtype, key=key, **extra)
    return layers


__all__ = [
    "DIFFERENCES",
    "METHODS",
    "AdapterLayer",
    "MultiLoRALinear",
    "Rows",
    "SplitEmbedding",
    "TokenRows",
    "as_head",
    "check_rank",
    "make_layers",
]
