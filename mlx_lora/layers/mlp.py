"""MLPs where kernels are used: gate, up and SwiGLU in one launch when decoding, less memory when training.

The launch saves two of a layer: the second projection's and the activation's. It is for LoRA on both projections, and
for modules whose own ``__call__`` is that formula word for word, as most of mlx-lm's are. Training is for any MLP whose
projections can be told from what is between them (``activation.py``); on a CPU, where computing an exponential again
costs more than memory is worth, it is off as the kernels are. All other calls compute as they are written.
"""

from __future__ import annotations

import functools
import inspect

import mlx.core as mx
import mlx.nn as nn

from ..kernels import enabled, lora_shrink, lora_swiglu
from .activation import Shape, recompute_activation, shape_of, trained
from .base import derived
from .lora import LoRALinear
from .siblings import fits

_FORMULA = "return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))"


def fuse_mlps(model: nn.Module) -> None:
    """Let the MLPs of ``model`` use fewer launches and less memory where it is possible, see the top."""
    for module in model.modules():
        kind = type(module)
        if not hasattr(kind, "_fused") and (shape := shape_of(module, kind.__call__)):
            module.__class__ = _fused(kind, shape)
        recompute_activation(module)


@functools.cache
def _is_the_formula(kind: type) -> bool:
    try:
        lines = [line.strip() for line in inspect.getsource(kind.__call__).strip().splitlines()]
    except (OSError, TypeError):  # no source
        return False
    return len(lines) == 2 and lines[1] == _FORMULA


@functools.cache
def _fused(kind: type, shape: Shape) -> type:
    """``kind`` with another ``__call__``."""

    def __call__(self, *args, **kwargs) -> mx.array:
        if len(args) == 1 and not kwargs:
            if self.training and enabled():
                return trained(self, kind.__call__, shape, *args)
            y = swiglu(self.gate_proj, self.up_proj, *args) if _is_the_formula(kind) else None
            if y is not None:
                return self.down_proj(y)
        return kind.__call__(self, *args, **kwargs)

    return derived(_fused, kind, shape, __call__=__call__, _fused=True)


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
