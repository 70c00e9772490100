"""The GGUF container (version 3): key-value pairs and tensors, read and written. Knows no adapters.

The ``gguf`` package writes. Its reader follows the sizes that a file declares without checking them (an array that
declares 2^50 items blocks it forever), so this module reads: every size is checked against the file's length before it
is used. Tensors are float32, float16, bfloat16 or Q8_0 (blocks of 32 signed bytes with a float16 scale).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FormatError
from .files import array_bytes

MAGIC, ALIGNMENT = b"GGUF", 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_PAIRS, _MOST_TENSORS, _MOST_ITEMS = 100_000, 200_000, 5_000_000
_F32, _F16, _Q8_0, _BF16 = 0, 1, 8, 30
# {mlx-lora's name: the name in the gguf package}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


class _Cursor:
    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > self.data.size:
            raise ValueError(f"it ends within the {count} bytes at {self.at}")
        part = self.data[self.at : self.at + count].tobytes()
        self.at += count
        return part

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if count > min(_MOST_ITEMS, self.data.size):
                raise ValueError(f"an array of {count} items")
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise ValueError(f"a value of kind {kind}")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(key-value pairs, tensors with the slowest dimension first).

    Raises: FormatError: the file is damaged, or has tensors of a type that is not read.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(data)
        if cursor.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, pairs = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        if tensors > _MOST_TENSORS or pairs > _MOST_PAIRS:
            raise ValueError(f"it declares {tensors} tensors and {pairs} pairs")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in values:
                raise ValueError(f"{key!r} twice")
            values[key] = cursor.value(cursor.number("I"))
        infos: dict[str, tuple[list[int], int, int]] = {}
        for _ in range(tensors):
            name, count = cursor.text(), cursor.number("I")
            if name in infos or count > 4:
                raise ValueError(f"{name!r} twice, or of {count} dimensions")
            infos[name] = [cursor.number("Q") for _ in range(count)], cursor.number("I"), cursor.number("Q")
        alignment = values.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        start = cursor.at + -cursor.at % alignment
        return values, {name: _tensor(path, data.size, start, name, *info) for name, info in infos.items()}
    except (OSError, ValueError, TypeError, struct.error, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            f"{path}: is not a complete GGUF file ({error})", "Save or download the file again."
        ) from None


def _tensor(path: Path, length: int, start: int, name: str, sizes: list[int], kind: int, offset: int) -> mx.array:
    shape, count = tuple(reversed(sizes)), math.prod(sizes)
    width = {_F32: 4, _F16: 2, _BF16: 2}.get(kind)
    if kind == _Q8_0 and sizes and sizes[0] % 32 == 0:
        size = count // 32 * 34
    elif width:
        size = count * width
    else:
        raise ValueError(f"{name} is of kind {kind}; only float32, float16, bfloat16 and Q8_0 are read")
    if start + offset + size > length:
        raise ValueError(f"{name} of shape {list(shape)} lies outside the file")
    # read, not mapped: a mapped copy would use the memory twice
    part = np.fromfile(path, np.uint8, size, offset=start + offset)
    if not count:
        return mx.zeros(shape)
    if kind == _Q8_0:
        blocks = part.reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return mx.array((blocks[:, 2:].view(np.int8) * scales).reshape(shape))
    if kind == _BF16:
        return mx.array(part.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    return mx.array(part.view(np.float32 if kind == _F32 else np.float16)).reshape(shape)


def write_gguf(
    path: Path, pairs: dict[str, Any], tensors: dict[str, mx.array], types: dict[str, str] | None = None
) -> None:
    """Write key-value pairs and tensors.

    Args:
        pairs: strings, booleans, integers (stored as uint32), floats (as float32), and lists of one of these (integers
            as int32). ``general.architecture`` is required.
        tensors: float arrays by name. Each is computed when it is written and then removed from ``tensors``, so only
            one lazy array is in memory at a time.
        types: the name in ``TYPES`` that a tensor is stored as; by default its own dtype.

    Raises: FormatError: a number is too large for float16.
    """
    import gguf

    types = {name: (types or {}).get(name) or str(array.dtype).rpartition(".")[2] for name, array in tensors.items()}
    architecture = pairs["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in pairs.items():
            if key == "general.architecture":  # the writer has stored it
                continue
            kind = gguf.GGUFValueType.get_type(value)
            unsigned = kind == gguf.GGUFValueType.INT32
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if unsigned else kind)
        for name, array in tensors.items():
            kind = gguf.GGMLQuantizationType[TYPES[types[name]]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(name, array.shape, np.dtype(np.float32), array.size // block * size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in list(tensors):
            writer.write_tensor_data(_encoded(name, tensors.pop(name), types[name]))
    finally:
        writer.close()


def _encoded(name: str, array: mx.array, stored: str) -> np.ndarray:
    if stored == "q8_0":
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(np.array(array.astype(mx.float32), copy=False), GGMLQuantizationType.Q8_0)
    made = array.astype(getattr(mx, stored))
    if stored == "float16" and array.size and not mx.isfinite(made).all().item():
        raise FormatError(f"{name}: has numbers that float16 cannot hold", "Write bfloat16 or float32 (--dtype).")
    return np.frombuffer(array_bytes(made), np.uint8)
