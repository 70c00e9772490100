"""One rank and one scale for all modules, computing the same function: what most systems can hold.

Smaller ranks are padded with zeros, differing scales folded into ``lora_b``. Knows no format.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import mlx.core as mx

from ..adapter import Adapter, raise_faults
from ..base.names import BaseModel
from ..base.vera import adapter_as_lora
from ..config import AdapterConfig
from ..errors import FormatError

_NAME_BASE = "Name the base: --model, or base=."


def fold(adapter: Adapter, config: AdapterConfig) -> dict[str, mx.array]:
    """The weights with ``config.rank`` and ``config.scale`` for all modules, computing the same function."""
    weights = dict(adapter.weights)
    for path in adapter.modules:
        a, b = f"{path}.lora_a", f"{path}.lora_b"
        if (factor := config.scale_of(path) / config.scale) != 1:
            for name in (b, f"{path}.lora_bias"):
                if name in weights:
                    # stays float32: half precision would round it
                    weights[name] = weights[name].astype(mx.float32) * factor
        if (more := config.rank - config.rank_of(path)) > 0:
            weights[a] = _pad(weights[a], more, axis=1)  # [in, r] and, for experts, [experts, r, in]
            weights[b] = _pad(weights[b], more, axis=weights[b].ndim - 1 if weights[b].ndim == 3 else 0)
    return weights


def unfold(adapter: Adapter) -> Adapter:
    """The inverse of ``fold``: ranks exactly, scales to a rounding in float32, which half precision does not see."""
    weights, config = dict(adapter.weights), adapter.config
    for path in adapter.modules:
        a, b = f"{path}.lora_a", f"{path}.lora_b"
        if a not in weights or b not in weights:
            continue  # ``check`` names what is missing
        rank = config.rank_of(path)
        if weights[a].ndim == 3:
            weights[a], weights[b] = weights[a][:, :rank], weights[b][..., :rank]
        else:
            weights[a], weights[b] = weights[a][:, :rank], weights[b][:rank]
        if (factor := config.scale_of(path) / config.scale) != 1:
            for name in (b, f"{path}.lora_bias"):
                if name in weights:
                    weights[name] = (weights[name].astype(mx.float32) / factor).astype(weights[a].dtype)
    return replace(adapter, weights=weights)


def uniform(adapter: Adapter, alpha: float | None = None, integer: bool = False, pad: bool = True) -> Adapter:
    """``adapter`` with one alpha for all modules and, with ``pad``, one rank.

    Args:
        alpha: the alpha to have; the adapter's own by default.
        integer: take the rank for alpha where the adapter's own is not a whole number.
        pad: without it ranks stay as they are, and scales are folded so that alpha / rank of each module is right.
    """
    largest = max(adapter.rank_of(path) for path in adapter.modules)
    exact = adapter.exact_config(rank=largest if pad else None)
    if alpha is None:
        alpha = integral(exact.scale * exact.rank)
        if integer and not isinstance(alpha, int):
            alpha = exact.rank
    if pad:
        target = replace(exact, scale=alpha / exact.rank)
        if target.scale != exact.scale:  # the commonest modules are folded too
            scales = {f"^{re.escape(path)}": exact.scale_of(path) for path in adapter.modules}
            target = replace(target, scale_pattern=scales)
        weights = fold(adapter, target)
        return replace(adapter, weights=weights, config=replace(target, rank_pattern={}, scale_pattern={}))
    weights, scales = dict(adapter.weights), {}
    for path in adapter.modules:
        scales[path] = alpha / adapter.rank_of(path)
        if (factor := exact.scale_of(path) / scales[path]) != 1 and not math.isclose(factor, 1, rel_tol=1e-12):
            for name in (f"{path}.lora_b", f"{path}.lora_bias"):
                if name in weights:
                    weights[name] = weights[name].astype(mx.float32) * factor
    pattern = {f"^{re.escape(path)}": scale for path, scale in scales.items() if scale != alpha / exact.rank}
    config = replace(exact, scale=alpha / exact.rank, scale_pattern=pattern)
    return replace(adapter, weights=weights, config=config)


def as_lora(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """A VeRA adapter (arXiv:2310.11454) as the LoRA it is: A' = diag(lambda_d) A, B' = diag(lambda_b) B, scale 1.

    ``base`` tells the modules' inputs, and what the projections are drawn for where the adapter does not hold them.
    """
    if adapter.config.method != "vera":
        return adapter
    paths = adapter.modules
    strange = [path for path in paths if base is None or path not in base.modules]
    raise_faults([f"{path}: the size of this layer's input is not known" for path in strange], _NAME_BASE, FormatError)
    many = [path for path in paths if adapter.weights[f"{path}.vera_lambda_d"].ndim != 1]
    raise_faults(
        [f"{path}: VeRA of experts is not converted" for path in many],
        "Leave the experts out of the adapter, or merge it: convert --to merged.",
        FormatError,
    )
    return adapter_as_lora(adapter, {path: base.modules[path][1:3] for path in paths})


def integral(alpha: float) -> int | float:
    """16.000000001 -> 16: alpha is scale * rank, and readers in Go and C want an integer."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _pad(array: mx.array, more: int, axis: int) -> mx.array:
    return mx.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])
