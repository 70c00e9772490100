"""The kernels in CUDA: the text MLX would compile, emulated and compared with float64; and compiled by NVRTC or nvcc.

On a machine with CUDA the tests beside this one run it on the GPU (``backend`` "cuda").
"""

from __future__ import annotations

import re

import cuda_compilers
import mlx.core as mx
import pytest

import mslemu
from kernel_cases import (
    DTYPES,
    check,
    check_dequantize,
    check_many,
    check_norm,
    check_swiglu,
    forget_kernels,
    make_stored,
)
from mlx_lora.errors import ConfigError
from mlx_lora.kernels import cuda, dora_norm, enabled, registry
from mslemu.compiler import CompileError

needs_emulator = pytest.mark.skipif(mslemu.unavailable() is not None, reason=str(mslemu.unavailable()))
F32, F16, BF16 = DTYPES
STORAGES = ["dense", "affine2g128", "affine3g32", "affine4g64", "affine5g64", "affine6g32", "affine8g64"]
STORAGES += ["mxfp4", "mxfp8", "nvfp4", "nf4", "nf4nested"]


@pytest.fixture(autouse=True)
def on(monkeypatch):
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    mslemu.log.clear()


# ------------------------------------------------------------------------------------------------------- executed


@needs_emulator
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage(storage):
    with mslemu.installed_cuda():
        check(1, 38, 256, [8], F32, storage)
        check_norm(6, 128, storage, 3)
    assert len(mslemu.log) == 3


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["dense", "affine3g32", "mxfp8"])
def test_every_dtype(storage, dtype):
    with mslemu.installed_cuda():
        check(2, 70, 192, [16], dtype, storage, bias=True, gain=True)
        check_norm(17, 192, storage, 5, dtype)
        check_norm(17, 192, storage, None, dtype)
        check_swiglu(3, 37, 192, 8, dtype, storage)


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(dtype):
    with mslemu.installed_cuda():
        for storage in ("nf4", "nf4nested"):
            check_dequantize(5, 192, storage, dtype)
        check_dequantize(48, 160, "nf4", dtype)  # more than a block


@needs_emulator
@pytest.mark.parametrize(("M", "ranks"), [(8, [9, 1, 30, 4]), (5, [129]), (3, [3, 7, 64]), (17, [4, 2])], ids=str)
def test_ranks_and_rows(M, ranks):
    with mslemu.installed_cuda():
        check(M, 33, 96, ranks, F16, "affine4g32", bias=True)


@needs_emulator
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 7), (4100, 17), (8, 2080)])
def test_odd_shapes_and_splits(N, K):
    with mslemu.installed_cuda():
        check(2, N, K, [4, 3], F32, "dense", bias=True)


@needs_emulator
@pytest.mark.parametrize("index", [[-1], [2, 0, 2, -1], [1] * 8, [2, 0, 1, -1, 0, 0, 2, 2, -1]], ids=str)
def test_many_adapters(index):
    with mslemu.installed_cuda():
        check_many(index, BF16)


@needs_emulator
@pytest.mark.parametrize("schedule", ["forward", "reverse"])
def test_any_schedule(schedule):
    with mslemu.installed_cuda(schedule=schedule):
        check(3, 45, 2048, [16, 8], F16, "affine4g64", bias=True)
        check_norm(33, 600, "dense", 16, F16)


# ------------------------------------------------------------------------------------------------------- compiled


class Compiled(mslemu.CudaKernel):
    """Runs as every emulated kernel does; then the same text is made machine code."""

    def run(self, function, text, parameters, grid, threadgroup):
        super().run(function, text, parameters, grid, threadgroup)
        if text not in done:
            assert function.encode() in cuda_compilers.compiler()(text, function)
            done.add(text)


done: set[str] = set()
COMPILED = [
    lambda: check(2, 38, 256, [3, 5], F32, "affine5g32", bias=True, gain=True),
    lambda: check(8, 38, 256, [9, 1, 30, 4], F16, "affine4g64"),
    lambda: check(3, 38, 256, [16, 2, 5], BF16, "nvfp4", gain=True),
    lambda: check_many([2, 0, 2, -1], F16),
    lambda: check_swiglu(8, 37, 192, 8, BF16, "mxfp8"),
    lambda: check_norm(17, 192, "mxfp4", 5, F16),
    lambda: check_norm(17, 192, "dense", None, BF16),
    lambda: check_dequantize(5, 192, "nf4nested", BF16),
]


@needs_emulator
@pytest.mark.skipif(cuda_compilers.compiler() is None, reason="no CUDA compiler: pip install 'mlx-lora[nvrtc]'")
@pytest.mark.parametrize("case", COMPILED, ids=range(len(COMPILED)))
def test_compiles(case):
    with mslemu.installed_cuda(Compiled):
        case()


# -------------------------------------------------------------------------------------------------------- refused


def one():
    check(2, 38, 1056, [3, 5], F32, "affine4g32", bias=True, gain=True)


def splits():
    check(1, 6, 2080, [4, 9], F32, "dense")


def norm():
    check_norm(18, 544, "affine4g32", 3)


