"""Norms whose result is made again in the backward pass: only the adapters that read it would have it kept.

The products with their A are computed along with the norm, of which autograd then keeps the input alone, that the
residual path has anyway. Who reads a norm is told by mlx-lm's names; where it is another, nothing is computed but what
is used, and the readers make their own products.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from ..kernels import enabled
from ..kernels.recomputed import recomputed
from .base import derived
from .siblings import SAME_INPUT, Siblings, joined, siblings_of

# A norm and the modules beside it that may read it; the second one only where there is no first.
_READERS = {
    "input_layernorm": ("self_attn", "attention"),
    "pre_feedforward_layernorm": ("mlp",),
    "post_attention_layernorm": ("mlp",),
}


def recompute_norms(model: nn.Module) -> None:
    """Let the norms of ``model`` that adapters read keep less in training."""
    for parent in model.modules():
        for name, readers in _READERS.items():
            norm, reader = parent.get(name), next((parent[r] for r in readers if r in parent), None)
            if name == "post_attention_layernorm" and "pre_feedforward_layernorm" in parent:
                continue
            if _is_norm(norm) and isinstance(reader, nn.Module) and not hasattr(type(norm), "_recomputes"):
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
        if siblings is None or self.trainable_parameters():
            return kind.__call__(self, x)
        y, *low = recomputed(functools.partial(kind.__call__, self), [x], siblings.matrices)
        siblings.give(y, joined, low)
        return y

    return derived(_recomputed, kind, __call__=__call__, _recomputes=True)
