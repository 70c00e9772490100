"""PyTorch's tensors as described in a pickle: a storage of numbers, and the shape and strides of a view of it.

Declared sizes are checked against the storage. Reads no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# torch's storage class: (numpy type of the same bits, MLX type)
STORAGES = {
    "FloatStorage": (np.float32, mx.float32),
    "DoubleStorage": (np.float64, mx.float32),
    "HalfStorage": (np.float16, mx.float16),
    "BFloat16Storage": (np.uint16, mx.bfloat16),
    "LongStorage": (np.int64, mx.int64),
    "IntStorage": (np.int32, mx.int32),
    "ShortStorage": (np.int16, mx.int16),
    "CharStorage": (np.int8, mx.int8),
    "ByteStorage": (np.uint8, mx.uint8),
    "BoolStorage": (np.bool_, mx.bool_),
}


@dataclass(frozen=True)
class Storage:
    """Numbers of one type (``kind``, a key of ``STORAGES``) that tensors share; the file stores them under ``key``."""

    key: str
    kind: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as described in the pickle: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def checked(ref: TensorRef) -> TensorRef:
    """Return ``ref``. Raises ValueError for a tensor outside its storage, or with more numbers than its storage."""
    sizes = (ref.offset, *ref.shape, *ref.strides)
    if not isinstance(ref.storage, Storage) or len(ref.shape) != len(ref.strides) or len(ref.shape) > 8:
        raise ValueError("a tensor without storage or strides")
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**62 for n in sizes):
        raise ValueError(f"a tensor of shape {ref.shape} and strides {ref.strides}")
    if math.prod(ref.shape):
        last = ref.offset + sum((n - 1) * stride for n, stride in zip(ref.shape, ref.strides, strict=True))
        if last >= ref.storage.numel or math.prod(ref.shape) > ref.storage.numel:
            raise ValueError(f"a tensor of shape {ref.shape} in a storage of {ref.storage.numel} numbers")
    return ref


def to_array(ref: TensorRef, flat: np.ndarray) -> mx.array:
    """The tensor, from the bytes ``flat`` (uint8) of its storage. float64 becomes float32."""
    numbers, dtype = STORAGES[ref.storage.kind]
    if flat.size < ref.storage.numel * np.dtype(numbers).itemsize:
        raise ValueError(f"storage {ref.storage.key} is shorter than declared")
    flat = flat[: ref.storage.numel * np.dtype(numbers).itemsize].view(numbers)
    if not math.prod(ref.shape):
        return mx.zeros(ref.shape, dtype)
    steps = tuple(stride * flat.itemsize for stride in ref.strides)
    view = np.lib.stride_tricks.as_strided(flat[ref.offset :], ref.shape, steps, writeable=False)
    if numbers is np.float64:
        view = view.astype(np.float32)
    array = mx.array(view if view.flags.c_contiguous else np.ascontiguousarray(view))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
