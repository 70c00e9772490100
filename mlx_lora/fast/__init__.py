"""Optional acceleration: fewer launches and less memory, with the same results.

``accelerate`` changes the classes of some modules of a model in place, ``restore`` changes them back, and ``explain``
lists what was done to which module, and why the others were not changed. ``MLX_LORA_FAST=off`` leaves every model as it
is: the layers then compute by their written formulas, with the same results within the dtype's tolerance.

``accelerate`` decides everything when it is called, from ``MLX_LORA_KERNELS``, the device and the adapters on the
model. ``attach``, ``mount`` and ``load`` call it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import is_quantized, kind
from ..base.nf4_linear import NF4Linear
from ..device import is_cpu
from ..errors import ConfigError
from ..kernels import enabled
from ..layers import AdapterLayer, MultiLoRALinear
from ..layers.dora import DoRAEmbedding, DoRALinear, DoRASwitchLinear
from . import attention, blas, decode, gated_delta, mlp
from .dora import KeptNorms
from .shared_input import SharesInput, families
from .swap import address, is_swapped, plain_class, swap, undo

_ADAPTERS = (AdapterLayer, MultiLoRALinear)
_DECODE = ("lora_shrink", "lora_qmv")  # kernels that decoding an adapter requires
_TODO = "call accelerate(model)"
_AGAIN = "activation recomputation in training"
_CHUNKS = "gated delta rule in chunks in training"
_BLOCKS = "attention in blocks of queries in training"
_DORA = (DoRALinear, DoRAEmbedding, DoRASwitchLinear)


@dataclass(frozen=True)
class Explanation:
    """What was done to one module, or the reason why nothing was."""

    path: str
    module: str  # its class
    what: str  # "float32 BLAS", "decode kernels", "shared input", "one launch of SwiGLU", ...
    done: bool
    reason: str = ""  # why nothing was done


def accelerate(model: nn.Module) -> list[nn.Module]:
    """Apply everything that saves time or memory on this device. Calling it again is harmless.

    Returns: the modules whose class changed, for ``undo``. Raises: ConfigError: an unknown MLX_LORA_FAST.
    """
    if not _on():
        return []
    changed: list[nn.Module] = []
    kernels, modules = enabled(*_DECODE), model.modules()

    def put(module: nn.Module, mixin: type | None) -> None:
        if mixin is not None and not is_swapped(module):
            swap(module, mixin)
            changed.append(module)

    # Bases, then the adapters on them, then the modules that hold several adapters.
    for module in modules:
        put(module, _base_mixin(module, kernels))
    for module in modules:
        if isinstance(module, _ADAPTERS):
            if kernels or isinstance(module, _DORA):
                _make_contiguous(module)
            put(module, _adapter_mixin(module, kernels))
    for module in modules:
        put(module, _parent_mixin(module, kernels))
    return changed


def restore(model: nn.Module) -> None:
    """Give every module of ``model`` its own class back."""
    undo(model.modules())


def explain(model: nn.Module) -> list[Explanation]:
    """What was done to each module of ``model``, and for the others the obstacle; in the model's order."""
    return [row for path, module in reversed(model.named_modules()) for row in _explained(path, module)]


def _on() -> bool:
    wanted = os.environ.get("MLX_LORA_FAST") or "on"
    if wanted not in ("on", "off"):
        raise ConfigError(f"MLX_LORA_FAST is {wanted!r}", "Set it to on or off.")
    return wanted == "on"


def _base_mixin(module: nn.Module, kernels: bool) -> type | None:
    if kernels:
        return decode.DecodesNF4 if isinstance(module, NF4Linear) else None
    return blas.BY_KIND.get(kind(module)) if is_cpu() and is_quantized(module) and blas.knows(module) else None


def _adapter_mixin(layer: nn.Module, kernels: bool) -> type | None:
    if kernels and decode.obstacle(layer) is None:
        return decode.MIXINS[plain_class(layer)]
    return KeptNorms if isinstance(layer, _DORA) else None


