"""PyTorch's zip archives, written without PyTorch."""

from __future__ import annotations

import itertools
import struct
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import array_bytes
from .tensors import STORAGES


def write_torch(path: Path, value: dict[str, Any]) -> None:
    """Write nested dicts of arrays, numbers, strings, lists and tuples as ``torch.save`` would (protocol 2, zip).

    ``torch.load(path, weights_only=True)`` reads it. Arrays start at multiples of 64 bytes, as PyTorch's do.
    """
    arrays: list[mx.array] = []
    program = b"\x80\x02" + _encode(value, arrays) + b"."
    root = path.name.partition(".")[0] or "archive"
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        first, last = [("data.pkl", program), ("byteorder", b"little")], [("version", b"3\n")]
        numbers = ((f"data/{i}", array_bytes(array)) for i, array in enumerate(arrays))  # copied one at a time
        for name, data in itertools.chain(first, numbers, last):
            info = zipfile.ZipInfo(f"{root}/{name}")  # with a fixed date: the same adapter gives the same file
            at = file.tell() + 30 + len(info.filename.encode())
            pad = -(at + 4) % 64
            info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
            archive.writestr(info, data)


_KINDS = {dtype: name for name, (_, dtype) in STORAGES.items() if name != "DoubleStorage"}


def _encode(value: Any, arrays: list[mx.array]) -> bytes:
    if isinstance(value, mx.array):
        key = str(len(arrays))
        arrays.append(value)
        strides, step = [], 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= size
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + _text("storage")
            + f"ctorch\n{_KINDS[value.dtype]}\n".encode()
            + _text(key)
            + _text("cpu")
            + _number(value.size)
            + b"tQ"
            + _number(0)
            + b"("
            + b"".join(_number(n) for n in value.shape)
            + b"t("
            + b"".join(_number(n) for n in strides)
            + b"t\x89ccollections\nOrderedDict\n)RtR"
        )
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return b"}(" + b"".join(_encode(k, arrays) + _encode(v, arrays) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_encode(v, arrays) for v in value) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(_encode(v, arrays) for v in value) + b"t"
    raise TypeError(f"a {type(value).__name__} cannot be written into a checkpoint")


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    if 0 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
