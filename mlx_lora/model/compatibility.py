"""Whether an adapter fits a model: everything that does not, one sentence each. Changes nothing.

``bare`` are the model's modules by path as they are without adapters.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..adapter import Adapter
from ..base.modules import dense_weight, dims, is_quantized, kind
from ..layers import METHODS


def own_arrays(module: nn.Module) -> list[str]:
    """Names of the parameters a module itself holds; those of its dense stand-in where it is quantized."""
    if is_quantized(module):
        return ["weight", "bias"] if "bias" in module else ["weight"]
    return [name for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def whole_misfits(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    faults = []
    for name, array in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        module = bare.get(path)
        if module is None or leaf not in own_arrays(module):
            faults.append(f"{name}: the model has no such parameter")
            continue
        shape = dense_weight(module).shape if is_quantized(module) and leaf == "weight" else module[leaf].shape
        if shape != array.shape:
            faults.append(f"{name}: shape {list(array.shape)}, the model's is {list(shape)}")
    return faults


def token_misfits(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    faults = []
    for path, (ids, rows) in adapter.tokens.items():
        if path not in bare or kind(bare[path]) != "embedding":
            faults.append(f"{path}: the model has no such embedding")
            continue
        vocabulary, width = dims(bare[path])
        if rows.shape[1] != width or max(ids) >= vocabulary:
            faults.append(f"{path}: rows {list(rows.shape)} up to token {max(ids)} do not fit {vocabulary} x {width}")
    return faults


def misfits(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    faults, method = [], adapter.config.method
    for path in adapter.modules:
        module = bare.get(path)
        which = kind(module) if module is not None else None
        layer = METHODS[method].get(which)
        if layer is None:
            faults.append(f"{path}: the model has no such layer to adapt")
            continue
        rows, columns = dims(module)
        many = (module.num_experts,) if which == "switch" else ()
        if method == "vera":
            faults += _vera_misfits(path, many, rows, columns, adapter)
            continue
        a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
        if which == "switch":
            shapes = (*many, a.shape[1], rows), (*many, columns, b.shape[-1])
        else:
            shapes = (rows, a.shape[-1]), (b.shape[0], columns)
        if (a.shape, b.shape) != shapes:
            faults.append(
                f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit this layer "
                f"({rows} x {columns}{', experts' if which == 'switch' else ''})"
            )
            continue
        for leaf in ("m", "lora_bias"):
            expected = (rows,) if which == "embedding" else (*many, columns)
            vector = adapter.weights.get(f"{path}.{leaf}")
            if vector is not None and vector.shape != expected:
                faults.append(f"{path}: {leaf} {list(vector.shape)}, expected {list(expected)}")
    return faults


def _vera_misfits(path: str, many: tuple, rows: int, columns: int, adapter: Adapter) -> list[str]:
    faults = []
    for leaf, size in (("vera_lambda_d", adapter.config.rank), ("vera_lambda_b", columns)):
        shape = adapter.weights[f"{path}.{leaf}"].shape
        if shape != (*many, size):
            faults.append(f"{path}: {leaf} {list(shape)}, expected {[*many, size]}")
    given = adapter.weights.get("vera_a")
    if given is not None and given.shape[1] < rows:
        faults.append(f"{path}: vera_a {list(given.shape)} is too narrow for this layer ({rows} x {columns})")
    return faults
