"""PyTorch's files (``.pt``, ``.bin``, ``.ckpt``, ``.pth``), read without PyTorch. ``torch_write.py`` writes them.

Both layouts are read: the zip archive of today, whose arrays are read one by one, and the stream of PyTorch before 1.6.
The pickle in them is run by ``pickles.py``, which refuses whatever is not data. Sizes that a file declares are held
against what it has.
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
from .pickles import Machine, replace_tensors
from .tensors import STORAGES, Storage, to_array

_MAX_STREAM = 16 << 30  # bytes; files of that age are read whole
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def is_pickle(path: Path) -> bool:
    """Whether a file begins as PyTorch's archives or streams do."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def read_torch(path: Path, start: int = 0, size: int | None = None) -> Any:
    """What ``torch.load(path, weights_only=True)`` would give, tensors as MLX arrays; float64 becomes float32.

    Args:
        start, size: the part of the file to read, in bytes, where it lies in an archive.

    Raises:
        FormatError: the file is damaged, or wants to run code; the names it wanted are told.
    """
    return _read(path, start, size, arrays=True)


def peek_torch(path: Path) -> Any:
    """As ``read_torch``, with a ``TensorRef`` in place of each tensor: no array is read."""
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
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, struct.error) as error:
        raise FormatError(
            f"{path}: is not a whole PyTorch file ({type(error).__name__}: {error})", "Save or download the file again."
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, MemoryError, RecursionError, RuntimeError) as error:
        raise FormatError(
            f"{path}: is not a whole PyTorch file ({error})", "Save or download the file again."
        ) from None


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
        value = Machine(archive.read(programs[0]), path).run()
    return value, _Stored(path, start, window, {n.removeprefix(f"{root}data/"): info for n, info in entries.items()})


class _Bytes(io.RawIOBase):
    """A mapped file as a file, for zipfile."""

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
    """Storage key -> its bytes, read and checked when asked for; the last one is kept, for tensors that share it."""

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
            raise ValueError(f"entry {key} is not where the directory says")
        name, extra = struct.unpack("<HH", head[26:30])
        at += 30 + name + extra
        if at + info.file_size > self._window.size:
            raise ValueError(f"storage {key} lies outside the file")
        self._last = None  # freed before the next is read
        # Read, not mapped: what is mapped and copied counts twice.
        flat = np.fromfile(self._path, np.uint8, info.file_size, offset=self._start + at)
        if flat.size != info.file_size or zlib.crc32(flat) != info.CRC:
            raise ValueError(f"storage {key} is damaged")
        self._last = key, flat
        return flat


def _read_stream(window: np.ndarray, path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    if window.size > _MAX_STREAM:
        raise ValueError("too large for a file of PyTorch before 1.6")
    data = window.tobytes()
    machine = Machine(data, path)
    magic = machine.run()
    if magic != _LEGACY_MAGIC:
        raise ValueError("not PyTorch's magic number")
    for _ in range(2):  # protocol version, sizes of C types
        machine = Machine(data, path, machine.position)
        machine.run()
    machine = Machine(data, path, machine.position)
    value = machine.run()
    keys = Machine(data, path, machine.position)
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
