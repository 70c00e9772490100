"""The emulator itself: MLX's own shipped kernels give the right numbers, and what no kernel may do is refused.

When an MLX release moves its headers, the first half fails first and alone.
"""

from __future__ import annotations

import platform
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest

import mslemu
from conftest import assert_close
from mslemu.compiler import CompileError
from mslemu.kernel import empty, from_numpy, to_numpy

pytestmark = pytest.mark.skipif(mslemu.unavailable() is not None, reason=str(mslemu.unavailable()))
F = mx.float32
NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}
STEEL = ("steel/gemm/gemm.h", "quantized_utils.h")


def i32(*values) -> np.ndarray:
    return np.array(values, np.int32)


def inputs(*arrays, start: int = 0) -> list:
    return [(start + i, f"input{start + i}", a, False) for i, a in enumerate(arrays)]


def unused(first: int, last: int, size: int = 8) -> list:
    return [(i, f"unused{i}", np.zeros(size, np.uint8), False) for i in range(first, last + 1)]


def quantized(M, N, K, dtype, group, bits):
    mx.random.seed(0)
    x, w = mx.random.normal((M, K)).astype(dtype), (0.1 * mx.random.normal((N, K))).astype(dtype)
    packed, scales, biases = mx.quantize(w, group_size=group, bits=bits)
    dense = mx.dequantize(packed, scales.astype(F), biases.astype(F), group_size=group, bits=bits)
    return [to_numpy(a) for a in (packed, scales, biases, x)], x.astype(F) @ dense.T


def check(result, expected, dtype):
    assert_close(from_numpy(result, dtype), expected, TOLERANCE[dtype])


shipped = pytest.mark.skipif(
    tuple(map(int, version("mlx").split(".")[:3])) < (0, 32, 4), reason="MLX's headers were others"
)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@shipped
def test_mlx_qmv(bits, dtype):
    arrays, expected = quantized(1, 64, 512, dtype, 64, bits)
    y = empty((1, 64), dtype)
    buffers = [*inputs(*arrays), (4, "y", y, True), *inputs(i32(512), i32(64), start=5), *unused(7, 14)]
    template = f"<{NAMES[dtype]}, 64, {bits}, false>"
    mslemu.mlx_kernel("quantized.h", "affine_qmv_fast", template, buffers, (1, 8, 1), (32, 2, 1), before=STEEL)
    check(y, expected, dtype)


@shipped
def test_mlx_qmv_tail():
    arrays, expected = quantized(1, 70, 192, mx.float16, 64, 4)
    y = empty((1, 70), mx.float16)
    buffers = [*inputs(*arrays), (4, "y", y, True), *inputs(i32(192), i32(70), start=5), *unused(7, 14)]
    call = ("quantized.h", "affine_qmv", "<half, 64, 4, false>", buffers, (1, 9, 1), (32, 2, 1))
    # The last simdgroup moves back to stay inside, so two write the same rows; the values agree.
    mslemu.mlx_kernel(*call, before=STEEL, allow_waw=("y",))
    check(y, expected, mx.float16)
    with pytest.raises(mslemu.EmuError, match=r"race on y .*MSLEMU_SEED=7"):
        mslemu.mlx_kernel(*call, before=STEEL, seed=7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("M", "N", "K", "dtype"), [(37, 70, 192, mx.float16), (32, 64, 128, mx.float32)])
