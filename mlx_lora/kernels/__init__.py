"""Fused array functions for the low-rank path, each with a reference in MLX's own operations.

These functions take arrays and know nothing about layers. One that has a Metal kernel (its source is in ``metal/``
under the same name) runs it if ``registry.enabled`` is true, else its reference.
"""

from .dora_norm import dora_norm
from .lora_qmv import MAX_RANK, base_qmv, lora_qmv
from .lora_rows import lora_rows
from .lora_shrink import MAX_ROWS, lora_shrink
from .lora_swiglu import lora_swiglu
from .nf4_dequantize import nf4_dequantize
from .registry import checkpointed, enabled, exportable, with_backward
from .stored import Stored

__all__ = [
    "MAX_RANK",
    "MAX_ROWS",
    "Stored",
    "base_qmv",
    "checkpointed",
    "dora_norm",
    "enabled",
    "exportable",
    "lora_qmv",
    "lora_rows",
    "lora_shrink",
    "lora_swiglu",
    "nf4_dequantize",
    "with_backward",
]
