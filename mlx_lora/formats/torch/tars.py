"""Tar archives, looked into and never unpacked: where the wanted members lie in the file."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from ...errors import FormatError

_MOST = 10_000  # members
_EXPORT = "Do not unpack it; export the adapter alone again, as a tar of plain files."


def members(path: Path) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of the plain files in an uncompressed tar.

    Raises: FormatError: no tar, or one whose names leave their folder, whose members are links or lie outside the file.
    """
    found: dict[str, tuple[int, int]] = {}
    try:
        whole = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for count, member in enumerate(archive):
                if count > _MOST:
                    raise FormatError(f"{path}: holds more than {_MOST} members", _EXPORT)
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise FormatError(f"{path}: the member {member.name!r} leads out of the archive; refused", _EXPORT)
                if member.isdir():
                    continue
                if not member.isreg():
                    raise FormatError(f"{path}: the member {member.name!r} is a link or a device; refused", _EXPORT)
                if member.offset_data + member.size > whole:
                    raise FormatError(f"{path}: is cut off in the member {member.name!r}", "Download it again.")
                if str(name) in found:
                    raise FormatError(f"{path}: holds {str(name)!r} twice", _EXPORT)
                found[str(name)] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise FormatError(f"{path}: is not a whole tar archive ({error})", "Save or download it again.") from None
    return found


def read_member(path: Path, place: tuple[int, int], most: int = 1 << 24) -> bytes:
    """The bytes of a small member."""
    offset, size = place
    if size > most:
        raise FormatError(f"{path}: a member of {size} bytes where {most} are the most", _EXPORT)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