@shipped
def test_mlx_qmm(bits, M, N, K, dtype):
    arrays, expected = quantized(M, N, K, dtype, 64, bits)
    y, aligned = empty((M, N), dtype), "true" if N % 32 == 0 else "false"
    buffers = [*inputs(*arrays), (4, "y", y, True), *inputs(i32(K), i32(N), i32(M), start=5), *unused(8, 15)]
    template = f"<{NAMES[dtype]}, 64, {bits}, {aligned}, false>"
    groups = ((N + 31) // 32, (M + 31) // 32, 1)
    # Its vector loads need 16 bytes; MLX calls it with whole arrays.
    options = {"before": STEEL, "misalign": False}
    mslemu.mlx_kernel("quantized.h", "affine_qmm_t", template, buffers, groups, (32, 2, 2), **options)
    check(y, expected, dtype)


@pytest.mark.parametrize(("M", "N", "K", "dtype"), [(64, 64, 64, F), (45, 70, 37, mx.float16)])
@shipped
def test_mlx_steel_gemm(M, N, K, dtype):
    mx.random.seed(1)
    a, b, d = mx.random.normal((M, K)).astype(dtype), mx.random.normal((N, K)).astype(dtype), empty((M, N), dtype)
    tm, tn = -(-M // 32), -(-N // 32)
    parameters = np.zeros(1, np.dtype([("i", "i4", 8), ("l", "i8", 3), ("j", "i4", 3), ("pad", "i4")]))
    parameters["i"], parameters["l"] = (M, N, K, K, K, N, tn, tm), (M * K, N * K, M * N)
    parameters["j"] = (0, K // 16, 1)
    buffers = [*inputs(to_numpy(a), to_numpy(b)), *unused(2, 2), (3, "D", d, True)]
    buffers += [
        (4, "p", parameters.view(np.uint8), False),
        *unused(5, 5, 32),
        *inputs(i32(1), start=6),
        *unused(7, 7, 32),
    ]
    mslemu.mlx_kernel(
        "steel/gemm/kernels/steel_gemm_fused.h",
        "gemm",
        f"<{NAMES[dtype]}, 32, 32, 16, 2, 2, false, true, float>",
        buffers,
        (tn, tm, 1),
        (32, 2, 2),
        before=("steel/gemm/gemm.h",),
        constants={"align_M": M % 32 == 0, "align_N": N % 32 == 0, "align_K": K % 16 == 0},
        misalign=False,
    )
    check(d, a.astype(F) @ b.astype(F).T, dtype)


@pytest.mark.parametrize(("q", "k", "D", "causal"), [(64, 64, 64, False), (50, 77, 128, True)])
@shipped
def test_mlx_flash_attention(q, k, D, causal):
    B, H, Hk, BQ, BK, dtype = 1, 2, 1, 32, (16 if D == 128 else 32), mx.float16
    mx.random.seed(2)
    shapes = (B, H, q, D), (B, Hk, k, D), (B, Hk, k, D)
    queries, keys, values = (mx.random.normal(s).astype(dtype) for s in shapes)
    nq, nk = -(-q // BQ), -(-k // BK)
    p = np.zeros(1, np.dtype([("i", "i4", 6), ("s", "f4"), ("j", "i4", 7), ("st", "i8", 12)]))
    p["i"], p["s"] = (B, H, D, q, k, H // Hk), D**-0.5
    p["j"] = (nq, nk, q // BQ, k // BK, q % BQ, k % BK, k - q)
    p["st"] = (H * q * D, q * D, D, *(2 * (Hk * k * D, k * D, D)), H * q * D, q * D, D)
    out = empty((B, H, q, D), dtype)
    buffers = [*inputs(*(to_numpy(a) for a in (queries, keys, values))), (3, "out", out, True)]
    buffers += [(4, "p", p.view(np.uint8), False), *unused(5, 5, 24), *unused(6, 8)]
    mslemu.mlx_kernel(
        "steel/attn/kernels/steel_attention.h",
        "attention",
        f"<half, {BQ}, {BK}, {D}, {D}, 4, 1, float, float>",
        buffers,
        (nq, H, B),
        (32, 4, 1),
        before=("steel/attn/attn.h",),
        constants={"align_Q": q % BQ == 0, "align_K": k % BK == 0, "do_causal": causal},
        misalign=False,
    )
    wide = (a.astype(F) for a in (queries, keys, values))
    expected = mx.fast.scaled_dot_product_attention(*wide, scale=D**-0.5, mask="causal" if causal else None)
    check(out, expected, dtype)


@shipped
def test_mlx_decode_attention():
    H, Hk, N, D, dtype = 4, 2, 77, 128, mx.bfloat16
    mx.random.seed(3)
    queries, keys, values = (mx.random.normal((1, h, n, D)).astype(dtype) for h, n in ((H, 1), (Hk, N), (Hk, N)))
    out, u64 = empty((1, H, 1, D), dtype), [np.array([v], np.uint64) for v in (N * D, D, N * D, D)]
    buffers = [*inputs(*(to_numpy(a) for a in (queries, keys, values))), (3, "out", out, True)]
    buffers += [*inputs(i32(H // Hk), i32(N), *u64, np.array([D**-0.5], np.float32), start=4), *unused(11, 17)]
    name = f"<bfloat16_t, {D}>"
    mslemu.mlx_kernel("sdpa_vector.h", "sdpa_vector", name, buffers, (H, 1, 1), (1024, 1, 1), misalign=False)
    wide = (a.astype(F) for a in (queries, keys, values))
    check(out, mx.fast.scaled_dot_product_attention(*wide, scale=D**-0.5), dtype)


@pytest.mark.parametrize(("rows", "N", "dtype"), [(3, 130, F), (2, 513, mx.bfloat16)])
@shipped
def test_mlx_softmax(rows, N, dtype):
    mx.random.seed(4)
    x, out = mx.random.normal((rows, N)).astype(dtype), empty((rows, N), dtype)
    threads = ((N + 3) // 4 + 31) // 32 * 32
    buffers = [(0, "x", to_numpy(x), False), (1, "out", out, True), (2, "n", i32(N), False)]
    name = f"<{NAMES[dtype]}, float>"
    mslemu.mlx_kernel("softmax.h", "softmax_single_row", name, buffers, (rows, 1, 1), (threads, 1, 1))
    check(out, mx.softmax(x.astype(F), axis=-1), dtype)


@pytest.mark.parametrize("dtype", [F, mx.float16], ids=str)
@shipped
def test_mlx_cross_entropy(dtype):
    rows, N = 5, 700
    mx.random.seed(5)
    logits, targets = (3 * mx.random.normal((rows, N))).astype(dtype), mx.array([0, 699, 5, -1, 300])
    out = empty((rows,), F)
    buffers = [*inputs(to_numpy(logits), to_numpy(targets)), (2, "out", out, True), (3, "n", i32(N), False)]
    mslemu.mlx_kernel(
        "cross_entropy.h",
        "cross_entropy",
        f"<{NAMES[dtype]}, float>",
        buffers,
        (rows, 1, 1),
        (64, 1, 1),
    )
    wide = logits.astype(F)
    picked = mx.take_along_axis(wide, (targets % N)[:, None], axis=-1)[:, 0]
    assert_close(mx.array(out), mx.logsumexp(wide, axis=-1) - picked, 2e-6)


# -- what is refused -------------------------------------------------------------------------------------------------


def run(source, *, x=None, threads=64, group=64, out=64, header="", **options):
    with mslemu.installed(**options):
        kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=source, header=header)
        return kernel(
            inputs=[mx.arange(64).astype(F) if x is None else x],
            grid=(threads, 1, 1),
            threadgroup=(group, 1, 1),
            output_shapes=[(out,)],
            output_dtypes=[F],
        )[0]


HEAD = "uint i = thread_position_in_grid.x;\n"
REFUSED = {
    "out-of-bounds read": HEAD + "y[i] = x[i + 1];",
    "out-of-bounds write": HEAD + "y[i + 1] = x[i];",
    "never written": HEAD + "if (i < 63) y[i] = x[i];",
    "write to read-only input": HEAD + "((device float*)x)[i] = 1; y[i] = 0;",
    "data race on t": HEAD + "threadgroup float t[64]; t[63 - i] = 0; threadgroup_barrier(mem_flags::mem_threadgroup); "
    "t[i] = x[i]; y[i] = t[63 - i];",
    "data race on y": HEAD + "y[i / 2] = x[i]; if (i < 32) y[32 + i] = 0;",
    "between threadgroups": HEAD + "y[i % 32] = 0; if (i < 32) y[32 + i] = 0;",
    "read of uninitialised t": HEAD + "threadgroup float t[64]; y[i] = t[i];",
    "out-of-bounds read of 4 B in threadgroup": HEAD + "threadgroup float t[64]; t[i] = 0; y[i] = t[64];",
    "divergent simdgroup operation simd_sum": HEAD + "float s = x[i]; if (i % 2) s = simd_sum(s); y[i] = s;",
    "not reached by every thread": HEAD + "if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = x[i];",
    "exceeds 32768": HEAD + "threadgroup float t[8193]; t[i] = x[i]; y[i] = t[i];",
    "misaligned 16 B": HEAD + "float4 v = ((const device float4*)x)[i / 4]; y[i] = v.x + v.y + v.z + v.w;",
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    group = 32 if message == "between threadgroups" else 64
    with pytest.raises(mslemu.EmuError, match=message):
        run(REFUSED[message], group=group)


@pytest.mark.parametrize(
    "source",
    [
        HEAD + "const float* p = x; y[i] = p[i];",
        HEAD + "threadgroup float t[64]; device float* p = t; y[i] = p[i];",
        HEAD + "y[i] = x_strides[0] * nothing;",
    ],
)
def test_does_not_compile(source):
    with pytest.raises(CompileError):
        run(source)


def test_address_space_of_small_arrays():
    """MLX passes fewer than 8 elements as `constant`: a helper that takes `device` breaks for them alone."""
    header = "METAL_FUNC float first(const device float* p) { return p[0]; }\n"
    run(HEAD + "y[i] = first(x);", header=header)
    with pytest.raises(CompileError):
        run(HEAD + "y[i] = first(x);", header=header, x=mx.ones(7))


def test_order_of_sums_is_random():
    x = mx.random.normal((64,), key=mx.random.key(0))
    sums = {run(HEAD + "y[i] = simd_sum(x[i]);", x=x, seed=seed)[0].item() for seed in range(20)}
    assert len(sums) > 1 and max(sums) - min(sums) < 1e-5
    steady = {run(HEAD + "y[i] = simd_sum(x[i]);", x=x, schedule="forward", seed=s)[0].item() for s in range(5)}
    assert len(steady) == 1


@pytest.mark.parametrize(("stride", "transactions"), [(1, 2), (2, 4), (32, 64)])
def test_transactions(stride, transactions):
    run(HEAD + f"y[i] = x[i * {stride}];", x=mx.zeros(64 * 32), coalescing=True, misalign=False)
    assert mslemu.log[-1].buffers["x"]["transactions"] == transactions


def test_gradients_and_checkpoints():
    def double(x):
        return run(HEAD + "y[i] = 2 * x[i];", x=x)

    operation = mx.custom_function(double)
    operation.vjp(lambda primals, cotangent, _: 2 * cotangent)
    x = mx.arange(64).astype(F)
    with mslemu.installed():
        for f in (operation, mx.checkpoint(operation), mx.compile(operation)):
            assert mx.array_equal(mx.grad(lambda x, f=f: (f(x) * x).sum())(x), 4 * x).item()


def test_lint():
    found = mslemu.lint("double d = 1;\nfloat* p = 0;\nfloat2 v = (float2)(x);\nauto f = [&](int i) { return i; };")
    assert [line for line, _ in found] == [1, 2, 3, 4]
    assert mslemu.lint("const device float* p = x; float2 v = float2(1, 2); // double\n") == []


def test_other_machines_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert "x86-64 Linux, not" in mslemu.unavailable()
