"""Fused projections (q, k and v in one matrix; gate and up in one) and the row orders of rotary embeddings.

Some systems store one matrix where others store several. This module changes ``lora_b`` [r, out] and ``m`` [out],
whose last axis is the layer's outputs (the rows of W). It knows no format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from ..adapter import Adapter, explicit_config, split_layer
from ..base.names import BaseModel
from ..errors import FormatError
from .options import MERGE

_MERGE_THERE = "Merge it into the model with the tool that trained it."
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
Pair = tuple[mx.array, mx.array]  # lora_a [in, r], lora_b [r, out]


def split_outputs(pair: Pair, sizes: list[int]) -> list[Pair]:
    """Split a fused projection's adapter into one adapter per projection, with ``sizes`` outputs.

    All share A, unless each rank acts on one projection only: then each gets its own ranks (the inverse of
    ``join_outputs``).
    """
    a, b = pair
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    pieces = mx.split(b, ends, axis=1)
    used = [piece.any(axis=1) for piece in pieces]  # which ranks act on which projection
    mx.eval(used)
    times_used = sum(u.astype(mx.int32) for u in used)
    if (times_used > 1).any().item() or not (times_used > 0).any().item():
        return [(a, piece) for piece in pieces]
    found = []
    for piece, flags in zip(pieces, used, strict=True):
        ranks = [i for i, flag in enumerate(flags.tolist()) if flag] or [0]
        own = slice(ranks[0], ranks[-1] + 1)
        found.append((a[:, own], piece[own]))
    return found


def join_outputs(pairs: list[Pair | None], sizes: list[int]) -> Pair:
    """Join adapters of projections into one for the fused projection: one A if all share it, else a block-diagonal B.

    A projection without an adapter (None) gets zeros.
    """
    present = [pair for pair in pairs if pair is not None]
    first = present[0][0]
    if all(same_array(a, first) for a, _ in present[1:]):
        zeros = [mx.zeros((first.shape[1], size), present[0][1].dtype) for size in sizes]
        return first, mx.concatenate([z if p is None else p[1] for p, z in zip(pairs, zeros, strict=True)], axis=1)
    blocks = [
        mx.pad(pair[1], [(0, 0), (sum(sizes[:i]), sum(sizes[i + 1 :]))])
        for i, pair in enumerate(pairs)
        if pair is not None
    ]
    return mx.concatenate([a for a, _ in present], axis=1), mx.concatenate(blocks)


def same_array(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and mx.array_equal(a, b).item()


# -- rotary embeddings -----------------------------------------------------------------------------------------------


def to_interleaved(array: mx.array, heads: int) -> mx.array:
    """Rows (the last axis) from transformers' order (rotated pairs half a head apart) to Meta's (adjacent pairs)."""
    return _transpose_heads(array, heads, (2, -1))


def from_interleaved(array: mx.array, heads: int) -> mx.array:
    """The inverse of ``to_interleaved``."""
    return _transpose_heads(array, heads, (-1, 2))


def _transpose_heads(array: mx.array, heads: int, shape: tuple[int, int]) -> mx.array:
    return array.reshape(*array.shape[:-1], heads, *shape).swapaxes(-1, -2).reshape(array.shape)


def reorder_q_and_k(
    weights: dict[str, mx.array], base: BaseModel, reorder: Callable[[mx.array, int], mx.array]
) -> dict[str, mx.array]:
    """An adapter's arrays with the rows of ``q_proj`` and ``k_proj`` in another order.

    Args:
        reorder: ``to_interleaved`` or ``from_interleaved``.
    """
    found = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        heads = {"q_proj": base.heads, "k_proj": base.kv_heads}.get(path.rpartition(".")[2])
        if heads and leaf != "lora_a":
            if array.shape[-1] % (2 * heads):
                raise FormatError(
                    f"{name}: {array.shape[-1]} rows do not divide into the {heads} heads of {base.name}",
                    "Name the base that it was trained on: --model, or base=.",
                )
            array = reorder(array, heads)
        found[name] = array
    return found


# -- Megatron's order of q, k and v ----------------------------------------------------------------------------------


def qkv_to_groups(q: mx.array, k: mx.array, v: mx.array, kv_heads: int) -> mx.array:
    """Rows (the last axis) of q, k and v in Megatron's order: for each key-value head its q heads, its k, its v."""
    front = q.shape[:-1]
    grouped = [x.reshape(*front, kv_heads, -1) for x in (q, k, v)]
    return mx.concatenate(grouped, axis=-1).reshape(*front, -1)


