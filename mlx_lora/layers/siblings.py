"""Adapters that read the same input share the products with it: q, k, v of an attention; gate and up of an MLP.

Whoever of them is called first computes for all, in one matrix product or one launch of ``kernels.lora_shrink``; the
others find their part when they come with the very same array. A model that gives them different arrays gets the
right numbers, and after some calls the sharing ends by itself. Here too is the choice between that launch and plain
products, so that no layer asks what it runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Stored, enabled, lora_qmv, lora_shrink, low_rank_add, low_rank_products
from ..kernels.lora_qmv import MAX_RANK, MAX_ROWS
from ..kernels.lora_shrink import MAX_MATRICES
from ..quant.nf4 import nf4_stored
from .base import AdapterLayer, dims, kind

# Names that models of mlx-lm give to linear layers of one input.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj", "g_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
_PATIENCE = 4  # forward passes in which a part was not fetched, before the sharing ends


class Siblings:
    """Layers that are taken to read the same array. Holds that array only until each has had its part."""

    def __init__(self, layers: list[nn.Module]):
        self._layers, self._misses, self._gifts = layers, 0, 0
        # What the parts belong to: the array, the product, and the matrices. A trace or an update changes those.
        self._for: tuple[Any, ...] = ()
        self._parts: dict[int, Any] = {}

    def part(self, layer: nn.Module, x: mx.array, product: Callable) -> Any:
        """The part for ``layer`` of ``product(x, [lora_a of each layer])``."""
        if not any(sibling is layer for sibling in self._layers):  # a copy of one
            return product(x, [layer.lora_a])[0]
        if id(layer) in self._parts and _same(self._for, self._of(x, product)):
            part = self._parts.pop(id(layer))
            if not self._parts:
                self._for, self._misses, self._gifts = (), 0, 0
            return part
        if self._parts:  # somebody did not come, or came with another array
            self._misses += 1
        layers = self._layers if self._misses < _PATIENCE else [layer]
        parts = product(x, self.matrices if layers is self._layers else [layer.lora_a])
        self._parts = dict(zip(map(id, layers), parts, strict=True))
        self._for = self._of(x, product) if len(layers) > 1 else ()
        return self._parts.pop(id(layer))

    def give(self, x: mx.array, product: Callable, parts: list[Any]) -> None:
        """Parts that were computed along with x itself."""
        self._gifts += 1
        self._misses += bool(self._parts)
        self._parts, self._for = dict(zip(map(id, self._layers), parts, strict=True)), self._of(x, product)

    @property
    def wanted(self) -> bool:
        """Whether what was given has been fetched, lately."""
        return self._gifts < _PATIENCE

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle is of the layers alone: parts may belong to a trace."""
        return {**self.__dict__, "_for": (), "_parts": {}, "_misses": 0, "_gifts": 0}

    def only(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has no siblings but itself."""
        return len(self._layers) == 1 and self._layers[0] is layer

    @property
    def matrices(self) -> list[mx.array]:
        """``lora_a`` of each layer."""
        return [layer.lora_a for layer in self._layers]

    def _of(self, x: mx.array, product: Callable) -> tuple[Any, ...]:
        return (x, product, *self.matrices)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def introduce(layers: dict[str, nn.Module]) -> None:
    """Let the adapter layers of a model, given by path, share where they read the same input."""
    left = {path: layer for path, layer in layers.items() if hasattr(layer, "siblings")}
    for names in SAME_INPUT:
        families: dict[tuple, dict[str, nn.Module]] = {}
        for path, layer in left.items():
            parent, _, name = path.rpartition(".")
            if name in names:
                # Layers of many adapters share only among those of the same ranks.
                key = (parent, dims(layer.base)[0], layer.lora_a.dtype, getattr(layer, "_shrink", None))
                families.setdefault(key, {})[path] = layer
        for family in families.values():
            siblings = Siblings(list(family.values())[:MAX_MATRICES])
            if len(family) > 1:
                for path, layer in family.items():
                    # Outside the module's dictionary: neither a parameter nor a sub-module.
                    object.__setattr__(layer, "siblings", siblings)
                    del left[path]


def siblings_of(layer: Any) -> Siblings | None:
    """Whose shared product a layer takes in training, itself included; None for a layer that makes its own."""
    if not isinstance(layer, AdapterLayer) or not hasattr(layer, "siblings") or layer.dropout._p_1 < 1:
        return None
    if layer.siblings is None:
        object.__setattr__(layer, "siblings", Siblings([layer]))
    return layer.siblings


def product(layer: nn.Module, x: mx.array, dropped: mx.array) -> mx.array:
    """``dropped @ layer.lora_a``, [..., in] -> [..., rank]; shared in training, unless a dropout makes it its own."""
    if not layer.training:
        return dropped @ layer.lora_a
    if dropped is x and layer.siblings is not None:
        return layer.siblings.part(layer, x, joined)
    return low_rank_products(dropped, layer.lora_a)[0]


def joined(x: mx.array, a: list[mx.array]) -> tuple[mx.array, ...]:
    """The product of training that siblings share."""
    return low_rank_products(x, *a)


def add_update(layer: nn.Module, y: mx.array, u: mx.array) -> mx.array:
    """``y + scale * (u @ lora_b)``, with a backward pass that keeps little while training."""
    if layer.training:
        return low_rank_add(y, u, layer.lora_b, layer.scale)
    return mx.addmm(y, u, layer.lora_b, alpha=layer.scale)


def _shrunk(x: mx.array, a: list[mx.array]) -> list[tuple[mx.array, int]]:
    """The launch for all of ``a``, and where each one's columns begin."""
    u = lora_shrink(x.reshape(-1, x.shape[-1]), a)
    return [(u, sum(m.shape[-1] for m in a[:i])) for i in range(len(a))]


def fused(layer: nn.Module, x: mx.array, gain: Callable[[], mx.array] | None = None) -> mx.array | None:
    """The layer in one launch beside the shared one, where it decodes on Metal; None where plain operations do it.

    ``gain``: gives DoRA's factor [out].
    """
    base = fits(layer, x)
    if base is None:
        return None
    return decode(layer, base, x, _shrunk, _number(float(layer.scale), mx.float32), gain=gain() if gain else None)


def fits(layer: nn.Module, x: mx.array) -> Stored | None:
    """What the kernels read of the layer's base, where they can do this call."""
    rows = x.size // x.shape[-1]
    if layer.training or not 1 <= rows <= MAX_ROWS or layer.rank > MAX_RANK or not enabled():
        return None
    base = stored(layer.base)
    bias = layer.base.get("bias")
    dtypes = {layer.lora_a.dtype, layer.lora_b.dtype, x.dtype, x.dtype if bias is None else bias.dtype}
    if base is None or dtypes != {_computes_in(base, x)}:
        return None
    return base


def decode(
    layer: nn.Module, base: Stored, x: mx.array, shrink: Callable, scale: mx.array, **options: mx.array | None
) -> mx.array:
    """The layer on a few rows by the kernels. ``options``: those of ``lora_qmv``."""
    siblings = layer.siblings
    u, offset = siblings.part(layer, x, shrink) if siblings is not None else shrink(x, [layer.lora_a])[0]
    offset, bias = _number(offset, mx.int32), layer.base.get("bias")
    y = lora_qmv(x.reshape(-1, x.shape[-1]), base, u, layer.lora_b, scale, offset, bias=bias, **options)
    return y.reshape(*x.shape[:-1], -1)


def stored(base: nn.Module) -> Stored | None:
    """A base layer's weight as the kernels read it; None for layers that compute in a way of their own."""
    if type(base).__call__ is nn.Linear.__call__:
        return Stored(base.weight)
    if type(base).__call__ is nn.QuantizedLinear.__call__ and kind(base) and base.get("global_scale") is None:
        return Stored(base.weight, base.scales, base.get("biases"), base.group_size, base.bits, base.mode)
    if hasattr(base, "nf4"):
        return nf4_stored(base.nf4)
    return None


def _computes_in(base: Stored, x: mx.array) -> mx.Dtype:
    if base.mode == "nf4":
        return x.dtype
    source = base.weight if base.mode == "dense" else base.scales
    return source.dtype if mx.issubdtype(source.dtype, mx.floating) else x.dtype


@functools.lru_cache(maxsize=1024)
def _number(value: float, dtype: mx.Dtype) -> mx.array:
    return mx.array([value], dtype)
