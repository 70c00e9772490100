"""Reading and writing of JSON, YAML, safetensors and NumPy files: checked when read, atomic when written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import FINGERPRINT, Adapter, raise_faults
from ..base.writing import sync, writing
from ..errors import FormatError, MLXLoRAError

_UNPACKED = 1 << 30  # most bytes that a small archive may unpack to
_YAML_DEPTH = 32
TEMPORARY = ".writing-"  # how the names of temporary folders begin
AGAIN = "Save or download the file again."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({error})", AGAIN) from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, not an object", AGAIN)
    return value


def _unreadable(path: Path, error: Exception) -> FormatError:
    hint = "Make it a readable file of UTF-8 text, or save or download it again."
    if isinstance(error, FileNotFoundError):
        hint = f"Save or download the whole folder again: {path.name} is missing."
    return FormatError(f"{path}: cannot be read ({error})", hint)


def wrong_settings(source: Path, fault: Exception | str) -> FormatError:
    """The error for a file whose settings are not valid in an ``AdapterConfig``, for the reason ``fault``."""
    reason = fault.message if isinstance(fault, MLXLoRAError) else fault
    return FormatError(
        f"{source}: {reason}", "Correct these settings in the file, or save or download the adapter again."
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_yaml(text: str | bytes, source: Path | str) -> dict[str, Any]:
    """The mapping in a YAML text; ``source`` names it in errors. Aliases are refused: they can expand without bound."""
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _YAML_DEPTH:
                raise FormatError(
                    f"{source}: has aliases (*), or is nested more than {_YAML_DEPTH} levels deep",
                    "Write out each alias, as plain `key: value` lines.",
                )
        value = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FormatError(f"{source}: is not YAML ({' '.join(str(error).split())[:200]})", AGAIN) from None
    if not isinstance(value, dict):
        raise FormatError(f"{source}: holds a {type(value).__name__}, not a mapping", AGAIN)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        return parse_yaml(path.read_bytes(), path)
    except OSError as error:
        raise _unreadable(path, error) from None


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(value, sort_keys=True, allow_unicode=True), encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file. The safetensors library checks its header before MLX maps it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
        unknown = sorted(f"{path}: {name} is stored as {t}" for name, t in stored.items() if t not in _TYPE_NAMES)
        raise_faults(unknown, _CAST, FormatError)
        return mx.load(str(path), format="safetensors")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{path}: is not a complete safetensors file ({error})", AGAIN) from None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file that ``read_safetensors`` has checked."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def read_npz(path: Path) -> dict[str, mx.array]:
    """The arrays of a NumPy archive. Arrays of Python objects, which are pickles, are refused."""
    import zipfile

    import numpy as np
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(info.file_size for info in archive.infolist())
            if declared > max(_UNPACKED, 20 * path.stat().st_size):
                raise ValueError(f"it declares {declared} bytes")
            if len({info.filename for info in archive.infolist()}) != len(archive.infolist()):
                raise ValueError("it names an array twice")
            for info in archive.infolist():
                with archive.open(info) as file:
                    first = npy.read_magic(file) == (1, 0)
                    header = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
                    shape, _, dtype = header(file)
                    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                        raise ValueError(f"{info.filename} does not have the size it declares, or holds objects")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: mx.array(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path}: is not a complete archive of NumPy arrays ({error})", AGAIN) from None


_SAFETENSORS = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.int16: "I16",
    mx.int8: "I8",
    mx.uint64: "U64",
    mx.uint32: "U32",
    mx.uint16: "U16",
    mx.uint8: "U8",
    mx.bool_: "BOOL",
}


_TYPE_NAMES = {*_SAFETENSORS.values(), "C64"}
_CAST = (
    "MLX has no such numbers (F64 is float64, F8 and F4 are 8- and 4-bit floats). Cast them in PyTorch: "
    "save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path). Floats with scales beside "
    "them are quantized: dequantize these first."
)


def write_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays one by one, so that only one is copied into row-major order at a time (MLX copies all at once)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, array in arrays.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": _SAFETENSORS[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array_bytes(array))


def array_bytes(array: mx.array) -> memoryview:
    """The numbers of ``array`` in row-major order, little-endian."""
    import numpy as np

    if not array.size:
        return memoryview(b"")
    flat = mx.contiguous(array)
    flat = flat.view(mx.uint16) if flat.dtype == mx.bfloat16 else flat
    return memoryview(np.array(flat, copy=False)).cast("B")


def fingerprint_text(adapter: Adapter) -> dict[str, str]:
    """The fingerprint of an adapter's base as an entry of a file's text metadata; empty if it is unknown."""
    found = adapter.metadata.get(FINGERPRINT)
    return {FINGERPRINT: json.dumps(found)} if found else {}


def stored_fingerprint(text: Any) -> dict[str, Any]:
    """The entry of ``Adapter.metadata`` made from ``fingerprint_text``'s entry; empty for anything else."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return {FINGERPRINT: found}


def write_folder(
    folder: Path,
    write: Callable[[Path], None],
    *,
    before: Callable[[], Any] = lambda: None,
    needed: int | None = None,
    kept: str = "",
) -> None:
    """Call ``write`` with a temporary folder, then move its files into ``folder``, each by an atomic rename.

    If ``write`` raises, ``folder`` is unchanged. The files, also those in sub-folders, are renamed in the order of
    their paths.

    Args:
        before: called after all files are written, before the first rename.
        needed, kept: for the error, see ``writing``.

    Raises: FormatError.
    """
    with writing(folder, FormatError, needed=needed, kept=kept):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            write(temporary)
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            targets = {file: folder / file.relative_to(temporary) for file in files}
            # checked before the first rename, so that either all files are moved or none
            for file, target in targets.items():
                if target.is_dir():
                    raise IsADirectoryError(f"{target.name} is a folder")
                if target.parent.exists() and not target.parent.is_dir():
                    raise NotADirectoryError(f"{target.parent.name} is a file")
                sync(file)
            before()
            for file, target in targets.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            with suppress(OSError):  # some file systems cannot sync a folder
                for parent in {target.parent for target in targets.values()} | {folder}:
                    sync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                if new and not any(folder.iterdir()):
                    folder.rmdir()


def file_digest(path: Path, whole: int = 1 << 26, pieces: int = 1024) -> str:
    """A hash of a file: of all its bytes or, above ``whole`` bytes, of its size and of ``pieces`` pieces."""
    length, piece = path.stat().st_size, whole // pieces
    starts = range(0, length, piece)
    if length > whole:
        starts = [i * (length - piece) // (pieces - 1) for i in range(pieces)]
    digest = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(piece))
    return digest.hexdigest()


def write_file(path: Path, write: Callable[[Path], None], *, needed: int | None = None) -> None:
    """Call ``write`` with a temporary path, then move that file to ``path`` by an atomic rename. Makes the folder.

    If ``write`` raises, an existing file at ``path`` is unchanged.
    """
    write_folder(path.parent, lambda temporary: write(temporary / path.name), needed=needed)
