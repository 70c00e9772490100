"""Records of a bank: an adapter's source, its value in memory, and the adapters in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter import Adapter
from ..errors import MLXLoRAError
from ..formats import detect_format

Key = tuple[str, int]  # name and version: what a row uses until it ends, also if the name gets another adapter


@dataclass(eq=False)
class Resident:
    """An adapter in memory."""

    name: str
    version: int
    adapter: Adapter
    alone: list[str]  # why it cannot share a batch with other adapters; empty if it can
    signature: tuple = ()  # of its files when they were read
    rows: int = 0  # rows that use it now
    used: int = 0  # a counter: higher means more recent

    @property
    def key(self) -> Key:
        return self.name, self.version


@dataclass
class Source:
    """Where an adapter comes from."""

    adapter: Adapter | None = None
    path: Path | None = None
    pinned: bool = False  # never dropped from memory


@dataclass(frozen=True)
class Listed:
    """Public facts about a named adapter."""

    name: str
    path: str | None
    loaded: bool
    pinned: bool = False
    method: str | None = None  # from here on, only of loaded adapters
    rank: int | None = None
    nbytes: int = 0
    alone: tuple[str, ...] = field(default=())
    rows: int = 0


class AdapterFolder:
    """The adapters in the subfolders of a folder, by name. Links are not followed."""

    def __init__(self, path: Path):
        self.path = path
        self._seen: dict[str, int] = {}  # subfolders that were adapters, and their modification times

    @property
    def names(self) -> list[str]:
        return sorted(filter(self._is_adapter, self._listed()))

    def __contains__(self, name: str) -> bool:
        return name in self._listed() and self._is_adapter(name)

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []

    def _is_adapter(self, name: str) -> bool:
        path = self.path / name
        if name.startswith(".") or path.is_symlink() or not path.is_dir():
            return False
        try:
            changed = path.stat().st_mtime_ns
            if self._seen.get(name) != changed:
                detect_format(path)  # reads files, too slow for each of many adapters and each request
                self._seen[name] = changed
        except (MLXLoRAError, OSError):
            return False
        return True


def signature_of(path: Path | None) -> tuple:
    """Names, sizes and times of the files in a folder; they change when an adapter is written again."""
    if path is None:
        return ()
    try:
        files = [path] if path.is_file() else sorted(item for item in path.iterdir() if item.is_file())
        return tuple((file.name, info.st_size, info.st_mtime_ns) for file in files if (info := file.stat()))
    except OSError:
        return ()


@contextmanager
def errors_by_name(names: dict[str | Path | None, str | None]) -> Iterator[None]:
    """A context that replaces folders by names in errors, because servers show errors to clients."""
    try:
        yield
    except MLXLoRAError as error:
        told = [error.message, error.hint]
        for folder, name in names.items():
            told = [text and text.replace(str(folder), name) for text in told] if folder else told
        raise type(error)(*told) from None
