"""MLPs where kernels are used: gate, up and SwiGLU in one launch when decoding, less memory when training.

The launch saves two of a layer: the second projection's and the activation's. It is for LoRA on both projections, and
for MLPs that compute SwiGLU between their projections, as most of mlx-lm's do. Training is for any MLP whose
projections can be told from what is between them (``activation.py``); on a CPU, where computing an exponential again
costs more than memory is worth, it is off as the kernels are. All other calls compute as they are written.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from ..kernels import enabled, lora_shrink, lora_swiglu
from .activation import Shape, function_of, recompute_activation, shape_of, trained
from .base import derived
from .lora import LoRALinear
from .siblings import fits


def fuse_mlps(model: nn.Module) -> None:
    """Let the MLPs of ``model`` use fewer launches and less memory where it is possible, see the top."""
    for module in model.modules():
        kind = type(module)
        if not hasattr(kind, "_fused") and (shape := shape_of(module, kind.__call__)):
            module.__class__ = _fused(kind, shape, _gate_and_up(module, shape))
        recompute_activation(module)


def _gate_and_up(mlp: nn.Module, shape: Shape) -> tuple[str, str] | None:
    """The names of the projections g and u, where the MLP is ``last(silu(g(x)) * u(x))``: found by its values."""
    if len(shape.first) != 2:
        return None
    f = function_of(mlp, type(mlp).__call__, shape)
    # Fine around zero, and wide enough to meet any bound.
    g = mx.concatenate([mx.linspace(-9, 9, 61), mx.array([-1e3, -60.0, 60.0, 1e3])])
    u = g[::-1] * 1.7 + 0.3
    for names, given in ((shape.first, (g, u)), (shape.first[::-1], (u, g))):
        if mx.allclose(f(*given), nn.silu(g) * u, rtol=1e-5, atol=1e-6).item():
            return names
    return None


@functools.cache
def _fused(kind: type, shape: Shape, gate_and_up: tuple[str, str] | None) -> type:
    """``kind`` with another ``__call__``."""

    def __call__(self, *args, **kwargs) -> mx.array:
        if len(args) == 1 and not kwargs:
            if self.training and enabled():
                return trained(self, kind.__call__, shape, *args)
            y = swiglu(*(getattr(self, name) for name in gate_and_up), *args) if gate_and_up else None
            if y is not None:
                return getattr(self, shape.last)(y)
        return kind.__call__(self, *args, **kwargs)

    return derived(_fused, kind, shape, gate_and_up, __call__=__call__, _fused=True)


def swiglu(gate: nn.Module, up: nn.Module, x: mx.array) -> mx.array | None:
    """``silu(gate(x)) * up(x)`` by the kernel; None where it cannot."""
    if type(gate) is not LoRALinear or type(up) is not LoRALinear or gate.rank != up.rank:
        return None
    one, other = fits(gate, x), fits(up, x)
    if one is None or other is None or "bias" in gate.linear or "bias" in up.linear:
        return None
    if one.form() != other.form() or one.shape != other.shape or one.nested is not None or other.nested is not None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    u = lora_shrink(flat, [gate.lora_a, up.lora_a])
    scale, offset = _pair(float(gate.scale), float(up.scale), mx.float32), _pair(0, gate.rank, mx.int32)
    return lora_swiglu(flat, (one, other), u, (gate.lora_b, up.lora_b), scale, offset).reshape(*x.shape[:-1], -1)


@functools.lru_cache(maxsize=1024)
def _pair(first: float, second: float, dtype: mx.Dtype) -> mx.array:
    return mx.array([first, second], dtype)
