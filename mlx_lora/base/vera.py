"""VeRA's shared projections (arXiv:2310.11454), bit for bit as PEFT draws them, and VeRA converted to LoRA.

PEFT draws the two matrices (Kaiming uniform) on the CPU with torch's generator. ``draw_projections`` returns the same
bits without torch, so that an adapter that stores only the seed computes the same in both libraries. Works on arrays,
not on layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..adapter import SHARED, Adapter, explicit_config

_BLOCK = 1 << 22  # values drawn at once


def draw_projections(rank: int, columns: int, rows: int, key: int = 0) -> tuple[mx.array, mx.array]:
    """PEFT's shared projections, bit for bit: A [rank, columns] and B [rows, rank], float32.

    Args:
        columns, rows: the largest input and the largest output of the adapted modules.
        key: ``projection_prng_key``; torch seeds its generator with the lower 32 bits.
    """
    generator = np.random.RandomState(key & 0xFFFFFFFF)
    return _kaiming(generator, (rank, columns)), _kaiming(generator, (rows, rank))


def _kaiming(generator: np.random.RandomState, shape: tuple[int, int]) -> mx.array:
    """U(-bound, bound), bound = sqrt(6 / shape[1]). torch uses 24 bits of each draw and rounds once."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    low, high = np.float32(-bound), np.float32(bound)
    span, low = np.float64(high - low), np.float64(low)
    flat = np.empty(math.prod(shape), np.float32)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        bits = generator.randint(0, 2**32, size=part.size, dtype=np.uint32) & np.uint32((1 << 24) - 1)
        part[:] = bits * 2.0**-24 * span + low  # float64: the product is exact, so this is the fused multiply-add
    return mx.array(flat.reshape(shape))


def shared_dims(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(columns, rows) of the projections for modules of these (in, out) sizes: the largest of each."""
    sizes = list(sizes)
    return max(i for i, _ in sizes), max(o for _, o in sizes)


def pair_as_lora(d: mx.array, b: mx.array, big_a: mx.array, big_b: mx.array, columns: int) -> tuple[mx.array, mx.array]:
    """The LoRA pair (scale 1, float32) that computes the same update as VeRA's vectors.

    Args:
        d: ``vera_lambda_d`` [r], or [experts, r] for experts.
        b: ``vera_lambda_b`` [out], or [experts, out].
        big_a: [r, at least in]. big_b: [at least out, r].
        columns: the module's input size.

    Returns: ``lora_a`` [in, r] and ``lora_b`` [r, out]; for experts [experts, r, in] and [experts, out, r].
    """
    d, b, big_a, big_b = (array.astype(mx.float32) for array in (d, b, big_a, big_b))
    a, b = d[..., None] * big_a[:, :columns], b[..., None] * big_b[: b.shape[-1]]
    return (a, b) if d.ndim == 2 else (a.T, b.T)


def adapter_as_lora(adapter: Adapter, sizes: dict[str, tuple[int, int]]) -> Adapter:
    """The LoRA adapter of scale 1 that computes the same as a VeRA adapter.

    Args:
        sizes: (in, out) of every adapted module.
    """
    config, paths = adapter.config, adapter.modules
    if SHARED[0] in adapter.weights:
        pair = tuple(adapter.weights[name] for name in SHARED)
    else:
        pair = draw_projections(config.rank, *shared_dims(sizes[path] for path in paths), config.projection_prng_key)
    weights = {name: array for name, array in adapter.weights.items() if "vera_" not in name}
    for path in paths:
        vectors = (adapter.weights[f"{path}.{leaf}"] for leaf in ("vera_lambda_d", "vera_lambda_b"))
        weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = pair_as_lora(*vectors, *pair, sizes[path][0])
    config = replace(config, method="lora", scale=1.0, projection_prng_key=0, save_projection=True, d_initial=0.1)
    ranks = dict.fromkeys(paths, config.rank)
    return replace(adapter, config=explicit_config(config, ranks, dict.fromkeys(paths, 1.0)), weights=weights)
