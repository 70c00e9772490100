"""PyTorch's files (``.pt``, ``.bin``, ``.ckpt``, ``.pth``), read without PyTorch.

Both layouts are read: the zip archive, whose arrays are read one by one, and the stream that PyTorch before 1.6 wrote.
``pickles.py`` interprets the pickle in them and refuses everything that is not data. Declared sizes are checked against
the file's.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError
from ..files import AGAIN
from .pickles import Interpreter, replace_tensors
from .tensors import STORAGES, Storage, to_array

_MAX_STREAM = 16 << 30  # bytes; streams are read into memory completely
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Errors that a damaged file may raise.
_DAMAGED = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, struct.error),
    *(zipfile.BadZipFile, NotImplementedError, MemoryError, RecursionError, RuntimeError),
)


def is_pickle(path: Path) -> bool:
    """Whether a file starts like PyTorch's archives or streams."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def read_torch(path: Path, start: int = 0, size: int | None = None) -> Any:
    """What ``torch.load(path, weights_only=True)`` would give, tensors as MLX arrays; float64 becomes float32.

    Args:
        start, size: the range of bytes to read, for a file in an archive; by default the whole file.

    Raises:
        FormatError: the file is damaged, or would run code; the error names what it would run.
    """
    return _read(path, start, size, arrays=True)


def peek_torch(path: Path) -> Any:
    """As ``read_torch``, but with a ``TensorRef`` for each tensor; no array is read."""
    return _read(path, 0, None, arrays=False)


def _read(path: Path, start: int, size: int | None, arrays: bool) -> Any:
    try:
        window = np.memmap(path, np.uint8, "r")[start : None if size is None else start + size]
        if window[:4].tobytes() == b"PK\x03\x04":
            value, storages = _read_zip(window, path, start)
        else:
            value, storages = _read_stream(window, path)
        return replace_tensors(value, lambda ref: to_array(ref, storages[ref.storage.key]), [0]) if arrays else value
    except FormatError:
        raise
    except _DAMAGED as error:
        fault = f"{type(error).__name__}: {error}"
        raise FormatError(f"{path}: is not a complete PyTorch file ({fault})", AGAIN) from None


def _read_zip(window: np.ndarray, path: Path, start: int) -> tuple[Any, _Stored]:
    with zipfile.ZipFile(_Bytes(window)) as archive:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in entries:
                raise ValueError(f"two entries {info.filename!r}")
            entries[info.filename] = info
        programs = [name for name in entries if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{len(programs)} entries data.pkl")
        root = programs[0].removesuffix("data.pkl")
        stored = sum(info.file_size for info in entries.values())
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()) or stored > window.size:
            raise ValueError("its entries are compressed, or larger than the file")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder").strip() != b"little":
            raise ValueError("its numbers are big-endian")
        value = Interpreter(archive.read(programs[0]), path).run()
    return value, _Stored(path, start, window, {n.removeprefix(f"{root}data/"): info for n, info in entries.items()})


class _Bytes(io.RawIOBase):
    """A memory-mapped file as a file object, for zipfile."""

    def __init__(self, data: np.ndarray):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._data.size)[whence]
        if at < 0:
            raise OSError("a seek to before the start")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: part.size] = part.data
        self._at += part.size
        return part.size


class _Stored:
    """The bytes of storages by key, read and checked on access. The last one is kept, for tensors that share it."""

    def __init__(self, path: Path, start: int, window: np.ndarray, entries: dict[str, zipfile.ZipInfo]):
        self._path, self._start, self._window, self._entries = path, start, window, entries
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, key: str) -> np.ndarray:
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        info = self._entries[key]
        at = info.header_offset
        head = self._window[at : at + 30].tobytes()
        if head[:4] != b"PK\x03\x04":
            raise ValueError(f"entry {key} is not where the zip directory says")
        name, extra = struct.unpack("<HH", head[26:30])
        at += 30 + name + extra
        if at + info.file_size > self._window.size:
            raise ValueError(f"storage {key} lies outside the file")
        self._last = None  # freed before the next is read
        # Read, not mapped: a mapped copy would use the memory twice.
        flat = np.fromfile(self._path, np.uint8, info.file_size, offset=self._start + at)
        if flat.size != info.file_size or zlib.crc32(flat) != info.CRC:
            raise ValueError(f"storage {key} is damaged")
        self._last = key, flat
        return flat


def _read_stream(window: np.ndarray, path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    if window.size > _MAX_STREAM:
        raise ValueError("too large for a file of PyTorch before 1.6")
    data = window.tobytes()
    interpreter = Interpreter(data, path)
    magic = interpreter.run()
    if magic != _LEGACY_MAGIC:
        raise ValueError("not PyTorch's magic number")
    for _ in range(2):  # protocol version, sizes of C types
        interpreter = Interpreter(data, path, interpreter.position)
        interpreter.run()
    interpreter = Interpreter(data, path, interpreter.position)
    value = interpreter.run()
    keys = Interpreter(data, path, interpreter.position)
    names, at = keys.run(), keys.position
    kinds: dict[str, Storage] = {}
    replace_tensors(value, lambda ref: kinds.setdefault(ref.storage.key, ref.storage), [0])
    flat, storages = np.frombuffer(data, np.uint8), {}
    for name in names:
        (numel,) = struct.unpack_from("<q", data, at)
        if name not in kinds or numel != kinds[name].numel:
            raise ValueError(f"storage {name} has {numel} numbers")
        size = numel * np.dtype(STORAGES[kinds[name].kind][0]).itemsize
        storages[str(name)] = flat[at + 8 : at + 8 + size]
        at += 8 + size
    return value, storages
