"""Storage of base weights that MLX lacks. NF4: ``nf4.py`` holds the numbers, ``linear.py`` the layer and its files."""

from __future__ import annotations

from .linear import NF4Linear
from .nf4 import bits_per_parameter, dequantize_nf4, quantize_nf4

__all__ = ["NF4Linear", "bits_per_parameter", "dequantize_nf4", "quantize_nf4"]
