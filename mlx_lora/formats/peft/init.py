"""PEFT adapters whose initialisation changed the base: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775).

Both subtract W0 = s B0 A0 from the base's weight and train B0 and A0, so that the adapter is valid only on the changed
base. Here it becomes an adapter for the published base, with the update s (B A - B0 A0) and twice the rank: A' = [A;
A0], B' = [B, -B0], as PEFT's ``path_initial_model_for_weight_conversion`` does. W0 is computed from the base's weights.
Initialisations that cannot be recomputed (randomized, quantized, from data or gradients) are refused by name.
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
from ..options import ReadOptions

_CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_COMPUTED = ("pissa", "olora")


def changes_base(init: str) -> bool:
    """Whether ``init_lora_weights: init`` changes the base."""
    return init.lower().startswith(_CHANGE_BASE)


def for_published_base(adapter: Adapter, init: str, source: Path, options: ReadOptions) -> Adapter:
    """``adapter``, initialised by ``init``, as one for the published base."""
    reason = f"{source}: init_lora_weights {init!r} changed the base model"
    if init.lower() not in _COMPUTED:
        raise FormatError(
            f"{reason}, and the change cannot be recomputed",
            "Save it from PEFT as a plain LoRA (path_initial_model_for_weight_conversion=...), or merge it there.",
        )
    if adapter.config.method != "lora":
        raise FormatError(f"{reason}; this is not undone for {adapter.config.method}", "Merge it in PEFT.")
    if options.base is None or options.base.folder is None:
        options.need(reason, "Give the base's folder, to compute the change again: --model, or base=.")
        return adapter
    weights, faults = dict(adapter.weights), []
    ranks, scales = {}, {}
    for path in adapter.modules:
        base = options.base.tensor(f"{options.base.to_hf(path)}.weight")
        a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
        if base is not None and adapter.metadata["peft"].get("fan_in_fan_out"):
            base = base.T
        if base is None or base.ndim != 2 or not mx.issubdtype(base.dtype, mx.floating):
            faults.append(f"{path}: {options.base.name} has no float matrix for it")
            continue
        if base.shape != (b.shape[1], a.shape[0]):
            faults.append(f"{path}: the base's weight is {list(base.shape)}, the adapter's {[b.shape[1], a.shape[0]]}")
            continue
        scale, rank = adapter.config.scale_of(path), adapter.rank_of(path)
        weight = np.array(base.astype(mx.float32))
        pair = olora_pair(weight, rank) if init.lower() == "olora" else pissa_pair(weight, rank, scale)
        first_a, first_b = (mx.array(np.ascontiguousarray(factor.T)) for factor in pair)
        weights[f"{path}.lora_a"] = mx.concatenate([a, first_a.astype(a.dtype)], axis=1)
        weights[f"{path}.lora_b"] = mx.concatenate([b, -first_b.astype(b.dtype)])
        ranks[f"^{re.escape(path)}"], scales[f"^{re.escape(path)}"] = 2 * rank, scale
    raise_faults(faults, "Name the model that the adapter was trained on.", FormatError)
    config = replace(
        adapter.config, rank=2 * adapter.config.rank, alpha=None, rslora=False, rank_pattern=ranks, scale_pattern=scales
    )
    return replace(adapter, weights=weights, config=config)
