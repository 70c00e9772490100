"""Identify a base model by values of its weights. A copy has the same values in any folder, files and dtype.

``digest`` is equal only for equal weights; it ensures that a run is resumed on its own base. ``Fingerprint`` is small
and kept with an adapter. It also recognises the quantized version of a model: its norms are the same, and its weights
are close.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .modules import dims, is_quantized, kind, some_rows

_SAMPLES = 4096  # values of each parameter that ``digest`` reads
_MODULES, _VALUES = 16, 16  # of a ``Fingerprint``: modules, and values of each
# Weights count as the same up to these relative errors. Rounding to half precision makes 0.002, to 2 bits 0.5; two
# models that were trained apart have 1.4.
_ROUNDED, _QUANTIZED = 0.003, 0.7


def digest(model: nn.Module | dict[str, Any]) -> str:
    """A hash of the names, shapes and 4096 evenly spread values of every parameter of ``model``, or array of a tree.

    float16 and bfloat16 are compared as float32, which holds them exactly, so that it does not depend on the dtype
    in which a device computes.
    """
    found = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters() if isinstance(model, nn.Module) else model)):
        found.update(f"{name} {list(array.shape)}".encode())
        found.update(_spread(array, _SAMPLES).tobytes())
    return found.hexdigest()


def _spread(array: mx.array, count: int) -> np.ndarray:
    """Up to ``count`` values of ``array``, evenly spread but not aligned with its rows; all of a smaller array."""
    size = array.size
    if size <= count:
        values = array
    else:
        steps = np.arange(count)
        places = ((steps + (steps * 0.6180339887498949) % 1) * (size / count)).astype(np.int64)
        values = array[tuple(mx.array(i) for i in np.unravel_index(places, array.shape))]
    floats = mx.issubdtype(values.dtype, mx.floating)
    return np.array(values.astype(mx.float32) if floats else values)


@dataclass(frozen=True)
class Fingerprint:
    """Values of 16 weight matrices and 16 norms, spread over the layers of a base model."""

    weights: str  # bfloat16 [16, 16], base64
    norms: str
    quantized: bool

    @classmethod
    def of(cls, modules: dict[str, nn.Module]) -> Fingerprint:
        """The fingerprint of a model with these ``modules`` by path, without an adapter."""
        matrices = {p: m for p, m in modules.items() if kind(m) in ("linear", "switch") and _in_layer(p)}
        norms = {p: m for p, m in modules.items() if _is_norm(m)}
        rows = [_row(module, i) for i, module in enumerate(_chosen(matrices))]
        vectors = [_columns(module.weight) for module in _chosen(norms)]
        quantized = any(is_quantized(m) for m in matrices.values())
        return cls(_pack(rows), _pack(vectors), quantized)

    @classmethod
    def from_stored(cls, stored: Any) -> Fingerprint | None:
        """A fingerprint from a mapping made by ``asdict`` and read from a file; None if it is not one."""
        names = {field.name for field in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            return None
        found = cls(**stored)
        try:
            _unpack(found.weights), _unpack(found.norms)
        except (TypeError, ValueError):
            return None
        return found

    def stored(self) -> dict[str, Any]:
        return asdict(self)

    def matches(self, other: Fingerprint) -> bool:
        """Whether both are from the same model, up to rounding and quantization."""
        if _error(self.norms, other.norms).max(initial=0) > _ROUNDED:
            return False
        errors = _error(self.weights, other.weights)
        if self.quantized or other.quantized:
            return not errors.size or bool(errors.mean() <= _QUANTIZED)
        return bool(errors.max(initial=0) <= _ROUNDED)


def _in_layer(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _is_norm(module: nn.Module) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 1 and mx.issubdtype(weight.dtype, mx.floating)


def _chosen(modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Up to 16 modules, spread so that modules of every kind are among them."""
    names = sorted(modules)
    count = min(_MODULES, len(names))
    return [modules[names[(2 * i + 1) * len(names) // (2 * count)]] for i in range(count)]


def _row(module: nn.Module, index: int) -> mx.array:
    rows = dims(module)[1]
    start = (2 * index + 1) * rows // (2 * _MODULES)
    values = _columns(some_rows(module, start, start + 1)[0])
    mx.eval(values)  # one module at a time: a row of NF4 needs the whole weight
    return values


def _columns(vector: mx.array) -> mx.array:
    places = [i * len(vector) // _VALUES for i in range(_VALUES)]
    return vector[mx.array(places)].astype(mx.bfloat16)


def _pack(vectors: list[mx.array]) -> str:
    if not vectors:
        return ""
    return base64.b64encode(np.array(mx.stack(vectors).view(mx.uint16)).tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    """[modules, 16] float32."""
    halves = np.frombuffer(base64.b64decode(text, validate=True), "<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(-1, _VALUES)


def _error(one: str, other: str) -> np.ndarray:
    """The relative error between the values of each module: [modules]. Infinite if the numbers of modules differ."""
    a, b = _unpack(one), _unpack(other)
    if a.shape != b.shape:
        return np.array([math.inf])
    return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-30)
