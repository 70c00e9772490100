"""Reading and writing the files that formats are made of: checked on the way in, atomic on the way out."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FormatError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({error})", "Save or download the file again.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, its header checked by the safetensors library before MLX maps it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        return mx.load(str(path))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise FormatError(
            f"{path}: is not a whole safetensors file ({error})", "Save or download the file again."
        ) from None


def write_safetensors(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    mx.save_safetensors(str(path), arrays, metadata or {})


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then move its files into ``folder``, each by an atomic rename.

    Whatever ``write`` raises, ``folder`` is left as it was.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    except OSError as error:
        raise FormatError(f"{folder}: cannot be written ({error})", "Choose another folder.") from None
    try:
        write(temporary)
        files = sorted(temporary.iterdir())
        for file in files:  # before the first rename: all of them or none
            if (folder / file.name).is_dir():
                raise IsADirectoryError(f"{file.name} is a folder")
        for file in files:
            os.replace(file, folder / file.name)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
        raise FormatError(
            f"{folder}: cannot be written ({error})", "Free some space, or choose another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
