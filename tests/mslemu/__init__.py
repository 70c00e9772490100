"""Runs Metal compute kernels on a Linux CPU, from the same Python call that runs them on a Mac.

    with mslemu.installed():            # mx.fast.metal_kernel now makes emulated kernels
        y = product_function(x)         # unchanged product code, real Metal source, MLX's own generated signature

MLX itself generates the source (``mx.export_function`` records it without Metal), clang compiles it, and every thread
of the grid runs as a fiber, in simdgroups of 32. Refused with kernel, buffer, byte, thread and line: data races, reads
and writes out of bounds, reads of uninitialised memory, outputs left unwritten, simdgroup operations in divergent
branches, barriers that not all threads reach, misaligned access, more than 32 KB of threadgroup memory, conversions
between address spaces. Counted: bytes and 128-byte lines of every buffer, simdgroup operations, barriers.

``installed_cuda`` does the same for ``mx.fast.cuda_kernel``, whose source ``cuda.py`` writes as MLX does.

What the emulator cannot tell: Apple's and NVIDIA's compilers, registers and occupancy, speed, fast-math results. x86-64
Linux only; on a Mac the same tests run on the GPU. ``kernel.py`` stands in for ``mx.fast.metal_kernel``, ``source.py``
makes C++ of Metal, ``compiler.py`` builds, ``dispatch.py`` runs, ``shipped.py`` runs the kernels in MLX's wheel,
``lint.py`` refuses what Apple's compiler would and clang does not.
"""

from .compiler import unavailable
from .cuda import CudaKernel, installed_cuda
from .dispatch import EmuError, Stats, log, options
from .kernel import installed
from .lint import lint
from .shipped import mlx_kernel

__all__ = [
    "CudaKernel",
    "EmuError",
    "Stats",
    "installed",
    "installed_cuda",
    "lint",
    "log",
    "mlx_kernel",
    "options",
    "unavailable",
]
