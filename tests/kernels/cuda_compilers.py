"""CUDA text through a real compiler, to machine code: NVRTC, as MLX calls it, or else nvcc. No GPU is needed.

NVRTC and CUDA's headers are in NVIDIA's toolkit and in its wheels (``mlx-lora[nvrtc]``). MLX's own header is inside its
CUDA library: what the kernels need of it stands here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ARCHITECTURE = "sm_80"
MLX_HEADER = "mlx/backend/cuda/device/utils.cuh"
HEADER = """#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#if __has_include(<cuda/std/cstdint>)
#include <cuda/std/cstdint>
#else
#include <cstdint>
#endif
namespace mlx::core::cu {
struct Shape {
  int32_t sizes[10];
  __device__ const int32_t& operator[](int i) const { return sizes[i]; }
};
}
"""


class CudaError(RuntimeError):
    """The text does not compile."""


def _toolkits() -> list[Path]:
    """Folders with ``include`` and ``lib64`` or ``lib``."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    wheels = [p for entry in sys.path for p in (Path(entry or ".") / "nvidia").glob("c*")]
    return [*wheels, *(Path(home) for home in homes if home)]


def _includes() -> list[str]:
    found = [home / "include" for home in _toolkits()]
    headers = next((f for f in found if (f / "cuda_fp16.h").exists() and (f / "cooperative_groups.h").exists()), None)
    library = next((f for f in [*(f / "cccl" for f in found), *found] if (f / "nv" / "target").exists()), None)
    return [str(f) for f in (headers, library) if f] if headers and library else []


@functools.cache
def compiler() -> Callable[[str, str], bytes] | None:
    """(text, name of the kernel) to machine code, raising CudaError; None where there is no compiler."""
    libraries = (p for home in _toolkits() for part in ("lib64", "lib") for p in (home / part).glob("libnvrtc.so*"))
    for path in libraries if _includes() else ():
        try:
            return functools.partial(_nvrtc, ctypes.CDLL(str(path)))
        except OSError:
            continue
    return _nvcc if shutil.which("nvcc") else None


def _nvrtc(nvrtc: ctypes.CDLL, text: str, function: str, header: str = HEADER) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    headers = (ctypes.c_char_p * 1)(header.encode()), (ctypes.c_char_p * 1)(MLX_HEADER.encode())
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{function[:60]}.cu".encode(), 1, *headers)
    arguments = ["--device-as-default-execution-space", f"--gpu-architecture={ARCHITECTURE}"]
    arguments += [f"--include-path={folder}" for folder in _includes()]
    try:
        nvrtc.nvrtcAddNameExpression(program, f"mlx::core::cu::{function}".encode())
        options = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
        if nvrtc.nvrtcCompileProgram(program, len(arguments), options):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(log.value.decode()[:4000])
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvcc(text: str, function: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, header, code = (Path(folder) / name for name in ("kernel.cu", MLX_HEADER, "kernel.cubin"))
        header.parent.mkdir(parents=True)
        header.write_text(HEADER)
        source.write_text(text)
        command = ["nvcc", f"-arch={ARCHITECTURE}", "-std=c++17", "-cubin", "-I", folder, str(source), "-o", str(code)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CudaError(done.stderr[:4000])
        return code.read_bytes()