def qkv_from_groups(qkv: mx.array, heads: int, kv_heads: int) -> tuple[mx.array, mx.array, mx.array]:
    """The inverse of ``qkv_to_groups``."""
    front = qkv.shape[:-1]
    head = qkv.shape[-1] // (heads + 2 * kv_heads)
    grouped = qkv.reshape(*front, kv_heads, -1)
    ends = [heads // kv_heads * head, heads // kv_heads * head + head]
    q, k, v = mx.split(grouped, ends, axis=-1)
    return tuple(x.reshape(*front, -1) for x in (q, k, v))


# -- Phi-3, whose own modules are fused ------------------------------------------------------------------------------

_PHI3 = {
    "self_attn.qkv_proj": tuple(f"self_attn.{name}" for name in QKV),
    "mlp.gate_up_proj": tuple(f"mlp.{name}" for name in GATE_UP),
}


def _sizes(fused: str, base: BaseModel) -> list[int]:
    if fused.endswith("qkv_proj"):
        return [n * base.head_dim for n in (base.heads, base.kv_heads, base.kv_heads)]
    return [base.size("intermediate_size")] * 2


def fuse_projections(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """An adapter of q, k, v, gate and up as one for ``base``'s own modules, if these are fused (Phi-3)."""
    if base is None or base.model_type != "phi3":
        return adapter
    weights, scales = dict(adapter.weights), {path: adapter.config.scale_of(path) for path in adapter.modules}
    for fused, names in _PHI3.items():
        for layer in sorted({split_layer(path)[0] for path in scales if split_layer(path)[1] in names}):
            path, paths = f"model.layers.{layer}.{fused}", [f"model.layers.{layer}.{name}" for name in names]
            if any(f"{p}.m" in weights for p in paths):
                raise FormatError(f"{paths[0]}: DoRA's magnitudes cannot be joined into those of {fused}", _MERGE_THERE)
            pairs = [
                (weights.pop(f"{p}.lora_a"), weights.pop(f"{p}.lora_b")) if f"{p}.lora_b" in weights else None
                for p in paths
            ]
            weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = join_outputs(pairs, _sizes(fused, base))
            own_scales = {scales.pop(p) for p in paths if p in scales}
            if len(own_scales) != 1:
                raise FormatError(f"{path}: the scales of {', '.join(names)} differ", _MERGE_THERE)
            scales[path] = own_scales.pop()
    return _replaced(adapter, weights, scales)


def split_projections(adapter: Adapter, base: BaseModel) -> Adapter:
    """The inverse of ``fuse_projections``."""
    if base.model_type != "phi3":
        return adapter
    weights, scales = dict(adapter.weights), {path: adapter.config.scale_of(path) for path in adapter.modules}
    for path in adapter.modules:
        layer, fused = split_layer(path)
        if fused not in _PHI3:
            continue
        if f"{path}.m" in weights:
            raise FormatError(f"{path}: DoRA's magnitudes cannot be split into those of q, k, v, gate and up", MERGE)
        scale, pair = scales.pop(path), (weights.pop(f"{path}.lora_a"), weights.pop(f"{path}.lora_b"))
        for name, (a, b) in zip(_PHI3[fused], split_outputs(pair, _sizes(fused, base)), strict=True):
            own = f"model.layers.{layer}.{name}"
            weights[f"{own}.lora_a"], weights[f"{own}.lora_b"], scales[own] = a, b, scale
    return _replaced(adapter, weights, scales)


def _replaced(adapter: Adapter, weights: dict[str, mx.array], scales: dict[str, float]) -> Adapter:
    ranks = {path: weights[f"{path}.lora_b"].shape[0] for path in scales}
    return replace(adapter, weights=weights, config=explicit_config(adapter.config, ranks, scales))