def _parent_mixin(module: nn.Module, kernels: bool) -> type | None:
    if gated_delta.has_gated_delta(module) and gated_delta.obstacle(module) is None:
        return gated_delta.ChunkedDelta
    if attention.has_attention(plain_class(module)) and attention.obstacle(module) is None:
        return attention.BlockedAttention
    if not kernels:
        return None
    if mlp.form_of(module) is not None and any(isinstance(child, _ADAPTERS) for child in module.values()):
        return mlp.FastMLP
    if _has_adapted_experts(module) and mlp.known_activation(module):
        return mlp.FastExperts
    return SharesInput if families(module) else None


def _has_adapted_experts(module: nn.Module) -> bool:
    layers = [child for child in module.values() if isinstance(child, AdapterLayer)]
    return any(kind(layer.base) == "switch" for layer in layers)


def _make_contiguous(layer: nn.Module) -> None:
    """Copy transposed matrices (PEFT, GPT-2): a kernel would copy them at each call, and norms could not be kept."""
    names = [name for name in ("lora_a", "lora_b") if name in layer]
    for module, name in [(layer, name) for name in names] + [(layer.base, "weight")]:
        if not is_quantized(module) and address(module[name]) is None:
            module[name] = mx.contiguous(module[name])
            mx.eval(module[name])


def _explained(path: str, module: nn.Module) -> Iterator[Explanation]:
    def row(what: str, done: bool, reason: str | None = "") -> Explanation:
        return Explanation(path, plain_class(module).__name__, what, done, "" if done else reason or "")

    off = None if _on() else "MLX_LORA_FAST=off"
    no_kernels = off or (None if enabled(*_DECODE) else "kernels are off: " + _why_no_kernels())
    if is_quantized(module) and kind(module) and is_cpu():
        done = isinstance(module, tuple(blas.BY_KIND.values()))
        reason = off or (None if no_kernels else "kernels are on")
        yield row(
            "float32 BLAS", done, reason or (_TODO if blas.knows(module) else "its class is not MLX's or mlx-lm's")
        )
    if isinstance(module, _ADAPTERS):
        done = isinstance(module, decode.Decodes)
        yield row("decode kernels", done, no_kernels or decode.obstacle(module) or _TODO)
        if isinstance(module, _DORA):
            yield row("norms kept between calls", isinstance(module, KeptNorms), off or _TODO)
    if gated_delta.has_gated_delta(module):
        yield row(_CHUNKS, isinstance(module, gated_delta.ChunkedDelta), off or gated_delta.obstacle(module) or _TODO)
    if attention.has_attention(plain_class(module)):
        yield row(_BLOCKS, isinstance(module, attention.BlockedAttention), off or attention.obstacle(module) or _TODO)
    adapted = [child for child in module.values() if isinstance(child, _ADAPTERS)]
    if not adapted or isinstance(module, _ADAPTERS):
        return
    if len(adapted) > 1:
        shared = [name for family in families(module) for name in family]
        done = isinstance(module, SharesInput) and bool(shared)
        yield row(
            "shared input" + (f": {', '.join(shared)}" if done else ""), done, no_kernels or _why_not_shared(module)
        )
    if form := mlp.form_of(module):
        fast = isinstance(module, mlp.FastMLP)
        yield row(_AGAIN, fast, no_kernels or _TODO)
        obstacle = no_kernels or mlp.swiglu_obstacle(module, form)
        yield row("fused gate, up and SwiGLU", fast and obstacle is None, obstacle)
    elif _has_adapted_experts(module):
        yield row(
            "activation recomputation in training",
            isinstance(module, mlp.FastExperts),
            no_kernels or "unknown activation",
        )
    elif any(name in module for name in ("down_proj", "w2", "c_proj", "fc2")):
        yield row(
            "activation recomputation in training",
            False,
            f"{type(module).__module__}.{type(module).__name__} is not a known MLP",
        )


def _why_no_kernels() -> str:
    wanted = os.environ.get("MLX_LORA_KERNELS") or "auto"
    return f"MLX_LORA_KERNELS={wanted}" + (" and MLX does not compute on Metal" if wanted == "auto" else "")


def _why_not_shared(module: nn.Module) -> str:
    if not all(isinstance(child, decode.Decodes) for child in module.values() if isinstance(child, _ADAPTERS)):
        return "some of its adapters have no kernel"
    return "its adapters are not known to read the same input, or differ in dtype or ranks"


__all__ = ["Explanation", "accelerate", "explain", "restore", "undo"]
