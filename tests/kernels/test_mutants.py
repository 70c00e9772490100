"""Bugs that somebody could write, planted one by one: each must be refused or give wrong numbers.

A mutant that survives fails the suite: then a check or a case is missing. So does one whose line is no longer there.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

import mslemu
from kernel_cases import (
    check,
    check_dequantize,
    check_many,
    check_norm,
    check_rounding,
    check_scales,
    check_swiglu,
    forget_kernels,
)
from mlx_lora.kernels import registry
from mslemu.compiler import CompileError

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def one():
    check(2, 38, 1056, [3, 5], mx.float32, "affine4g32", bias=True, gain=True)


def split():
    check(1, 6, 2080, [4, 9], mx.float32, "dense")


def many():
    check_many([2, 0, 2, -1, 1], mx.float32)


def padded():
    check_many([2, 1], mx.float32, padding=float("nan"))


def tiled():
    check(9, 9, 64, [2], mx.float32, "dense")


def many_tiled():
    check_many([2, 0, 2, -1, 0, 0, 2, 2, -1], mx.float32)


def swiglu_tiled():
    check_swiglu(9, 9, 64, 3, mx.float32, "affine4g32")


def odd_bits():
    check(1, 9, 96, [2], mx.float32, "affine5g32")


def swiglu():
    check_swiglu(2, 38, 96, 5, mx.float32, "affine4g32")


def norm():
    check_norm(18, 544, "affine4g32", 3)


def dense_norm():
    check_norm(3, 37, "dense", 2)


def dequantize():
    check_dequantize(5, 160, "nf4")


def nested():
    check_dequantize(9, 192, "nf4nested")


def half():
    check_dequantize(5, 160, "nf4", mx.float16)


def unequal():
    check(2, 8, 2081, [4, 4], mx.float32, "dense")


def last():
    check_many([3, 0], mx.float32)


def rounding():
    check_rounding(mx.float16)


def scales(mode):
    return lambda: check_scales(mode)


def storage(name):
    return lambda: check(1, 9, 128, [2], mx.float32, name)


MUTANTS = {
    "lora_shrink": [
        ("no barrier before the sums are read", BARRIER, "", one),
        ("a barrier of no memory", BARRIER, BARRIER.replace("mem_threadgroup", "mem_none"), one),
        ("a barrier of the simdgroup", BARRIER, "simdgroup" + BARRIER.removeprefix("threadgroup"), one),
        ("columns beyond the rank are read", "c + i < rank ?", "true ?", one),
        ("rank off by one", "c + i < rank ?", "c + i <= rank ?", one),
        ("k runs past its split", "k < end; k +=", "k <= end; k +=", split),
        ("splits overlap", "begin + step)", "begin + step + 1)", split),
        (
            "the last split is short",
            "(K + SPLITS - 1) / SPLITS",
            "K / SPLITS",
            lambda: check(1, 6, 2081, [4], mx.float32, "dense"),
        ),
        ("accumulator not cleared", "sum[i] = 0;", ";", one),
        ("every lane stores", "if (lane < C) part", "part", one),
        ("shuffle among too few lanes", "d < 32; d *= 2", "d < 16; d *= 2", one),
        ("a simdgroup is left out", "g < NSG; g++", "g < NSG - 1; g++", one),
        ("offset of the second matrix", "SHRINK(a1, WIDTH(a0))", "SHRINK(a1, 0)", one),
        ("x of the wrong row", "x[size_t(m) * K + k]", "x[k]", one),
        ("x[m] beyond the last row", "x[size_t(m) * K + k]", "x[size_t(m + 1) * K + k]", one),
        (
            "a shuffle where lanes differ",
            "for (int d = C; d < 32; d *= 2)",
            "if (lane < 16) for (int d = C; d < 32; d *= 2)",
            one,
        ),
        ("lost address space", "threadgroup float* part, uint rows", "float* part, uint rows", one),
        ("rank of the adapter ignored", "min(int(ranks[id]), a##_shape[2])", "a##_shape[2]", padded),
        ("no row in charge", "if (m < leader) return;", "", many),
        (
            "a row without adapter reads the first",
            "#define RANK(a) id < 0 ? 0 :",
            "#define RANK(a) id < 0 ? a##_shape[2] :",
            many,
        ),
        ("the last split is not clamped", "min(K, begin + step)", "begin + step", unequal),
        ("rank beyond a narrow matrix", "min(int(ranks[id]), a##_shape[2])", "int(ranks[id])", last),
        ("adapters of the wrong stride", "size_t(id) * K * a##_shape[2]", "size_t(id) * K", many),
        ("rows past the last one", "* M, total - M)", "* M, total)", tiled),
        ("rows written twice", "(1u << M) - (1u << first)", "(1u << M) - 1", tiled),
        ("rows of adapters written twice", "int m = first; m < M", "int m = 0; m < M", many_tiled),
        ("the adapter of another tile", "idx[m0 + m] != id", "idx[m] != id", many_tiled),
        ("x of another tile", "x + size_t(m0) * K", "x", tiled),
        ("u of another tile", "split) * total + m0) * U", "split) * total) * U", tiled),
        (
            "the splits of one tile",
            "size_t(split) * total",
            "size_t(split) * M",
            lambda: check(9, 6, 2080, [4], mx.float32, "dense"),
        ),
    ],
    "lora_qmv": [
        ("no barrier before u is read", BARRIER, "", one),
        ("a barrier of no memory", BARRIER, BARRIER.replace("mem_threadgroup", "mem_none"), one),
        ("a barrier of device memory", BARRIER, BARRIER.replace("mem_threadgroup", "mem_device"), one),
        ("a barrier of the simdgroup", BARRIER, "simdgroup" + BARRIER.removeprefix("threadgroup"), one),
        (
            "return before the barrier",
            "threadgroup float low",
            "if (n0 >= N) return;\nthreadgroup float low",
            lambda: check(1, 3, 64, [2], mx.float32, "dense"),
        ),
        ("no guard at the last rows", "min(ROWS, N - n0)", "ROWS", one),
        ("guard off by one", "min(ROWS, N - n0)", "min(ROWS, N + 1 - n0)", one),
        ("the last row is left out", "min(ROWS, N - n0)", "min(ROWS, N - 1 - n0)", one),
        ("accumulator not cleared", "sum[i] = 0;", ";", one),
        ("every lane stores", "if (m >= M || mine >= rows || m0 + m < first) return;", "", one),
        (
            "simd_sum where lanes differ",
            "const float total = simd_sum(sum[i]);",
            "float total = 0; if (lane < 16) total = simd_sum(sum[i]);",
            one,
        ),
        ("splits not summed", "s < SPLITS; s++", "s < 1; s++", split),
        ("offset forgotten", "u_shape[2] + offset[0] + j", "u_shape[2] + j", one),
        ("b read past its end", "b[size_t(j) * N + n0 + mine]", "b[size_t(j + 1) * N + n0 + mine]", one),
        ("columns of b left out", "j < R; j += 32 / ROWS", "j < R - 1; j += 32 / ROWS", one),
        (
            "gain after the bias",
            "value *= float(gain[n0 + mine]);",
            "value = float(gain[n0 + mine]) * value + float(bias[n0 + mine]);",
            one,
        ),
        ("write to an input", "float value = 0;", "float value = 0; ((device T*)x)[0] = T(1);", one),
        ("too much threadgroup memory", "low[M * R]", "low[M * R + 8192]", one),
        (
            "rank of the adapter ignored",
            "bool leads = id >= 0 && j < ranks[id]",
            "bool leads = id >= 0",
            padded,
        ),
        ("scale of another adapter", "float(scale[id])", "float(scale[0])", many),
        (
            "base rounded before the update",
            "sum NESTED_ARGUMENTS);",
            "sum NESTED_ARGUMENTS); for (int i = 0; i < M * ROWS; i++) sum[i] = float(T(sum[i]));",
            rounding,
        ),
        (
            "update rounded",
            "float(b[size_t(j) * N + n0 + mine]);",
            "float(T(low[j] * float(b[size_t(j) * N + n0 + mine]))) / low[j];",
            rounding,
        ),
        (
            "rounded before the gain",
            "value *= float(gain[n0 + mine]);",
            "value = float(T(value)) * float(gain[n0 + mine]);",
            rounding,
        ),
        ("rows past the last one", "min(first, total - M)", "first", tiled),
        ("rows written twice", " || m0 + m < first", "", tiled),
        ("u of another tile", "total + m0 + m)", "total + m)", tiled),
        ("x of another tile", "x + size_t(m0) * K", "x", tiled),
        ("y of another tile", "y[size_t(m0 + m) * N", "y[size_t(m) * N", tiled),
        (
            "the scale of another tile",
            "const int id = idx[m0 + m];\n  const",
            "const int id = idx[m];\n  const",
            many_tiled,
        ),
        (
            "the adapter of another tile",
            "const int id = idx[m0 + m];\n      bool",
            "const int id = idx[m];\n      bool",
            many_tiled,
        ),
        ("rows of another tile share", "i == mine && idx[m0 + l] == id", "i == mine && idx[l] == id", many_tiled),
        ("rows of one adapter added twice", "leads = leads && idx[m0 + l] != id;", ";", many),
    ],
    "lora_swiglu": [
        ("no barrier before u is read", BARRIER, "", swiglu),
        ("a barrier of the simdgroup", BARRIER, "simdgroup" + BARRIER.removeprefix("threadgroup"), swiglu),
        ("no guard at the last rows", "min(ROWS, N - n0)", "ROWS", swiglu),
        ("the last row is left out", "min(ROWS, N - n0)", "min(ROWS, N - 1 - n0)", swiglu),
        ("gate for up", "STORED(w2, scales2, biases2)", "STORED(w, scales, biases)", swiglu),
        ("scales of the gate for up", "STORED(w2, scales2, biases2)", "STORED(w2, scales, biases)", swiglu),
        ("one offset for both", "offset[side]", "offset[0]", swiglu),
        ("columns of others are not", "offset[side]", "side * R", swiglu),
        ("only its own columns in u", "u_shape[2]", "2 * R", swiglu),
        ("up is not rounded", "h = float(T(total2));", "h = total2;", rounding),
        ("gate is not rounded", "g = float(T(total));", "g = total;", rounding),
        ("one scale for both", "scale[side]", "scale[0]", swiglu),
        ("u of the gate for up", "low[(M + m) * R + j]", "low[m * R + j]", swiglu),
        ("half of u is made", "e < 2 * M * R;", "e < M * R;", swiglu),
        ("u past its end", "low[(M + m) * R + j]", "low[(M + m + 1) * R + j]", swiglu),
        ("b past its end", "b2[size_t(j) * N + n0 + mine]", "b2[size_t(j + 1) * N + n0 + mine]", swiglu),
        ("accumulator not cleared", "gate[i] = up[i] = 0;", "gate[i] = 0;", swiglu),
        ("rows past the last one", "min(first, total - M)", "first", swiglu_tiled),
        ("rows written twice", " || m0 + m < first", "", swiglu_tiled),
        ("u of another tile", "total + m0 + m)", "total + m)", swiglu_tiled),
        ("x of another tile", "scales2, biases2), x + size_t(m0) * K", "scales2, biases2), x", swiglu_tiled),
        ("y of another tile", "y[size_t(m0 + m) * N", "y[size_t(m) * N", swiglu_tiled),
        ("silu of the wrong side", "g / (1.0f + exp(-g)) * h", "h / (1.0f + exp(-h)) * g", swiglu),
        ("no minus", "exp(-g)", "exp(g)", swiglu),
        ("every lane stores", "if (m >= M || mine >= rows || m0 + m < first) return;", "", swiglu),
        (
            "simd_sum where lanes differ",
            "const float total = simd_sum(gate[i])",
            "float total = 0; if (lane < 8) total = simd_sum(gate[i]); const float none = 0",
            swiglu,
        ),
    ],
    "dora_norm": [
        ("no barrier before b is read", "simdgroup_" + BARRIER.removeprefix("threadgroup_"), "", norm),
        (
            "a barrier of no memory",
            "simdgroup_barrier(mem_flags::mem_threadgroup)",
            "simdgroup_barrier(mem_flags::mem_none)",
            norm,
        ),
        ("no guard at the last rows", "min(ROWS, N - n0)", "ROWS", norm),
        ("guard off by one", "min(ROWS, N - n0)", "min(ROWS, N + 1 - n0)", norm),
        ("the last row is left out", "min(ROWS, N - n0)", "min(ROWS, N - 1 - n0)", norm),
        ("k runs past the row", "k < K; k += 512", "k <= K; k += 512", norm),
        ("lanes leave a gap", "k < K; k += 512", "k < K; k += 528", norm),
        ("accumulator not cleared", "sum[i] = 0;", ";", norm),
        ("bias of a group forgotten", "float(biases[group])", "0", norm),
        ("scale of the update forgotten", "float(scale[0]) *", "", norm),
        ("columns of the update left out", "c < R; c++", "c < R - 1; c++", norm),
        ("a read in the other order", "size_t(k + j) * R + c", "size_t(c) * K + k + j + 1", norm),
        ("a past its end", "if (k + j >= K) continue;", "", dense_norm),
        ("tail of W not guarded", "k + j < K ?", "true ?", dense_norm),
        ("b of the rows of another simdgroup", "low[(sg * ROWS + i) * R + c]", "low[i * R + c]", norm),
        ("b past its end", "if (i < rows) low", "low", norm),
        (
            "simd_sum where lanes differ",
            "const float total = simd_sum(sum[i]);",
            "float total = 0; if (lane < 8) total = simd_sum(sum[i]);",
            norm,
        ),
        ("every lane stores", "if (lane < rows) squared", "squared", norm),
    ],
    "nf4_dequantize": [
        ("threads beyond the end", "if (first >= size_t(w_shape[0]) * 4) return;", "", dequantize),
        (
            "guard off by a unit",
            "if (first >= size_t(w_shape[0]) * 4)",
            "if (first + 16 >= size_t(w_shape[0]) * 4)",
            dequantize,
        ),
        ("units overlap", "thread_position_in_grid.x) * 16", "thread_position_in_grid.x) * 8", dequantize),
        ("half-words of another unit", "w + first / 4", "w + first / 8", dequantize),
        ("block of the wrong size", "first / GROUP", "first / 32", dequantize),
        ("scale forgotten", "code[i] * s", "code[i]", dequantize),
        ("scale rounded", "T(code[i] * s)", "T(code[i] * float(T(s)))", half),
        ("code rounded", "T(code[i] * s)", "T(float(T(code[i])) * s)", half),
        ("the last number is left out", "i < 16; i++", "i < 15; i++", dequantize),
        ("one number too many", "i < 16; i++", "i < 17; i++", dequantize),
        ("write to the input", "float code[16];", "float code[16]; ((device ushort*)w)[0] = 0;", dequantize),
        ("wrong address space", "float code[16];", "float code[16]; device float* p = code;", dequantize),
    ],
    "weights": [
        ("k runs past the row", "k < K; k += 512", "k < K + 16; k += 512", one),
        ("lanes overlap", "k = 16 * lane; k < K; k += 512", "k = 16 * lane; k < K; k += 496", one),
        ("group of the wrong size", "/ GROUP;", "/ (2 * GROUP);", one),
        ("bias of a group forgotten", "z[i] * total", "z[i]", one),
        (
            "misaligned load",
            "total += xs[j];",
            "total += xs[j] + 1e-30f * float(*(const device uint*)((const device ushort*)x + 1));",
            one,
        ),
        (
            "tail of K not guarded",
            "xs[j] = k + j < K ?",
            "xs[j] = true ?",
            lambda: check(2, 6, 37, [2], mx.float32, "dense"),
        ),
        (
            "tail of W not guarded",
            "code[i][j] = k + j < K ?",
            "code[i][j] = true ?",
            lambda: check(1, 6, 37, [2], mx.float32, "dense"),
        ),
        ("nested scales of another block", "(group) / NESTED", "(group) / (2 * NESTED)", nested),
        ("nested offset forgotten", " + nested_offset[0]", "", nested),
        ("bits across half-words lost", "if (at % 16 + BITS > 16)", "if (false)", odd_bits),
        ("mask too wide", "(1u << BITS) - 1", "(2u << BITS) - 1", odd_bits),
        ("half-words past the unit", "i < BITS; i++", "i <= BITS; i++", storage("mxfp4")),
        ("nf4 with its nibbles swapped", "(i ^ 1) * BITS", "i * BITS", storage("nf4")),
        ("exponent bias of e2m1", "(e + 126)", "(e + 127)", storage("mxfp4")),
        ("subnormals of e2m1", "e == 0 ? 0.5f *", "e == 0 ? 0.25f *", storage("nvfp4")),
        ("exponent bias of e4m3", "(e + 120)", "(e + 119)", storage("mxfp8")),
        ("sign of e4m3", "(v & 128) ?", "(v & 64) ?", storage("mxfp8")),
        ("scale of mxfp4", "as_type<float>(v << 23)", "as_type<float>(v << 22)", storage("mxfp4")),
        ("e8m0 of 0", "v == 0 ? as_type<float>(0x00400000u)", "v == 0 ? 0.0f", scales("mxfp4")),
        ("e8m0 of 255", "if (v == 255) return NAN;", "", scales("mxfp8")),
        ("e4m3 of 127", "if (e == 15 && m == 7) size = NAN;", "", scales("nvfp4")),
        ("scale of nvfp4", "KIND == 4 ? e4m3", "KIND == 5 ? e4m3", storage("nvfp4")),
    ],
}


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Put a mutant in the place of a kernel's source."""
    if why := mslemu.unavailable():
        pytest.skip(why)
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")

    def change(name, old, new):
        folder = next(f for f in registry._FOLDERS if (f / f"{name}.metal").exists())
        text = (folder / f"{name}.metal").read_text()
        assert old in text, f"{old!r} is no longer in {name}.metal: plant this mutant anew"
        for path in folder.glob("*.metal"):
            (tmp_path / path.name).write_text(text.replace(old, new, 1) if path.stem == name else path.read_text())
        monkeypatch.setattr(registry, "_FOLDERS", (tmp_path,))
        forget_kernels()

    yield change
    forget_kernels()


CASES = [(kernel, *mutant) for kernel, mutants in MUTANTS.items() for mutant in mutants]


@pytest.mark.parametrize(("kernel", "what", "old", "new", "case"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES])
def test_refused(plant, kernel, what, old, new, case):
    plant(kernel, old, new)
    with mslemu.installed(), pytest.raises((mslemu.EmuError, CompileError, AssertionError)):
        case()


@pytest.mark.parametrize("kernel", [k for k in MUTANTS if k != "weights"])
def test_there_are_enough(kernel):
    assert len(MUTANTS[kernel]) >= 8
