"""Tar archives, never unpacked: the positions of their members in the file."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from ...errors import FormatError

_MOST = 10_000  # members
_EXPORT = "Do not unpack it. Export the adapter again, alone, as a tar of plain files."


def members(path: Path) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of the plain files in an uncompressed tar.

    Raises: FormatError: not a tar, or one with members outside its folder or the file, or that are not plain files.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for count, member in enumerate(archive):
                if count > _MOST:
                    raise FormatError(f"{path}: holds more than {_MOST} members", _EXPORT)
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise FormatError(
                        f"{path}: the member {member.name!r} has a path outside the archive; refused", _EXPORT
                    )
                if member.isdir():
                    continue
                if not member.isreg():
                    raise FormatError(f"{path}: the member {member.name!r} is a link or a device; refused", _EXPORT)
                if member.offset_data + member.size > length:
                    raise FormatError(f"{path}: ends within the member {member.name!r}", "Download it again.")
                if str(name) in found:
                    raise FormatError(f"{path}: holds {str(name)!r} twice", _EXPORT)
                found[str(name)] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise FormatError(f"{path}: is not a complete tar archive ({error})", "Save or download it again.") from None
    return found


def read_member(path: Path, position: tuple[int, int], most: int = 1 << 24) -> bytes:
    """The bytes of a small member, from its (offset, size)."""
    offset, size = position
    if size > most:
        raise FormatError(f"{path}: has a member of {size} bytes; at most {most} are read", _EXPORT)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
