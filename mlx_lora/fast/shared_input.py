"""Adapters that read the same array share one product with A: q, k, v of an attention; gate and up of an MLP.

While the module above them runs, the first layer called computes the product for the whole group in one launch. The
others take their columns if they are called with the same array; with another array a layer computes its own. Nothing
is kept after that module has returned. Decoding only: in training each layer computes its own matrix product.
"""

from __future__ import annotations

import dis
import functools
import inspect

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import dims
from ..kernels.lora_shrink import MAX_MATRICES
from .decode import Decodes
from .swap import GROUP, Changes, keep, kept, plain_class

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


@functools.cache
def changes_in_place(kind: type) -> bool:
    """Whether a module's forward pass changes an array in place between its projections."""
    names = {name for family in SAME_INPUT for name in family}
    steps = list(dis.get_instructions(kind.__call__))
    places = [i for i, step in enumerate(steps) if step.argval in names] or [0]
    return any(
        step.opname in ("STORE_SUBSCR", "STORE_SLICE")
        or step.opname.startswith("INPLACE_")
        or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        for step in steps[places[0] : places[-1]]
    )


def families(parent: nn.Module) -> list[list[str]]:
    """The names of the layers in ``parent`` that can share their product, a list for each input."""
    if not inspect.isfunction(plain_class(parent).__call__) or changes_in_place(plain_class(parent)):
        return []
    found, left = [], {name for name, child in parent.items() if isinstance(child, Decodes)}
    for names in SAME_INPUT:
        alike: dict[tuple, list[str]] = {}
        for name in (name for name in names if name in left):
            layer = parent[name]
            ranks = tuple(layer._ranks.tolist()) if layer.indexed else None
            alike.setdefault((type(layer), dims(layer.base)[0], layer.lora_a.dtype, ranks), []).append(name)
        for family in alike.values():
            if len(family := family[:MAX_MATRICES]) > 1:
                found.append(family)
                left -= set(family)
    return found


class Group:
    """Layers of one module that share the product of their input while that module runs."""

    def __init__(self, layers: list[nn.Module]):
        ends = [0]
        for place, layer in enumerate(layers):
            ends.append(ends[-1] + layer.rank)
            layer.__dict__[GROUP] = self, place
        self.layers, self._offsets = layers, [mx.array([start], mx.int32) for start in ends[:-1]]
        self.close()

    def close(self) -> None:
        self.running, self._product = False, (None, None)  # stored as one pair, so that threads cannot mix x and u

    def part(self, place: int, x: mx.array, index: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        """(u, the first column of the layer at ``place``)."""
        known, u = self._product
        if x is not known:
            u = self.layers[place].decoder().shrink(x, [layer["lora_a"] for layer in self.layers], *index)
            self._product = x, u
        return u, self._offsets[place]


class SharesInput(Changes):
    """Mixin for a module with layers that share their input."""

    def __call__(self, *args, **kwargs):
        if self._training:
            return super().__call__(*args, **kwargs)
        groups = kept(self, "groups")
        if groups is None:
            groups = [Group([self[name] for name in family]) for family in families(self)]
            keep(self, "groups", groups)
        for group in groups:
            group.running = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for group in groups:
                group.close()
