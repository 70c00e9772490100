"""What the kernels take beside plain operations and beside mlx-lm's layers, on the machine at hand."""

from .chips import BANDWIDTH
from .kernels import KernelTime, measure_kernels

__all__ = ["BANDWIDTH", "KernelTime", "measure_kernels"]
