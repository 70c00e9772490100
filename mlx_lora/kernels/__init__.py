"""Fused array functions for the low-rank path, each with a reference in MLX's own operations.

A function here takes arrays and knows no layer. One with a Metal kernel (``metal/`` holds the source under the same
name) chooses by ``registry.enabled``; elsewhere the reference is the function.
"""

from .lora_qmv import lora_qmv
from .lora_shrink import lora_shrink
from .registry import enabled
from .stored import Stored

__all__ = ["Stored", "enabled", "lora_qmv", "lora_shrink"]
