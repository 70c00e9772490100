"""``lora_qmv``: a base layer and its low-rank update in one launch, for a few rows of x."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from .lora_shrink import tiles
from .registry import Launch, enabled, maker, with_reference
from .stored import Form, Stored

MAX_RANK = 256  # 8 * rank floats lie in threadgroup memory
_ROWS = 4  # rows of W to a simdgroup; each of its 32 lanes writes one number of at most 8 rows of x


def lora_qmv(
    x: mx.array,
    base: Stored,
    u: mx.array,
    b: mx.array,
    scale: mx.array,
    offset: mx.array,
    *,
    bias: mx.array | None = None,
    gain: mx.array | None = None,
    index: mx.array | None = None,
    ranks: mx.array | None = None,
) -> mx.array:
    """A linear layer with its adapter.

    Semantics::

        low = u.sum(axis=0)[:, offset[0] : offset[0] + r]
        y = x @ W.T + scale * (low @ b)                                          # one adapter: b is [r, N]
        y[m] = x[m] @ W.T + scale[i] * (low[m] @ b[i]), i = index[m], no update where negative   # b: [adapters, r, N]
        return (gain * y + bias).astype(x.dtype)

    Args:
        x: [M, K]. base: W [N, K] in any storage. u: from ``lora_shrink``. offset: int32 [1], the first column.
        scale: float32 [1], or [adapters]. bias: [N]. gain: [N] (DoRA's). index: [M] int32; ranks: [adapters] int32.

    Returns: [M, N] in the dtype of x.
    """
    arrays = {"x": x, **base.arrays(), "u": u, "b": b, "scale": scale, "offset": offset}
    optional = {"bias": bias, "gain": gain, "idx": index, "ranks": ranks}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    return with_reference(_metal, _reference, tuple(arrays), base.form(), enabled("lora_qmv"))(*arrays.values())


def base_qmv(x: mx.array, base: Stored) -> mx.array:
    """A base layer without adapter, for storage that MLX has no product for.

    Semantics: ``(x @ W.T).astype(x.dtype)``. x: [M, K], M up to MAX_ROWS; base: W [N, K]. Returns [M, N].
    """
    u, b, scale, offset = _no_update(x.shape[0], base.shape[0], x.dtype)
    return lora_qmv(x, base, u, b, scale, offset)


@functools.lru_cache(maxsize=256)
def _no_update(M: int, N: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """u, b, scale and offset of a zero update of rank 1, which costs next to nothing compared with W."""
    made = mx.zeros((1, M, 1)), mx.zeros((1, N), dtype), mx.zeros((1,)), mx.zeros((1,), mx.int32)
    mx.eval(made)
    return made


def _reference(names: tuple[str, ...], form: Form, *arrays: mx.array) -> mx.array:
    known = dict(zip(names, arrays, strict=True))
    x, b = known["x"].astype(mx.float32), known["b"].astype(mx.float32)
    u, index = known["u"].sum(axis=0), known.get("idx")
    columns = known["offset"] + mx.arange(b.shape[-2])
    low = mx.take(u, columns, axis=-1)
    if index is None:
        update = known["scale"] * (low @ b)
    else:
        safe = mx.maximum(index, 0)
        counts = (mx.arange(b.shape[-2]) < known["ranks"][safe][:, None]) & (index >= 0)[:, None]
        low = mx.where(counts, low, 0)
        update = known["scale"][safe][:, None] * (low[:, None] @ b[safe])[:, 0]
    y = x @ Stored.of(known, form).dequantized().T + update
    if "gain" in known:
        y = known["gain"] * y
    if "bias" in known:
        y = y + known["bias"]
    return y.astype(known["x"].dtype)


def _metal(names: tuple[str, ...], form: Form, *arrays: mx.array) -> mx.array:
    known = form.arrays(dict(zip(names, arrays, strict=True)))
    (M, K), u, (R, N) = known["x"].shape, known["u"], known["b"].shape[-2:]
    launch = qmv_launch(maker(), tuple(known), form, known["x"].dtype, (M, K, R, N), u.shape[0])
    return launch(list(known.values()), (M, N))


@functools.lru_cache(maxsize=1024)
def qmv_launch(
    make: Callable, names: tuple[str, ...], form: Form, dtype: mx.Dtype, sizes: tuple[int, int, int, int], splits: int
) -> Launch:
    """The launch for inputs of these names and sizes.

    Args:
        make: ``maker()``, so that an emulator gets its own launches. sizes: (rows of x, in, rank, out).
        splits: of ``lora_shrink``.
    """
    N = sizes[3]
    # Wide threadgroups share cache lines of b; a narrow layer's few rows must spread over the whole GPU.
    simdgroups = 8 if N >= 8192 else 4 if N >= 2048 else 2
    defines = [name for key, name in (("bias", "HAS_BIAS"), ("gain", "HAS_GAIN"), ("idx", "INDEXED")) if key in names]
    return rows_launch("lora_qmv", names, form, dtype, sizes, splits, _ROWS, simdgroups, defines)


def rows_launch(
    name: str,
    names: tuple[str, ...],
    form: Form,
    dtype: mx.Dtype,
    sizes: tuple[int, int, int, int],
    splits: int,
    rows: int,
    simdgroups: int,
    defines: list[str],
) -> Launch:
    """The launch of a kernel from x [M, K] to y [M, N], with ``rows`` columns of y per simdgroup."""
    M, K, R, N = sizes
    count, M = tiles(M)
    constants = {"T": dtype, "BITS": form.bits, "GROUP": form.group_size, "M": M, "TILED": int(count > 1)}
    constants |= {"K": K, "R": R, "SPLITS": splits, "ROWS": rows, "NSG": simdgroups}
    return Launch(
        name,
        names,
        ("y", dtype),
        defines=(*form.defines(names), *defines),
        constants=constants,
        groups=(count, -(-N // (rows * simdgroups)), 1),
        threadgroup=(32, simdgroups, 1),
    )
