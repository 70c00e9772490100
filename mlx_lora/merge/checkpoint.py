"""Merge updates of modules that exist only in the checkpoint, because mlx-lm splits or joins their weights.

DeepSeek's ``kv_b_proj``, for instance, becomes ``embed_q`` and ``unembed_out``. Such an update cannot be mounted, but
its weight can be merged under the name that the checkpoint and PEFT give it.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..adapter import SHARED, Adapter, raise_faults
from ..base.modules import dims
from ..base.names import BaseModel
from ..errors import AdapterError
from ..layers import make_layers
from .fuse import FusedLayer, fuse_layer


def split_adapter(adapter: Adapter, paths: list[str]) -> tuple[Adapter, Adapter]:
    """(``adapter`` without the modules ``paths``, an adapter of only these modules)."""
    inside = {name: name.rpartition(".")[0] in paths for name in adapter.weights}
    rest = {name: array for name, array in adapter.weights.items() if not inside[name]}
    own = {name: array for name, array in adapter.weights.items() if inside[name] or name in SHARED}
    return replace(adapter, weights=rest), replace(adapter, weights=own)


def merge_into_checkpoint(adapter: Adapter, base: BaseModel) -> tuple[dict[str, mx.array], list[FusedLayer]]:
    """The merged weights by the checkpoint's name, and a report for each. Raises: AdapterError."""
    merged, reports, bases, faults = {}, [], {}, []
    for name, array in adapter.full_parameters.items():
        path, _, leaf = name.rpartition(".")
        merged[base.weight_name(path).removesuffix("weight") + leaf] = array
    for path in adapter.modules:
        weight = base.tensor(base.weight_name(path))
        bases[path] = linear = nn.Linear(1, 1, bias=False)
        linear.weight = weight
        if (bias := base.tensor(base.weight_name(path).removesuffix("weight") + "bias")) is not None:
            linear.bias = bias
        if weight.ndim != 2 or not mx.issubdtype(weight.dtype, mx.floating):
            faults.append(f"{path}: the checkpoint's weight is not a float matrix")
    if adapter.config.method == "vera" and SHARED[0] not in adapter.weights:
        faults.append(f"{', '.join(adapter.modules)}: VeRA without its stored projections")
    raise_faults(faults, "Merge this adapter in PEFT.", AdapterError)
    shared = tuple(adapter.weights[name] for name in SHARED) if adapter.config.method == "vera" else None
    ranks = {path: adapter.rank_of(path) for path in bases}
    for path, layer in make_layers(bases, adapter.config, ranks, mx.float32, shared=shared).items():
        for leaf, initial in layer.adapter_weights().items():
            array = adapter.weights[f"{path}.{leaf}"]
            if array.shape != initial.shape:
                sizes = "{} x {}".format(*dims(layer.base))
                message = f"{path}: {leaf} {list(array.shape)}, expected {list(initial.shape)} (a layer {sizes})"
                raise AdapterError(message, "Give the model that the adapter was trained on.")
            setattr(layer, leaf, array.astype(initial.dtype))
        module, report = fuse_layer(path, layer, layer.base.weight.dtype, None, True)
        reports.append(report)
        name = base.weight_name(path)
        merged[name] = module.weight
        if "bias" in module:
            merged[name.removesuffix("weight") + "bias"] = module.bias
    return merged, reports