MUTANTS = [
    ("no barrier", "threadgroup_barrier(flags) __syncthreads()", "threadgroup_barrier(flags)", one),
    ("a barrier of the warp", "__syncthreads()", "__syncwarp()", one),
    ("no barrier of the warp", "simdgroup_barrier(flags) __syncwarp()", "simdgroup_barrier(flags)", norm),
    ("a sum of half the lanes", "lanes = 16", "lanes = 8", one),
    ("a sum that stops early", "lanes > 0", "lanes > 1", one),
    ("a shuffle that stays", "__shfl_xor_sync(0xffffffffu, value, lanes)", "value", one),
    ("a shuffle of half a warp", "0xffffffffu", "0x0000ffffu", one),
    ("warps of 64", "LINEAR_THREAD_INDEX % 32", "LINEAR_THREAD_INDEX % 64", one),
    ("the other half of a group", "LINEAR_THREAD_INDEX / 32", "LINEAR_THREAD_INDEX / 64", one),
    ("y of a thread forgotten", "blockDim.x * (threadIdx.y +", "blockDim.x * (0 * threadIdx.y +", one),
    ("the size of a block for the grid's", "per_grid gridDim", "per_grid blockDim", splits),
    (
        "the size of a block forgotten",
        "dim3(blockIdx.x * blockDim.x +",
        "dim3(blockIdx.x +",
        lambda: test_dequantize(F32),
    ),
    ("a cast for the bits", "__uint_as_float(bits)", "float(bits)", lambda: test_every_storage("mxfp4")),
]


@needs_emulator
@pytest.mark.parametrize(("what", "old", "new", "case"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_refused(what, old, new, case, monkeypatch, tmp_path):
    """A bug in metal/cuda.h."""
    folder = registry._file("cuda.h").parent
    for path in folder.iterdir():
        text = path.read_text()
        assert path.name != "cuda.h" or old in text, f"{old!r} is no longer in cuda.h: plant this mutant anew"
        (tmp_path / path.name).write_text(text.replace(old, new, 1) if path.name == "cuda.h" else text)
    monkeypatch.setattr(registry, "_FOLDERS", (tmp_path,))
    refuse(case)


@needs_emulator
@pytest.mark.parametrize("rule", range(len(cuda._RULES)))
def test_every_rule_is_needed(rule, monkeypatch):
    monkeypatch.setattr(cuda, "_RULES", cuda._RULES[:rule] + cuda._RULES[rule + 1 :])
    refuse(one)


@needs_emulator
def test_refused_without_shared(monkeypatch):
    """A threadgroup variable that became each thread's own."""
    monkeypatch.setattr(cuda, "_RULES", [(p, r.replace("__shared__ ", "")) for p, r in cuda._RULES])
    refuse(one)


def refuse(case):
    forget_kernels()
    try:
        with mslemu.installed_cuda(), pytest.raises((mslemu.EmuError, CompileError, AssertionError)):
            case()
    finally:
        forget_kernels()


# ----------------------------------------------------------------------------------------------------------- chosen


class Names(mslemu.CudaKernel):
    def run(self, function, text, parameters, grid, threadgroup):
        names.append(function)
        for *_, array, is_output in parameters:
            if is_output:
                array[...] = 0


names: list[str] = []


def test_used_only_where_asked_for(monkeypatch):
    """``auto`` leaves CUDA to plain operations; Metal comes first where there are both."""
    base = make_stored("dense", 4, 8, F32)
    names.clear()
    with mslemu.installed_cuda(Names):
        for wanted, count in (("auto", 0), ("off", 0), ("on", 1)):
            monkeypatch.setenv("MLX_LORA_KERNELS", wanted)
            assert enabled() == (wanted == "on")
            dora_norm(base)
            assert len(names) == count
        mx.metal.is_available = lambda: True
        with pytest.raises(ConfigError, match="neither Metal nor CUDA"):
            dora_norm(base)


def test_auto_takes_the_kernels_with_evidence(monkeypatch):
    """Kernel by kernel; an adapter is decoded by them where both that it needs are taken."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "auto")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    base = make_stored("dense", 4, 8, F32)
    both = ("lora_shrink", "lora_qmv")
    with mslemu.installed_cuda(Names):
        for taken, count, decodes in (((), 0, False), (both[:1], 0, False), ((*both, "dora_norm"), 1, True)):
            monkeypatch.setattr(registry, "TAKEN_ON_CUDA", dict.fromkeys(taken, "a report"))
            names.clear()
            dora_norm(base)
            assert len(names) == count
            assert enabled(*both) == decodes
            assert enabled() == bool(taken) and not enabled("lora_swiglu")


def test_a_name_says_its_types():
    """MLX tells kernels apart by their names."""
    names.clear()
    with mslemu.installed_cuda(Names):
        for dtype in DTYPES:
            dora_norm(make_stored("dense", 4, 8, dtype))
    assert len(set(names)) == 3 and all(re.fullmatch(r"\w+", name) for name in names)


def test_without_a_gpu():
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="neither Metal nor CUDA"):
        mx.eval(dora_norm(make_stored("dense", 4, 8, F32)))


def test_what_is_left_does_not_compile():
    for metal, text in (
        ("threadgroup float a[2 * N];", "__shared__ float a[2 * N];"),
        ("constant float T[2] = {};", "__device__ const float T[2] = {};"),
        (
            "f(const device ushort* w, thread float& s);  // of a thread",
            "f(const ushort* w, float& s);  // of a thread",
        ),
    ):
        assert cuda.translate(metal) == text
    assert cuda.translate("device Struct<float>* p") == "device Struct<float>* p"
