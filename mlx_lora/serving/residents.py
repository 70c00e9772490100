"""What a bank knows of an adapter: where it comes from, and the value in memory."""

from __future__ import annotations

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
    signature: tuple = ()  # of its files, when they were read
    rows: int = 0  # that use it now
    used: int = 0  # a counter: the higher, the later

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
    """What is known of a named adapter."""

    name: str
    path: str | None
    loaded: bool
    pinned: bool = False
    method: str | None = None  # the rest only of loaded ones
    rank: int | None = None
    nbytes: int = 0
    alone: tuple[str, ...] = field(default=())
    rows: int = 0


def is_adapter(path: Path) -> bool:
    """Whether a subfolder of the adapters' folder is an adapter. Links are not followed."""
    if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
        return False
    try:
        detect_format(path)
    except MLXLoRAError:
        return False
    return True


def signature_of(path: Path | None) -> tuple:
    """What changes when an adapter is written again: names, sizes and times of the files in its folder."""
    if path is None:
        return ()
    try:
        files = [path] if path.is_file() else sorted(item for item in path.iterdir() if item.is_file())
        return tuple((file.name, info.st_size, info.st_mtime_ns) for file in files if (info := file.stat()))
    except OSError:
        return ()
