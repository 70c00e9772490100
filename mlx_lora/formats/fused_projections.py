"""One matrix here, several there: fused projections (qkv, gate and up) and the order of rows under rotary embeddings.

Everything is about ``lora_b`` [r, out] and ``m`` [out], whose columns are the layer's outputs. Knows no format.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..adapter import Adapter, explicit_config, split_layer
from ..base.names import BaseModel
from ..errors import FormatError

_MERGE = "Merge it into the model instead: convert --to merged."
_THERE = "Merge it into the model with the tool that trained it."
Pair = tuple[mx.array, mx.array]  # lora_a [in, r], lora_b [r, out]


def split(pair: Pair, sizes: list[int]) -> list[Pair]:
    """One adapter over outputs of ``sizes`` as one for each part: A is shared.

    Ranks that reach one part alone go to that part (the inverse of ``join``).
    """
    a, b = pair
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = mx.split(b, ends, axis=1)
    reach = [part.any(axis=1) for part in parts]  # which ranks a part feels
    mx.eval(reach)
    lone = sum(r.astype(mx.int32) for r in reach)
    if not (lone > 1).any().item() and (lone > 0).any().item():
        found = []
        for part, felt in zip(parts, reach, strict=True):
            rows = [i for i, flag in enumerate(felt.tolist()) if flag] or [0]
            found.append((a[:, rows[0] : rows[-1] + 1], part[rows[0] : rows[-1] + 1]))
        return found
    return [(a, part) for part in parts]


def join(pairs: list[Pair | None], sizes: list[int]) -> Pair:
    """Adapters of the parts as one over all: one A where all share it, else the ranks side by side, block by block.

    A part without an adapter (None) gets zeros.
    """
    there = [pair for pair in pairs if pair is not None]
    first = there[0][0]
    shared = all(a.shape == first.shape and mx.array_equal(a, first).item() for a, _ in there[1:])
    rows, rank = [], sum(a.shape[1] for a, _ in there)
    if shared:
        zeros = [mx.zeros((first.shape[1], size), there[0][1].dtype) for size in sizes]
        return first, mx.concatenate([z if p is None else p[1] for p, z in zip(pairs, zeros, strict=True)], axis=1)
    before = 0
    for place, pair in enumerate(pairs):
        if pair is None:
            continue
        left, right = sum(sizes[:place]), sum(sizes[place + 1 :])
        rows.append(mx.pad(pair[1], [(0, 0), (left, right)]))
        before += pair[0].shape[1]
    assert before == rank
    return mx.concatenate([a for a, _ in there], axis=1), mx.concatenate(rows)


def to_interleaved(array: mx.array, heads: int) -> mx.array:
    """Rows (the last axis) from transformers' order, halves of a head apart, to Meta's, pairs side by side."""
    return _turn(array, heads, 2)


def from_interleaved(array: mx.array, heads: int) -> mx.array:
    """The inverse of ``to_interleaved``."""
    return _turn(array, heads, array.shape[-1] // heads // 2)


def _turn(array: mx.array, heads: int, first: int) -> mx.array:
    front = array.shape[:-1]
    second = array.shape[-1] // heads // first
    return array.reshape(*front, heads, first, second).swapaxes(-1, -2).reshape(array.shape)


def qkv_to_groups(q: mx.array, k: mx.array, v: mx.array, kv_heads: int) -> mx.array:
    """Megatron's order: for each group of heads its q heads, its k head, its v head; [..., out] each."""
    front = q.shape[:-1]
    parts = [x.reshape(*front, kv_heads, -1) for x in (q, k, v)]
    return mx.concatenate(parts, axis=-1).reshape(*front, -1)


def qkv_from_groups(qkv: mx.array, heads: int, kv_heads: int) -> tuple[mx.array, mx.array, mx.array]:
    """The inverse of ``qkv_to_groups``."""
    front = qkv.shape[:-1]
    head = qkv.shape[-1] // (heads + 2 * kv_heads)
    grouped = qkv.reshape(*front, kv_heads, -1)
    ends = [heads // kv_heads * head, heads // kv_heads * head + head]
    q, k, v = mx.split(grouped, ends, axis=-1)
    return tuple(x.reshape(*front, -1) for x in (q, k, v))


# Modules of Phi-3 and their parts in systems that have one matrix for each.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def _sizes(fused: str, base: BaseModel) -> list[int]:
    if fused.endswith("qkv_proj"):
        return [n * base.head_dim for n in (base.heads, base.kv_heads, base.kv_heads)]
    return [base.size("intermediate_size")] * 2


def fused(adapter: Adapter, base: BaseModel) -> Adapter:
    """``adapter`` of parts as one of ``base``'s own modules, where they are one matrix each (Phi-3)."""
    if base.model_type != "phi3":
        return adapter
    weights, scales = dict(adapter.weights), {path: adapter.config.scale_of(path) for path in adapter.modules}
    for whole, pieces in _FUSED.items():
        for layer in sorted({split_layer(path)[0] for path in scales if split_layer(path)[1] in pieces}):
            paths, path = [f"model.layers.{layer}.{piece}" for piece in pieces], f"model.layers.{layer}.{whole}"
            if any(f"{p}.m" in weights for p in paths):
                raise FormatError(f"{paths[0]}: magnitudes of parts do not join into those of {whole}", _THERE)
            pairs = [
                (weights.pop(f"{p}.lora_a"), weights.pop(f"{p}.lora_b")) if f"{p}.lora_b" in weights else None
                for p in paths
            ]
            weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = join(pairs, _sizes(whole, base))
            there = {scales.pop(p) for p in paths if p in scales}
            if len(there) != 1:
                raise FormatError(f"{path}: its parts differ in scale", _THERE)
            scales[path] = there.pop()
    return _with(adapter, weights, scales)


def unfused(adapter: Adapter, base: BaseModel) -> Adapter:
    """The inverse of ``fused``."""
    if base.model_type != "phi3":
        return adapter
    weights, scales = dict(adapter.weights), {path: adapter.config.scale_of(path) for path in adapter.modules}
    for path in adapter.modules:
        layer, name = split_layer(path)
        if name not in _FUSED:
            continue
        if f"{path}.m" in weights:
            raise FormatError(f"{path}: its magnitudes do not divide into those of its parts", _MERGE)
        scale, pair = scales.pop(path), (weights.pop(f"{path}.lora_a"), weights.pop(f"{path}.lora_b"))
        for piece, (a, b) in zip(_FUSED[name], split(pair, _sizes(name, base)), strict=True):
            stem = f"model.layers.{layer}.{piece}"
            weights[f"{stem}.lora_a"], weights[f"{stem}.lora_b"], scales[stem] = a, b, scale
    return _with(adapter, weights, scales)


def _with(adapter: Adapter, weights: dict[str, mx.array], scales: dict[str, float]) -> Adapter:
    ranks = {path: weights[f"{path}.lora_b"].shape[0] for path in scales}
    return replace(adapter, weights=weights, config=explicit_config(adapter.config, ranks, scales))
