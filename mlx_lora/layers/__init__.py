"""Adapter methods over a frozen base layer, and the table of them.

A new method is a file here and a row of ``METHODS``: {kind of base: layer class}. The table is read by the rooms above,
never by its own rows.
"""

from __future__ import annotations

from .base import AdapterLayer, base_dtype, dense_weight, dims, is_quantized, kind
from .cpu import use_blas
from .dora import DoRAEmbedding, DoRALinear, DoRASwitchLinear
from .lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from .many import ManyLoRALinear, Rows
from .siblings import introduce

METHODS = {
    "lora": {"linear": LoRALinear, "embedding": LoRAEmbedding, "switch": LoRASwitchLinear},
    "dora": {"linear": DoRALinear, "embedding": DoRAEmbedding, "switch": DoRASwitchLinear},
}

__all__ = [
    "METHODS",
    "AdapterLayer",
    "ManyLoRALinear",
    "Rows",
    "base_dtype",
    "dense_weight",
    "dims",
    "introduce",
    "is_quantized",
    "kind",
    "use_blas",
]
