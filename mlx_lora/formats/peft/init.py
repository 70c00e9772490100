"""Adapters of PEFT whose start changed the base: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775).

Both take a part of the weight, W0 = s B0 A0, out of the base and train it: such an adapter means something only on the
base without that part. It becomes one for the base as published, s (B A - B0 A0), of twice the rank:
A' = [A; A0], B' = [B, -B0], as PEFT's own ``path_initial_model_for_weight_conversion`` has it. W0 is computed again
from the base's weights. Starts that cannot be (randomized, quantized, from data or gradients) are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...adapter import Adapter, raise_faults
from ...base.decompositions import olora_pair, pissa_pair
from ...errors import FormatError
from ..options import Reading

_MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_COMPUTED = ("pissa", "olora")


def mutates(start: str) -> bool:
    """Whether ``init_lora_weights: start`` changed the base."""
    return start.lower().startswith(_MUTATING)


def portable(adapter: Adapter, start: str, source: Path, options: Reading) -> Adapter:
    """``adapter``, started by ``start``, for the base as published."""
    told = f"{source}: init_lora_weights {start!r} changed the base model"
    if start.lower() not in _COMPUTED:
        raise FormatError(
            f"{told}, and what it took out cannot be computed again",
            "Save it from PEFT as a plain LoRA (path_initial_model_for_weight_conversion=...), or merge it there.",
        )
    if adapter.config.method != "lora":
        raise FormatError(f"{told}; with {adapter.config.method} that is not undone", "Merge it in PEFT.")
    if options.base is None or options.base.folder is None:
        options.need(told, "Give the base's folder, to compute again what it took out: --model, or base=.")
        return adapter
    weights, faults = dict(adapter.weights), []
    ranks, scales = {}, {}
    for path in adapter.modules:
        base = options.base.tensor(f"{options.base.to_hf(path)}.weight")
        a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
        if base is not None and adapter.metadata["peft"].get("fan_in_fan_out"):
            base = base.T
        if base is None or base.ndim != 2 or not mx.issubdtype(base.dtype, mx.floating):
            faults.append(f"{path}: the base in {options.base.name} has no such matrix of floats")
            continue
        if base.shape != (b.shape[1], a.shape[0]):
            faults.append(f"{path}: the base's weight is {list(base.shape)}, the adapter's {[b.shape[1], a.shape[0]]}")
            continue
        scale, rank = adapter.config.scale_of(path), adapter.rank_of(path)
        weight = np.array(base.astype(mx.float32))
        pair = olora_pair(weight, rank) if start.lower() == "olora" else pissa_pair(weight, rank, scale)
        old_a, old_b = (mx.array(np.ascontiguousarray(factor.T)) for factor in pair)
        weights[f"{path}.lora_a"] = mx.concatenate([a, old_a.astype(a.dtype)], axis=1)
        weights[f"{path}.lora_b"] = mx.concatenate([b, -old_b.astype(b.dtype)])
        ranks[f"^{re.escape(path)}"], scales[f"^{re.escape(path)}"] = 2 * rank, scale
    raise_faults(faults, "Name the model that the adapter was trained on.", FormatError)
    config = replace(
        adapter.config, rank=2 * adapter.config.rank, alpha=None, rslora=False, rank_pattern=ranks, scale_pattern=scales
    )
    return replace(adapter, weights=weights, config=config)
