"""What every adapter method shares: the frozen base layer below it, whatever its kind and precision.

Three kinds of base are recognised by their attributes, so that nothing here imports mlx-lm: linear, embedding (anything
with ``as_linear``) and switch (one matrix per expert, mixtures of experts), each dense or quantized in any of MLX's
modes; and linears of other storage (NF4), which tell ``unpacked_shape`` and give their numbers by ``unpacked``. Methods
live in files of their own; models are walked in ``model.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError


def kind(module: nn.Module) -> str | None:
    """``"linear"``, ``"embedding"``, ``"switch"``, or None for a module that no adapter sits on."""
    weight = module.get("weight")
    # QQLinear quantizes its input as well; a class with ``to_lora`` does not compute what its base class does.
    if not isinstance(weight, mx.array) or isinstance(module, nn.QQLinear) or hasattr(module, "to_lora"):
        return None
    if hasattr(module, "unpacked_shape"):
        return "linear"
    if weight.ndim == 3 and hasattr(module, "num_experts"):
        return "switch"
    if weight.ndim != 2 or (is_quantized(module) and weight.dtype != mx.uint32):
        return None
    if hasattr(module, "as_linear"):
        return "embedding"
    return "linear" if isinstance(module, (nn.Linear, nn.QuantizedLinear)) else None


def derived(maker: Callable[..., type], *args: Any, before: tuple[type, ...] = (), **members: Any) -> type:
    """A sub-class of ``args[0]``, so that ``isinstance`` goes on telling the truth, with ``members``.

    ``before``: classes that come first.

    ``maker``: the function at the top of a module that made it of ``args``, and makes it again for a copy or a pickle.
    """
    kind = args[0]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return (_blank, (maker, args), *state)

    return type(
        kind.__name__, (*before, kind), {"__module__": kind.__module__, "__reduce_ex__": __reduce_ex__, **members}
    )


def _blank(maker: Callable[..., type], args: tuple) -> nn.Module:
    made = maker(*args)
    return made.__new__(made)


def is_quantized(base: nn.Module) -> bool:
    """True where the numbers are packed: MLX's quantized layers (``weight`` beside ``scales``) and NF4."""
    return ("scales" in base and hasattr(base, "bits")) or hasattr(base, "unpacked_shape")


def dims(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear or switch layer, (vocabulary, dim) of an embedding."""
    rows, columns = getattr(base, "unpacked_shape", base.weight.shape)[-2:]
    if "scales" in base:
        columns = base.scales.shape[-1] * base.group_size
    return (rows, columns) if kind(base) == "embedding" else (columns, rows)


def base_dtype(base: nn.Module) -> mx.Dtype | None:
    """The float dtype the layer computes in; None where its storage does not tell (mxfp4, mxfp8, nvfp4)."""
    stored = base.get("scales", base.weight).dtype
    return stored if mx.issubdtype(stored, mx.floating) else None


def dense_weight(base: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The layer's weight as plain numbers, [..., rows, columns] in ``dtype``, dequantized where it must be."""
    if not is_quantized(base):
        return base.weight.astype(dtype)
    if hasattr(base, "unpacked"):
        return base.unpacked(dtype)

    def dequantize(weight, scales, biases, global_scale=None):
        # Widened first: mx.dequantize rounds its products to the dtype of the scales.
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            weight,
            scales,
            biases,
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
            global_scale=global_scale,
            dtype=mx.float32,
        ).astype(dtype)

    if base.get("global_scale") is not None:  # nvfp4 experts, each with a scale of its own
        parts = zip(base.weight, base.scales, base.global_scale, strict=True)
        return mx.stack([dequantize(weight, scales, None, scale) for weight, scales, scale in parts])
    return dequantize(base.weight, base.scales, base.get("biases"))


def project(base: nn.Module, x: mx.array) -> mx.array:
    """``x W^T`` without the bias, for linear and embedding bases. x: [..., columns] -> [..., rows]."""
    if hasattr(base, "project"):  # a base with a way of its own, see cpu.py
        return base.project(x)
    if kind(base) == "embedding":
        return base.as_linear(x)
    if not is_quantized(base):
        return x @ base.weight.T
    return mx.quantized_matmul(
        x,
        base.weight,
        scales=base.scales,
        biases=base.get("biases"),
        transpose=True,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


class AdapterLayer(nn.Module):
    """A trainable update over a frozen base layer.

    A method adds three things: its parameters, ``__call__``, and ``merged_weight``. Sub-classes name their kind in
    ``slot``, the attribute that holds the base (mlx-lm's names, so that parameter paths agree).

    Args:
        base: the layer to adapt; frozen here.
        rank: rank of the update.
        scale: multiplier of the update.
        dropout: probability of dropping an input of the update, in training.
        dtype: of ``lora_a`` and ``lora_b``; the base's own where that is known.
    """

    method = ""
    slot = "linear"
    input_only = False  # an embedding whose update a tied head does not see

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, dtype: mx.Dtype):
        super().__init__()
        base.freeze()
        self[self.slot] = base
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        # The low-rank matrices compute in the model's dtype: the forward pass needs no casts. Its name: a dtype of MLX
        # can be neither copied nor pickled.
        self._dtype_name = str(base_dtype(base) or dtype).rpartition(".")[2]
        self._rank = rank

    @property
    def _dtype(self) -> mx.Dtype:
        return getattr(mx, self._dtype_name)

    @property
    def base(self) -> nn.Module:
        return self[self.slot]

    @property
    def rank(self) -> int:
        return self._rank

    def merged_weight(self, weight: mx.array) -> mx.array:
        """The base's float32 ``weight`` with the update in it, same shape, float32."""
        raise NotImplementedError

    def merged_bias(self) -> mx.array | None:
        """The bias with the update in it, None where there is none. [out], or [experts, out]."""
        return self.base.get("bias")

    def adapter_weights(self) -> dict[str, mx.array]:
        """The layer's own arrays by leaf name: ``lora_a``, ``lora_b``, ..."""
        return {name: self[name] for name in self.leaves}

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={1 - self.dropout._p_1:g}"


def check_rank(base: nn.Module, rank: int) -> None:
    """Refuse to make a low-rank update of more rank than its layer. (One that was made elsewhere may have it.)"""
    limit = min(dims(base))
    if rank > limit:
        raise AdapterError(
            f"rank {rank} is larger than the layer it should adapt ({dims(base)[0]} x {dims(base)[1]})",
            f"A rank of {limit} already expresses every update of this layer; choose a smaller one.",
        )


def uniform(bound: float, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """U(-bound, bound) drawn in float32, so that every dtype starts from the same numbers."""
    return mx.random.uniform(-bound, bound, shape).astype(dtype)
