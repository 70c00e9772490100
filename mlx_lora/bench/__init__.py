"""Benchmarks of the kernels beside plain operations and mlx-lm's layers, on this machine."""

from .chips import BANDWIDTH
from .kernels import KernelTime, measure_kernels

__all__ = ["BANDWIDTH", "KernelTime", "measure_kernels"]
