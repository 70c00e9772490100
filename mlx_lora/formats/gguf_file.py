"""The GGUF container (version 3): key-value pairs and tensors, read and written. Knows no adapters.

All sizes that a file declares are checked against its length before they are used. Tensors are float32, float16 or
bfloat16. Q8_0 (blocks of 32 signed bytes with a float16 scale) can be read too.
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
_KINDS = {mx.float32: _F32, mx.float16: _F16, mx.bfloat16: _BF16}


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
    part = np.fromfile(path, np.uint8, size, offset=start + offset)  # read, not mapped: mapped and copied counts twice
    if not count:
        return mx.zeros(shape)
    if kind == _Q8_0:
        blocks = part.reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return mx.array((blocks[:, 2:].view(np.int8) * scales).reshape(shape))
    if kind == _BF16:
        return mx.array(part.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    return mx.array(part.view(np.float32 if kind == _F32 else np.float16)).reshape(shape)


def write_gguf(path: Path, pairs: dict[str, str | int | float], tensors: dict[str, mx.array]) -> None:
    """Write key-value pairs (strings, integers as uint32, floats as float32) and float tensors."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    for key, value in pairs.items():
        head.append(_text(key))
        if isinstance(value, str):
            head.append(struct.pack("<I", _STRING) + _text(value))
        elif isinstance(value, int):
            head.append(struct.pack("<II", 4, value))
        else:
            head.append(struct.pack("<If", 6, value))
    offset = 0
    for name, array in tensors.items():
        sizes = array.shape[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, _KINDS[array.dtype], offset))
        offset += array.nbytes + -array.nbytes % ALIGNMENT
    with path.open("wb") as file:
        text = b"".join(head)
        file.write(text + b"\0" * (-len(text) % ALIGNMENT))
        for array in tensors.values():
            file.write(array_bytes(array))
            file.write(b"\0" * (-array.nbytes % ALIGNMENT))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
