"""Where the states of a frozen prefix are kept: in memory, or in a memory-mapped file that outlives the process.

A key is (data set, row, width); a value is the row's states [tokens, D], half precision as uint16.

The file is a log. Its first line names the run that the states belong to. Then come records, each with a checksum. A
process that is killed leaves complete records and at most one incomplete record, which the next process cuts off. A
file of another base, other data or other layers is deleted.
"""

from __future__ import annotations

import mmap
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np

from ..errors import MLXLoRAWarning

Key = tuple[int, int, int]
_RECORD = struct.Struct("<4sIqIIII")  # mark, data set, row, width, tokens, bytes of a token, checksum
_MARK = b"row:"


class MemoryStates:
    """States by key."""

    def __init__(self):
        self._states: dict[Key, np.ndarray] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def get(self, key: Key) -> np.ndarray | None:
        return self._states.get(key)

    def put(self, key: Key, states: np.ndarray) -> None:
        self._states[key] = states

    def close(self) -> None:
        self._states.clear()


class FileStates:
    """States in the file `path`, which belong to `owner` (a line of text).

    On a full disk, a warning is given and no more states are kept. The run goes on and computes them again.
    """

    def __init__(self, path: Path, owner: str, itemsize: int):
        self._kind = {2: np.uint16, 4: np.uint32}[itemsize]
        self._records: dict[Key, tuple[int, int, int, int | None]] = {}  # offset, tokens, bytes, checksum to compare
        self._map: mmap.mmap | None = None
        self._full = False
        self.path, head = path, owner.encode() + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._belongs(head):
            _replace(path, head)
        self._file = os.open(path, os.O_RDWR)
        self._end = self._scan(len(head))
        os.ftruncate(self._file, self._end)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def nbytes(self) -> int:
        return self._end

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def get(self, key: Key) -> np.ndarray | None:
        if key not in self._records:
            return None
        place, tokens, size, checksum = self._records[key]
        if self._map is None or len(self._map) < place + size:
            self._map = mmap.mmap(self._file, self._end, access=mmap.ACCESS_READ)
        data = memoryview(self._map)[place : place + size]
        if checksum is not None:  # written by an earlier process, and not read yet
            if zlib.crc32(data) != checksum:
                del self._records[key]
                return None
            self._records[key] = place, tokens, size, None
        return np.frombuffer(data, self._kind).reshape(tokens, -1)

    def put(self, key: Key, states: np.ndarray) -> None:
        if self._full:
            return
        data = np.ascontiguousarray(states).tobytes()
        record = _RECORD.pack(_MARK, *key, len(states), len(data) // len(states), zlib.crc32(data)) + data
        try:
            _write(self._file, record, self._end)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            self._full = True
            text = (
                f"{self.path}: {error.strerror}. No more states of frozen layers are kept; the run computes them again."
            )
            warnings.warn(text, MLXLoRAWarning, stacklevel=2)
            return
        self._records[key] = self._end + _RECORD.size, len(states), len(data), None
        self._end += len(record)

    def close(self) -> None:
        """Close the file, which keeps its records."""
        if self._file is not None:
            os.close(self._file)
        self._file = self._map = None
        self._records.clear()

    def _belongs(self, head: bytes) -> bool:
        try:
            with open(self.path, "rb") as file:
                return file.read(len(head)) == head
        except FileNotFoundError:
            return False

    def _scan(self, place: int) -> int:
        """Read the records; return where the last complete one ends."""
        size = os.fstat(self._file).st_size
        while place + _RECORD.size <= size:
            mark, which, row, width, tokens, each, checksum = _RECORD.unpack(os.pread(self._file, _RECORD.size, place))
            end = place + _RECORD.size + tokens * each
            if mark != _MARK or end > size or not tokens:
                break
            self._records[which, row, width] = place + _RECORD.size, tokens, tokens * each, checksum
            place = end
        return place


def _replace(path: Path, head: bytes) -> None:
    """Replace another run's file by a new one, atomically."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(head)
    os.replace(new, path)


def _write(file: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written
