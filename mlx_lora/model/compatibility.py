"""Whether an adapter can be mounted on a model: every incompatibility, one sentence each. Changes nothing.

``bare`` maps paths to the model's modules as they are without adapters.
"""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn

from ..adapter import FINGERPRINT, Adapter
from ..base.fingerprint import Fingerprint
from ..base.modules import dense_weight, dims, is_quantized, kind
from ..base.origin import Base
from ..config import LEAVES
from ..errors import MLXLoRAWarning
from ..layers import METHODS


def incompatibilities(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    """Everything in ``adapter``, which must be valid itself, that these modules cannot take."""
    layers = [] if adapter.config.method == "full" else _in_layers(bare, adapter)
    return [*layers, *_in_tokens(bare, adapter), *_in_full_parameters(bare, adapter)]


def warn_of_another_base(adapter: Adapter, here: Fingerprint | None, base: Base | None) -> None:
    """Warn where ``adapter`` was trained on another base than the model with the fingerprint ``here``."""
    trained_on = Fingerprint.from_stored(adapter.metadata.get(FINGERPRINT))
    if trained_on is None or here is None or trained_on.matches(here):
        return
    warnings.warn(
        f"The adapter was trained on {adapter.base or 'another model'}, whose weights are not those of "
        f"{base.name if base else 'this model'}. It fits, but may answer worse than on its own base model.",
        MLXLoRAWarning,
        stacklevel=3,
    )


def own_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own parameters; for a quantized module those of its dense equivalent."""
    if is_quantized(module):
        return ["weight", "bias"] if "bias" in module else ["weight"]
    return [name for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def _in_full_parameters(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found = []
    for name, array in adapter.full_parameters.items():
        path, _, leaf = name.rpartition(".")
        module = bare.get(path)
        if module is None or leaf not in own_parameters(module):
            found.append(f"{name}: the model has no such parameter")
            continue
        shape = dense_weight(module).shape if is_quantized(module) and leaf == "weight" else module[leaf].shape
        if shape != array.shape:
            found.append(f"{name}: shape {list(array.shape)}, the model's is {list(shape)}")
    return found


def _in_tokens(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found = []
    for path, (ids, rows) in adapter.tokens.items():
        if path not in bare or kind(bare[path]) != "embedding":
            found.append(f"{path}: the model has no such embedding")
            continue
        vocabulary, width = dims(bare[path])
        if rows.shape[1] != width or max(ids) >= vocabulary:
            size = f"{vocabulary} x {width}"
            found.append(f"{path}: rows {list(rows.shape)} up to token {max(ids)} do not fit this embedding ({size})")
    return found


def _in_layers(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found, method = [], adapter.config.method
    for path in adapter.modules:
        module = bare.get(path)
        which = kind(module) if module is not None else None
        if METHODS[method].get(which) is None:
            found.append(f"{path}: the model has no such layer to adapt")
            continue
        rows, columns = dims(module)
        experts = (module.num_experts,) if which == "switch" else ()
        if method == "vera":
            found += _in_vera_layer(path, experts, rows, columns, adapter)
            continue
        if "lora_a" not in LEAVES[method]:
            continue  # mount compares the shapes with a new layer's
        a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
        if which == "switch":
            shapes = (*experts, a.shape[1], rows), (*experts, columns, b.shape[-1])
        else:
            shapes = (rows, a.shape[-1]), (b.shape[0], columns)
        if (a.shape, b.shape) != shapes:
            found.append(
                f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit this layer "
                f"({rows} x {columns}{', experts' if which == 'switch' else ''})"
            )
            continue
        for leaf in ("m", "lora_bias"):
            expected = (rows,) if which == "embedding" else (*experts, columns)
            vector = adapter.weights.get(f"{path}.{leaf}")
            if vector is not None and vector.shape != expected:
                found.append(f"{path}: {leaf} {list(vector.shape)}, expected {list(expected)}")
    return found


def _in_vera_layer(path: str, experts: tuple, rows: int, columns: int, adapter: Adapter) -> list[str]:
    found = []
    for leaf, size in (("vera_lambda_d", adapter.config.rank), ("vera_lambda_b", columns)):
        shape = adapter.weights[f"{path}.{leaf}"].shape
        if shape != (*experts, size):
            found.append(f"{path}: {leaf} {list(shape)}, expected {[*experts, size]}")
    given = adapter.weights.get("vera_a")
    if given is not None and given.shape[1] < rows:
        found.append(f"{path}: vera_a {list(given.shape)} is too narrow for this layer ({rows} x {columns})")
    return found
