"""A linear layer with NF4 weights, and its arrays under bitsandbytes' checkpoint names.

QLoRA's base layer (arXiv:2305.14314): frozen, and dequantized for each product, in the forward pass and again in the
backward pass, so that no dense copy is kept. Decoding on Metal dequantizes inside the kernel. (QLoRA's paged
optimizer has no counterpart here: with unified memory there is no other memory to page to.)
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ModelError
from ..kernels import with_backward
from .nf4 import NESTED_BLOCK, NF4, NF4_VALUES, dequantize_nf4, quantize_nf4

STATE = "weight.quant_state.bitsandbytes__nf4"  # a checkpoint's JSON, as bytes
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class NF4Linear(nn.Module):
    """y = W x + b with W [out, in] in NF4.

    ``weight``: uint8 [ceil(out in / 2)]; ``absmax``: uint8 or uint32 [blocks]; with double quantization also
    ``nested_absmax`` [blocks / 256], ``nested_map`` [256] and ``nested_offset`` [1]. float32 values are stored as their
    bits in uint32, so that ``set_dtype`` does not round them.

    Args:
        nf4: the weight.
        bias: [out].
        dtype: of the weight before it was quantized; checkpoints record it.
    """

    bits, mode = 4, "nf4"

    def __init__(self, nf4: NF4, bias: mx.array | None = None, dtype: mx.Dtype = mx.float32):
        super().__init__()
        self.weight = nf4.codes
        self.absmax = nf4.absmax if nf4.nested else nf4.absmax.view(mx.uint32)
        if nf4.nested:
            largest, values, offset = nf4.nested
            self.nested_absmax, self.nested_map = largest.view(mx.uint32), values.view(mx.uint32)
            self.nested_offset = offset.reshape(1).view(mx.uint32)
        if bias is not None:
            self.bias = bias
        self.group_size, self.nested_block = nf4.block, nf4.nested_block
        self._dtype_name = str(dtype).rpartition(".")[2]  # MLX's dtypes can be neither copied nor pickled
        self._rows, self._columns = nf4.shape
        self.freeze()

    @classmethod
    def from_linear(cls, linear: nn.Module, double: bool = True, block: int = 64) -> NF4Linear:
        """The dense layer ``linear`` with its weight quantized."""
        return cls(quantize_nf4(linear.weight, double, block), linear.get("bias"), linear.weight.dtype)

    @property
    def unpacked_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._rows, self._columns

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the weight before it was quantized."""
        return getattr(mx, self._dtype_name)

    @property
    def nf4(self) -> NF4:
        """The quantized weight."""
        return _value(self.unpacked_shape, self.group_size, self.nested_block, self._arrays())

    def _arrays(self) -> list[mx.array]:
        names = ("weight", "absmax", "nested_absmax", "nested_map", "nested_offset")
        return [self[name] for name in names if name in self]

    def unpacked(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """The dequantized weight, [out, in]."""
        return dequantize_nf4(self.nf4, dtype)

    def project(self, x: mx.array) -> mx.array:
        """``x W^T`` without the bias. x: [..., in] -> [..., out]."""
        return _product(self.unpacked_shape, self.group_size, self.nested_block)(x, *self._arrays())

    def __call__(self, x: mx.array) -> mx.array:
        y = self.project(x)
        return y + self["bias"] if "bias" in self else y

    def checkpoint(self) -> dict[str, mx.array]:
        """The layer's arrays with the names and shapes of a bitsandbytes checkpoint."""
        nf4 = self.nf4
        about: dict[str, Any] = {"quant_type": "nf4", "blocksize": nf4.block}
        about |= {"dtype": next(n for n, d in _DTYPES.items() if d == self.dtype), "shape": list(nf4.shape)}
        found = {
            "weight": nf4.codes.reshape(-1, 1),
            "weight.absmax": nf4.absmax,
            "weight.quant_map": mx.array(NF4_VALUES, mx.float32),
        }
        if nf4.nested:
            largest, values, offset = nf4.nested
            about |= {"nested_blocksize": nf4.nested_block, "nested_dtype": "float32", "nested_offset": offset.item()}
            found |= {"weight.nested_absmax": largest, "weight.nested_quant_map": values}
        found[STATE] = mx.array(np.frombuffer(json.dumps(about).encode(), np.uint8))
        return found | ({"bias": self.bias} if "bias" in self else {})

    def _extra_repr(self) -> str:
        rows, columns = self.unpacked_shape
        double = ", double quantized" if "nested_absmax" in self else ""
        return f"input_dims={columns}, output_dims={rows}, bias={'bias' in self}, block={self.group_size}{double}"


def read_checkpoint(path: str, arrays: dict[str, mx.array], bias: mx.array | None) -> NF4Linear:
    """The layer at ``path`` of a bitsandbytes checkpoint.

    Args:
        arrays: the checkpoint's arrays whose names start with ``<path>.weight``, named without ``<path>.``

    Raises: ModelError: arrays that are missing or do not belong to an NF4 layer.
    """
    try:
        about = json.loads(bytes(np.array(arrays[STATE])).decode())
        shape, block = tuple(about["shape"]), int(about["blocksize"])
        codes = arrays["weight"].reshape(-1)
        # FSDP checkpoints store the codes in another dtype
        codes = codes if codes.dtype == mx.uint8 else codes.view(mx.uint8)
        absmax, nested, nested_block = arrays["weight.absmax"], None, NESTED_BLOCK
        if "weight.nested_absmax" in arrays:
            offset = mx.array(about["nested_offset"], mx.float32)
            nested_block = int(about["nested_blocksize"])
            nested = (arrays["weight.nested_absmax"], arrays["weight.nested_quant_map"].astype(mx.float32), offset)
        size = math.prod(shape)
        blocks = -(-size // block)
        table = np.array(arrays["weight.quant_map"].astype(mx.float32))
        valid = codes.size == -(-size // 2) and absmax.size == blocks and len(shape) == 2
        if nested is not None:
            valid = valid and nested[0].size == -(-blocks // nested_block) and nested[1].size == 256
        if not valid or not np.allclose(table, NF4_VALUES, atol=1e-6):
            raise ValueError("the sizes of its arrays contradict each other")
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not an NF4 weight of bitsandbytes ({error})", "Download the model again.") from None
    absmax = absmax if nested else absmax.astype(mx.float32)
    return NF4Linear(NF4(codes, absmax, nested, shape, block, nested_block), bias, _DTYPES[about["dtype"]])


def _value(shape: tuple[int, ...], block: int, nested_block: int, arrays: list[mx.array]) -> NF4:
    codes, absmax, *nested = arrays
    if not nested:
        return NF4(codes, absmax.view(mx.float32), None, shape, block)
    largest, values, offset = (array.view(mx.float32) for array in nested)
    return NF4(codes, absmax, (largest, values, offset.reshape(())), shape, block, nested_block)


@functools.cache
def _product(shape: tuple[int, ...], block: int, nested_block: int):
    """``x W^T`` for weights of this shape. The backward pass dequantizes W again instead of keeping it."""

    def product(x, *arrays):
        return x @ dequantize_nf4(_value(shape, block, nested_block, list(arrays)), x.dtype).T

    def backward(primals, cotangent, _):
        x, *arrays = primals
        weight = dequantize_nf4(_value(shape, block, nested_block, arrays), x.dtype)
        return (cotangent @ weight, *[mx.zeros_like(array) for array in arrays])

    return with_backward(product, backward)
