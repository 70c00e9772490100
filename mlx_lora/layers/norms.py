"""Norms whose result is made again in the backward pass: only the adapters that read it would have it kept.

The products with their A are computed along with the norm, of which autograd then keeps the input alone, that the
residual path has anyway. Who reads a norm is told by mlx-lm's names. Where it is another, the products are made for
nothing until that shows, and the readers make their own.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from ..kernels import enabled
from ..kernels.recomputed import recomputed
from .base import derived
from .siblings import SAME_INPUT, Siblings, joined, siblings_of

# A norm, the modules beside it that may read it, and the norms without which alone it is theirs.
_READERS = {
    "input_layernorm": (("self_attn", "attention"), ()),
    "pre_feedforward_layernorm": (("mlp",), ()),
    "pre_mlp_layernorm": (("mlp",), ()),
    "post_attention_layernorm": (
        ("mlp",),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ),
}


def recompute_norms(model: nn.Module) -> None:
    """Let the norms of ``model`` that adapters read keep less in training."""
    for parent in model.modules():
        for name, (readers, others) in _READERS.items():
            norm, reader = parent.get(name), next((parent[r] for r in readers if r in parent), None)
            if not _is_norm(norm) or not isinstance(reader, nn.Module) or any(other in parent for other in others):
                continue
            if not hasattr(type(norm), "_recomputes"):
                norm.__class__ = _recomputed(type(norm))
            # Outside the module's dictionary: no part of it.
            object.__setattr__(norm, "_reader", reader)


def _is_norm(module: object) -> bool:
    known = type(module).__module__.startswith(("mlx.nn.layers.normalization", "mlx_lm.models."))
    return isinstance(module, nn.Module) and known and not module.children()


def _siblings(reader: nn.Module) -> Siblings | None:
    """Those in ``reader`` that take its input, where they are of one family."""
    for names in (*SAME_INPUT, ("qkv_proj",), ("gate_up_proj",), ("c_fc",), ("fc1",)):
        found = [siblings for name in names if (siblings := siblings_of(reader.get(name))) is not None]
        if found and all(siblings is found[0] for siblings in found):
            return found[0]
    return None


@functools.cache
def _recomputed(kind: type) -> type:
    def __call__(self, x: mx.array) -> mx.array:
        siblings = _siblings(self._reader) if self.training and enabled() else None
        if siblings is None or not siblings.wanted:
            return kind.__call__(self, x)
        names = [name for name, value in self.items() if isinstance(value, mx.array)]

        def f(x: mx.array, *arrays: mx.array) -> mx.array:
            norm = kind.__new__(kind)
            norm.__dict__.update(self.__dict__)
            dict.update(norm, {**self, **dict(zip(names, arrays, strict=True))})
            return kind.__call__(norm, x)

        y, *low = recomputed(f, [x, *(self[name] for name in names)], siblings.matrices)
        siblings.give(y, joined, low)
        return y

    return derived(_recomputed, kind, __call__=__call__, _recomputes=True)
