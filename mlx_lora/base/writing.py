"""Errors for failed writes: the reason, the space that was needed, and what is kept.

MLX raises a failed write as a ``RuntimeError`` without a reason; the reason is then found by asking the file system.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FormatError, MLXLoRAError

_ELSEWHERE = "Choose another folder."
_FULL = ("the disk is full", "Free some space, or choose a folder on another disk.")
_GONE = ("the drive does not answer", "Connect the drive again, or choose a folder on another drive.")
_DENIED = ("permission denied", "Allow writing to that folder, or choose another one.")
_REASONS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: ("the disk quota is used up", "Delete some of your files there, or choose a folder on another disk."),
    errno.EROFS: ("the file system is read-only", "Mount it for writing, or choose another folder."),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EFBIG: (
        "the file is larger than allowed there",
        "Raise the limit (ulimit -f), or choose another disk: FAT32 holds no file above 4 GB.",
    ),
    errno.ENOENT: ("the folder was moved or deleted", "Do not move it while it is written to, or choose another one."),
    errno.EEXIST: ("there is a file of this name", "Choose another name, or remove that file."),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN), _GONE
    ),
}
# Error numbers that always mean a failed write: reads and the network do not raise them.
WRITE_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG))
_PROBE = 1 << 16  # bytes


@contextmanager
def writing(
    path: Path, error: type[MLXLoRAError] = FormatError, *, needed: int | None = None, kept: str = ""
) -> Iterator[None]:
    """A context for writing ``path``, a file or a folder. A failed write is raised as one ``error``.

    Args:
        needed: total bytes to write, if known.
        kept: a sentence that says which files are unchanged.
    """
    try:
        yield
    except (OSError, RuntimeError) as problem:
        raise failed_write(path, problem, error, needed=needed, kept=kept) from problem


def failed_write(
    path: Path,
    problem: Exception,
    error: type[MLXLoRAError] = FormatError,
    *,
    needed: int | None = None,
    kept: str = "",
) -> MLXLoRAError:
    """The ``error`` for a write to ``path`` that failed with ``problem``. Arguments as in ``writing``."""
    lost = str(problem).startswith(("[read]", "[load"))  # MLX reads weights when they are first used
    if lost:
        reason, hint = f"what it is made from cannot be read: {problem}", "Check the drive that holds the model."
    else:
        # NumPy's failed write has no number.
        number = getattr(problem, "errno", None) or _probe(path, needed)
        if number is None and str(problem).startswith("[write]"):
            number = errno.ENOSPC  # MLX's short write; the room was freed when the temporary file was removed
        reason, hint = _REASONS.get(number, (str(problem), f"Free some space, or c{_ELSEWHERE[1:]}"))
    lines = [f"{path}: cannot be written ({reason})"]
    if needed is not None and not lost:
        room = _free(path)
        short = room is not None and room < needed  # more may be free now that the temporary file is removed
        lines[0] += f"; {size(needed)} needed" + (f", {size(room)} free" if short else "")
    return error("\n".join([*lines, *([kept] if kept else [])]), hint)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once: a reader sees the old file or the new one. Raises: FormatError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def write_new_text(path: Path, text: str) -> None:
    """Write a new text file; fail if it exists, even if it was just created. Raises: FormatError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8", errors="replace") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of files, from the system's buffers to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size(count: int) -> str:
    """``count`` bytes in words."""
    for unit, digits in (("B", 0), ("kB", 0), ("MB", 1)):
        if count < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def existing(path: Path) -> Path:
    """``path``, or the first of the folders above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(existing(path)).free
    except OSError:
        return None


def _probe(path: Path, needed: int | None) -> int | None:
    """The error number of a small test write next to ``path``, or ENOSPC if ``needed`` bytes do not fit."""
    try:
        there = existing(path)
        with tempfile.TemporaryFile(dir=there if there.is_dir() else there.parent) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        return problem.errno
    room = _free(path)
    return errno.ENOSPC if needed is not None and room is not None and room < needed else None
