"""``lora_shrink`` and ``lora_qmv`` against float64, over storages, dtypes, rows, tails; many adapters; traffic."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mslemu
from conftest import assert_close
from kernel_cases import (
    DTYPES,
    STORAGES,
    check,
    check_many,
    check_rounding,
    check_scales,
    check_swiglu,
    make_stored,
    normal,
)
from mlx_lora.kernels import lora_qmv, lora_shrink
from mlx_lora.kernels.registry import source


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage(backend, storage):
    check(1, 38, 256, [8], mx.float32, storage)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["dense", "affine4g64", "affine3g32", "mxfp4", "nvfp4", "nf4"])
def test_every_dtype(backend, storage, dtype):
    check(2, 70, 192, [16], dtype, storage, bias=True, gain=True)


@pytest.mark.parametrize("M", [*range(1, 10), 15, 16, 17, 25, 31, 32])
def test_rows(backend, M):
    dtype = DTYPES[M % 3]
    check(M, 45, 128, [4, 8], dtype, "affine4g64", bias=True)
    if M > 8:
        check(M, 13, 1100, [3], DTYPES[(M + 1) % 3], "dense", gain=True)
        check_swiglu(M, 13, 64, 3, DTYPES[(M + 2) % 3], "affine4g32")
        check_many([(3 * m * m) % 5 - 1 for m in range(M)], dtype)
        check_many([m % 2 - 1 for m in range(M)], dtype)


@pytest.mark.parametrize("ranks", [[1], [3, 7], [16, 2, 5], [9, 1, 30, 4], [64], [100, 33], [129]], ids=str)
def test_ranks(backend, ranks):
    check(2, 33, 96, ranks, mx.float32, "affine4g32")


@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 3), (3, 2), (5, 7), (7, 513), (1, 1000), (4100, 17)])
def test_odd_shapes_and_tiny_arrays(backend, N, K):
    check(1, N, K, [1], mx.float32, "dense", bias=True)


def test_one_group(backend):
    check(1, 1, 32, [1], mx.float32, "affine4g32", bias=True)


@pytest.mark.parametrize("K", [1024, 2080, 8192])
def test_splits(backend, K):
    check(2, 8, K, [4, 4], mx.float32, "affine4g32")


def test_splits_of_unequal_size(backend):
    check(2, 8, 2081, [4, 4], mx.float32, "dense")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding(backend, dtype):
    check_rounding(dtype)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_scale(backend, mode):
    if backend == "reference":
        pytest.skip("MLX's own dequantize has another idea of 255")
    check_scales(mode, first=0 if backend == "emulated" else 8)  # a GPU may take the smallest numbers for zero


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
def test_any_schedule(backend, schedule, monkeypatch):
    monkeypatch.setattr(mslemu.options, "schedule", schedule)
    check(3, 45, 2048, [16, 8], mx.float16, "affine4g64", bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [[0], [-1], [2, 0, 2, -1], [1] * 8, [-1, -1], [0, 1, 2, 3, 3, 2, 1, 0]], ids=str)
def test_many_adapters(backend, index, dtype):
    check_many(index, dtype)


@pytest.mark.parametrize("storage", ["dense", "affine4g64", "affine5g32", "mxfp4", "nvfp4", "nf4"])
@pytest.mark.parametrize(("M", "dtype"), [(1, mx.float32), (3, mx.bfloat16), (8, mx.float16)], ids=str)
def test_swiglu(backend, M, dtype, storage):
    check_swiglu(M, 37, 192, 8, dtype, storage)


@pytest.mark.parametrize(("N", "K", "r"), [(1, 1, 1), (5, 1100, 3), (18, 2048, 40)])
def test_swiglu_odd_shapes(backend, N, K, r):
    check_swiglu(2, N, K, r, mx.float32, "dense")


def test_gradients(backend):
    mx.random.seed(0)
    base, x = make_stored("affine4g32", 24, 64, mx.float32), normal((2, 64), mx.float32)
    a, b, bias = normal((64, 4), mx.float32), normal((4, 24), mx.float32), normal((24,), mx.float32)

    def loss(x, a, b, bias, scales):
        kept = base._replace(scales=scales)
        y = lora_qmv(x, kept, lora_shrink(x, [a]), b, mx.array([2.0]), mx.array([0], mx.int32), bias=bias)
        return (y**2).sum()

    def plain(x, a, b, bias, scales):
        w = base._replace(scales=scales).dequantized()
        return ((x @ w.T + 2 * (x @ a) @ b + bias) ** 2).sum()

    arguments = (x, a, b, bias, base.scales)
    for f in (lambda f: f, mx.checkpoint, mx.compile):
        got = mx.grad(f(loss), argnums=range(5))(*arguments)
        for g, e in zip(got, mx.grad(plain, argnums=range(5))(*arguments), strict=True):
            assert_close(g, e, 1e-5)


def test_bytes_are_read_once(backend):
    """Each byte of W, A and b by one thread for 8 rows of x; x and the scales come from the cache."""
    if backend != "emulated":
        pytest.skip("counted by the emulator")
    mx.random.seed(0)
    for M, index in ((1, None), (4, None), (4, [1, 0, 1, -1]), (16, [1, 0, 1, -1] * 4)):
        base, x = make_stored("affine4g64", 512, 2048, mx.float16), normal((M, 2048), mx.float16)
        shape = (2,) if index else ()
        a = [normal((*shape, 2048, 16), mx.float16) for _ in range(3)]
        b, many = normal((*shape, 16, 512), mx.float16), {}
        if index:
            many = {"index": mx.array(index, mx.int32), "ranks": mx.array([16, 16], mx.int32)}
        mslemu.log.clear()
        u = lora_shrink(x, a, **many)
        lora_qmv(x, base, u, b, mx.ones(2 if index else 1), mx.array([32], mx.int32), **many)
        shrink, qmv = (entry.buffers for entry in mslemu.log)
        for buffers, name in ((shrink, "a0"), (shrink, "a1"), (shrink, "a2"), (qmv, "w"), (qmv, "b")):
            assert buffers[name]["read"] == -(-M // 8) * buffers[name]["nbytes"], name
        assert qmv["w"]["group_lines"] == -(-M // 8) * qmv["w"]["lines"], "a line of W is fetched by one threadgroup"


def test_loads_are_coalesced(backend, monkeypatch):
    """How many 128-byte lines an instruction of 32 lanes touches, against the fewest that hold its bytes."""
    if backend != "emulated":
        pytest.skip("counted by the emulator")
    monkeypatch.setattr(mslemu.options, "coalescing", True)
    monkeypatch.setattr(mslemu.options, "misalign", False)
    check(1, 64, 2048, [16], mx.float16, "affine4g64")
    shrink, qmv = (entry.buffers for entry in mslemu.log[-2:])
    # 32 lanes read 4 neighbouring columns each, one at a time: 256 bytes, four times.
    assert shrink["a0"]["transactions"] == 4 * shrink["a0"]["lines"]
    # 32 lanes read 8 neighbouring bytes each, a half-word at a time: 256 bytes, four times.
    assert qmv["w"]["transactions"] == 4 * qmv["w"]["lines"]


@pytest.mark.parametrize("name", ["lora_shrink", "lora_qmv", "lora_swiglu"])
def test_lint(name):
    header, body = source(name)
    assert mslemu.lint(header + body) == []
