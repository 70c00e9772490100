"""One call of each kernel compared with float64: what the tests repeat over shapes, and the mutants must fail."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np

from conftest import assert_close, numbers
from mlx_lora.kernels import Stored, dora_norm, lora_qmv, lora_shrink, lora_swiglu, nf4_dequantize, registry
from mlx_lora.kernels.lora_qmv import qmv_launch
from mlx_lora.kernels.lora_shrink import shrink_launch
from mlx_lora.kernels.lora_swiglu import swiglu_launch
from mlx_lora.kernels.stored import NF4

TOLERANCE = {mx.float32: 3e-6, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
STORAGES = {
    "dense": None,
    **{f"affine{b}g{g}": ("affine", b, g) for b, g in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))},
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
    "nf4": ("nf4", 4, 64),
    "nf4nested": ("nf4", 4, 64),
}


def normal(shape, dtype, size=1.0) -> mx.array:
    return (size * mx.random.normal(shape)).astype(dtype)


def make_stored(storage: str, N: int, K: int, dtype) -> Stored:
    w = normal((N, K), dtype, 0.1)
    if storage == "dense":
        return Stored(w)
    mode, bits, group = STORAGES[storage]
    if mode == "nf4":
        codes, blocks = mx.random.randint(0, 256, (N * K // 2,)).astype(mx.uint8), -(-N * K // group)
        scales, nested = mx.random.uniform(0.05, 0.2, (blocks,)), None
        if storage == "nf4nested":
            scales = mx.random.randint(0, 256, (blocks,)).astype(mx.uint8)
            nested = mx.random.uniform(0.05, 0.1, (-(-blocks // 8),)), mx.linspace(-1, 1, 256), mx.array([0.15])
        return Stored(codes, scales, None, group, bits, mode, nested, 8, N)
    weight, scales, *biases = mx.quantize(w, group_size=group, bits=bits, mode=mode)
    return Stored(weight, scales, biases[0] if biases else None, group, bits, mode)


def close(y, expected, dtype, what="") -> None:
    assert y.dtype == dtype
    assert_close(y, expected, TOLERANCE[dtype], what)


def float64(array) -> np.ndarray:
    return numbers(array).astype(np.float64)


def check(M, N, K, ranks, dtype, storage, bias=False, gain=False) -> None:
    """The last of several adapters on x through both kernels, and all products of the first."""
    mx.random.seed(M + N + K)
    base, x = make_stored(storage, N, K, dtype), normal((M, K), dtype)
    a, b = [normal((K, r), dtype, K**-0.5) for r in ranks], normal((ranks[-1], N), dtype, 0.3)
    extra = {"bias": normal((N,), dtype) if bias else None, "gain": mx.random.uniform(0.5, 2, (N,)) if gain else None}
    u = lora_shrink(x, a)
    products = [float64(x) @ float64(m) for m in a]
    assert_close(u.sum(axis=0), np.concatenate(products, axis=-1), 3e-6, "u")
    y = lora_qmv(x, base, u, b, mx.array([1.5]), mx.array([sum(ranks[:-1])], mx.int32), **extra)
    expected = float64(x) @ float64(base.dequantized()).T + 1.5 * products[-1] @ float64(b)
    if gain:
        expected = float64(extra["gain"]) * expected
    if bias:
        expected = expected + float64(extra["bias"])
    close(y, expected, dtype, "y")


def check_many(index: list[int], dtype, padding: float = 0.0) -> None:
    """Rows with one of four adapters each, or none; their ranks differ. ``padding`` fills a and b beyond the ranks."""
    mx.random.seed(len(index))
    M, K, N, R = len(index), 128, 70, 16
    ranks, scale = [8, 3, 1, 16], mx.array([1.0, 0.5, -2.0, 3.0])  # the last one's fill their arrays to the end
    base, x = make_stored("affine4g64", N, K, dtype), normal((M, K), dtype)
    beyond = mx.arange(R)[:, None] >= mx.array(ranks)[:, None, None]
    a, other = mx.where(beyond.swapaxes(1, 2), padding, normal((4, K, R), dtype, K**-0.5)), normal((4, K, 4), dtype)
    a = a.astype(dtype)
    b, idx = mx.where(beyond, padding, normal((4, R, N), dtype, 0.3)).astype(dtype), mx.array(index, mx.int32)
    u = lora_shrink(x, [other, a], idx, mx.array(ranks, mx.int32))
    total, offset = numbers(u.sum(axis=0)), mx.array([4], mx.int32)
    assert all((total[m] == 0).all() for m, i in enumerate(index) if i < 0), "rows without adapter"
    assert all((total[m, 4 + ranks[i] :] == 0).all() for m, i in enumerate(index) if i >= 0), "columns beyond the rank"
    y = lora_qmv(x, base, u, b, scale, offset, index=idx, ranks=mx.array(ranks, mx.int32))
    expected = float64(x) @ float64(base.dequantized()).T
    for m, i in enumerate(index):
        if i >= 0:
            r = ranks[i]
            low = float64(x[m]) @ float64(a[i, :, :r])
            expected[m] += scale[i].item() * low @ float64(b[i, :r])
    close(y, expected, dtype)


def check_rounding(dtype) -> None:
    """Sums are rounded to ``dtype`` once, at their end; what SwiGLU takes, before it does."""
    mx.random.seed(0)
    M, N, K, r = 4, 64, 128, 8
    bases, x = [make_stored("affine4g64", N, K, dtype) for _ in range(2)], normal((M, K), dtype)
    a, b = [normal((K, r), dtype, K**-0.5) for _ in range(2)], tuple(normal((r, N), dtype, 0.3) for _ in range(2))
    gain, u, zero = mx.random.uniform(0.5, 2, (N,)), lora_shrink(x, a), mx.array([0], mx.int32)
    sums = [
        float64(x) @ float64(base.dequantized()).T + 1.5 * float64(x) @ float64(m) @ float64(n)
        for base, m, n in zip(bases, a, b, strict=True)
    ]
    exact(lora_qmv(x, bases[0], u, b[0], mx.array([1.5]), zero, gain=gain), float64(gain) * sums[0], dtype)
    gate, up = (float64(mx.array(s.astype(np.float32)).astype(dtype)) for s in sums)
    y = lora_swiglu(x, tuple(bases), u, b, mx.array([1.5, 1.5]), mx.array([0, r], mx.int32))
    exact(y, gate / (1 + np.exp(-gate)) * up, dtype)


def exact(y: mx.array, expected: np.ndarray, dtype) -> None:
    """Equal to float64 rounded, except where a float32 error crosses a rounding boundary."""
    same = (y == mx.array(expected.astype(np.float32)).astype(dtype)).mean().item()
    assert same > 0.98, f"{100 * same:.0f} % of the numbers are the nearest ones"


def check_scales(mode: str, first: int = 0) -> None:
    """Every scale that the 8 bits of ``mode`` can say, those that nobody writes too. Codes are 1, x is their mean."""
    group, K = (16, 16) if mode == "nvfp4" else (32, 32)
    bits, one = (8, 0x38) if mode == "mxfp8" else (4, 2)
    codes = mx.full((256, K * bits // 32), sum(one << (bits * i) for i in range(32 // bits)), mx.uint32)
    base = Stored(codes, mx.arange(256).astype(mx.uint8)[:, None], None, group, bits, mode)
    x, u = mx.full((1, K), 1 / K), mx.zeros((1, 1, 1))
    got = numbers(lora_qmv(x, base, u, mx.zeros((1, 256)), mx.zeros((1,)), mx.zeros((1,), mx.int32)))[0]
    v = np.arange(256)
    if mode == "nvfp4":  # e4m3
        e, m = v >> 3 & 15, v & 7
        expected = np.where(e == 0, m / 512, (1 + m / 8) * 2.0 ** (e - 7)) * np.where(v & 128, -1, 1)
        expected[(v & 127) == 127] = np.nan
    else:  # e8m0
        expected = 2.0 ** (v - 127.0)
        expected[255] = np.nan
    np.testing.assert_array_equal(got[first:], expected.astype(np.float32)[first:])


def check_norm(N, K, storage, r=None, dtype=mx.float32) -> None:
    """``dora_norm``, with an update of rank r or without."""
    mx.random.seed(N + K)
    base, w = (kept := make_stored(storage, N, K, dtype)), float64(kept.dequantized())
    if r is None:
        return assert_close(dora_norm(base), (w**2).sum(axis=1), 3e-6)
    a, b = normal((K, r), dtype, K**-0.5), normal((r, N), dtype, 0.3)
    w = w + 1.5 * (float64(a) @ float64(b)).T
    assert_close(dora_norm(base, a, b, 1.5), (w**2).sum(axis=1), 3e-6)


def check_dequantize(N, K, storage, dtype=mx.float32) -> None:
    """``nf4_dequantize`` against the formula."""
    mx.random.seed(N + K)
    base = make_stored(storage, N, K, dtype)
    got = nf4_dequantize(base, dtype)
    assert got.dtype == dtype and got.shape == (N, K)
    codes = np.array(base.weight)
    codes = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    scales = np.array(base.scales)
    if base.nested:
        of_scales, values, offset = (np.array(n, np.float64) for n in base.nested)
        scales = values[scales] * np.repeat(of_scales, base.nested_block)[: len(scales)] + offset
    expected = np.array(NF4)[codes] * np.repeat(scales, base.group_size)[: N * K]
    if not base.nested:  # one product, rounded once
        once = np.array(NF4, np.float32)[codes] * np.repeat(scales.astype(np.float32), base.group_size)[: N * K]
        assert mx.array_equal(got, mx.array(once).astype(dtype).reshape(N, K)).item()
    assert_close(got, expected.reshape(N, K), {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}[dtype])


def check_swiglu(M, N, K, r, dtype, storage) -> None:
    """``lora_swiglu`` after one ``lora_shrink`` for both, whose u holds columns of others as well."""
    mx.random.seed(M + N + K)
    bases, x = (make_stored(storage, N, K, dtype), make_stored(storage, N, K, dtype)), normal((M, K), dtype)
    a, b = [normal((K, r), dtype, K**-0.5) for _ in range(2)], tuple(normal((r, N), dtype, 0.3) for _ in range(2))
    others = [normal((K, n), dtype) for n in (3, 2)]
    u, offset = lora_shrink(x, [others[0], a[0], others[1], a[1]]), mx.array([3, r + 5], mx.int32)
    y = lora_swiglu(x, bases, u, b, mx.array([1.5, -0.7]), offset)
    gate, up = (
        float64(x) @ float64(base.dequantized()).T + s * float64(x) @ float64(m) @ float64(n)
        for base, m, n, s in zip(bases, a, b, (1.5, -0.7), strict=True)
    )
    assert y.dtype == dtype
    assert_close(y, gate / (1 + np.exp(-gate)) * up, 3 * TOLERANCE[dtype])


def forget_kernels() -> None:
    """Drop every kernel that was made, so that changed sources are read."""
    for cache in (registry._kernel, registry.source, qmv_launch, shrink_launch, swiglu_launch):
        cache.cache_clear()
