"""Gate, up and SwiGLU of an MLP in one launch, where LoRA sits on both projections and the MLP decodes on Metal.

Saves two launches of a layer: the second projection's and the activation's. Only for modules whose own ``__call__`` is
that formula word for word, as most of mlx-lm's are; all others, and all other calls, compute as they are written.
"""

from __future__ import annotations

import functools
import inspect

import mlx.core as mx
import mlx.nn as nn

from ..kernels import lora_shrink, lora_swiglu
from .lora import LoRALinear
from .siblings import fits

_FORMULA = "return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))"


def fuse_mlps(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Let the MLPs of ``model`` whose gate is among ``layers`` use the one launch where it is possible."""
    modules = dict(model.named_modules())
    for path in layers:
        parent, _, name = path.rpartition(".")
        if name == "gate_proj" and f"{parent}.up_proj" in layers and _is_the_formula(type(modules[parent])):
            modules[parent].__class__ = _fused(type(modules[parent]))


@functools.cache
def _is_the_formula(kind: type) -> bool:
    try:
        lines = [line.strip() for line in inspect.getsource(kind.__call__).strip().splitlines()]
    except (OSError, TypeError):  # no source
        return False
    return len(lines) == 2 and lines[1] == _FORMULA


@functools.cache
def _fused(kind: type) -> type:
    """``kind`` with another ``__call__``; a sub-class, so that ``isinstance`` goes on telling the truth."""

    def __call__(self, x: mx.array) -> mx.array:
        y = swiglu(self.gate_proj, self.up_proj, x)
        return kind.__call__(self, x) if y is None else self.down_proj(y)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})


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
