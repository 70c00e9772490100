"""Copies of an adapter's files without paths of this machine, for uploading them. Nothing is changed in place.

JSON, YAML, Markdown and the metadata of safetensors files are rewritten. Other files (pickles, GGUF, archives) are
searched, and refused if they contain a path.
"""

from __future__ import annotations

import gzip
import json
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import FormatError

# Keys whose values name the base model. A local path there is replaced by the model's name on the Hub, if it is known.
_BASE_KEYS = {"model", "base_model", "base_model_name_or_path", "base_model_path", "name_or_path", "_name_or_path"}
# A string that is a path and nothing else. Regular expressions for module names do not begin like this.
_PATH = re.compile(r"(?:file:|~(?:[/\\]|$)|/[^/\s]|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\)[^\n]*")
# An absolute path or a network drive within a text, but not the path of a URL or an HTML tag.
_INSIDE = re.compile(
    r"(?:smb|nfs|afp|file)://[\w.@+~/-]+|(?<![\w/.\\<])(?:(?<!:)//[\w.-]+)?"
    r"(?:[A-Za-z]:(?:[/\\][\w.@+~-]+)+|~?(?:/[\w.@+~-]+)+)[/\\]?"
)
_IN_BINARY = rb"(?:/Users/|/home/|/root/|[A-Za-z]:\\+Users\\+)[\w.@+-]+(?:[/\\]+[\w.@+-]+)*"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")
_LEFT_OUT = object()


def hub_name(name: str | None) -> str | None:
    """The repository that ``name`` is, or whose cached download it is; None for any other path or None."""
    if not name or name == "unknown":
        return None
    if cached := _CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return None if is_local(name) else name


def data_name(name: str) -> str | None:
    """The data set on the Hub that ``name`` is; None for a file or folder. A data set's name has an owner."""
    return name if name.count("/") == 1 and not is_local(name) else None


def is_local(name: str) -> bool:
    """Whether ``name``, which should be a repository's name, is a path of this or another machine."""
    return bool(_PATH.fullmatch(name)) or name.count("/") > 1 or "\\" in name or Path(name).expanduser().exists()


def shareable(files: Iterable[Path], target: Path, base: str | None, notes: list[str]) -> list[Path]:
    """The files to upload: the given files; for a file that contains a local path, a copy without it in ``target``.

    Args:
        base: the base model's name on the Hub, which replaces its path; None if it is not known.
        notes: a list that receives what was replaced or left out.

    Raises: FormatError: a file that cannot be rewritten names a path.
    """
    found = []
    for file in files:
        clean = _COPIES.get(file.suffix.lower(), _searched)(file, base, notes)
        if clean is not None:
            file = target / file.name
            file.write_bytes(clean)
        found.append(file)
    return found


def _as_json(file: Path, base: str | None, notes: list[str]) -> bytes | None:
    value = json.loads(file.read_text(encoding="utf-8"))
    clean = _clean(value, base, notes, file.name)
    return None if clean == value else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _as_yaml(file: Path, base: str | None, notes: list[str]) -> bytes | None:
    import yaml

    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    clean = _clean(value, base, notes, file.name)
    return None if clean == value else yaml.safe_dump(clean, sort_keys=False, allow_unicode=True).encode()


def _as_text(file: Path, base: str | None, notes: list[str]) -> bytes | None:
    """Markdown. A front-matter line that names the base by a path, as in PEFT's cards, gets ``base`` or is left out."""
    lines, text = [], file.read_text(encoding="utf-8")
    for line in text.splitlines():
        key, _, value = line.partition(":")
        value = value.strip().strip("'\"")
        if key.strip() in _BASE_KEYS and value and hub_name(value) != value:
            line = f"{key}: {base}" if base else None
        elif _INSIDE.search(line) and "base_model" in line:
            line = _INSIDE.sub(base, line) if base else None
        else:
            line = _INSIDE.sub(lambda match: _last(match[0]), line)
        lines += [] if line is None else [line]
    clean = "\n".join(lines) + "\n" * text.endswith("\n")
    if clean == text:
        return None
    notes.append(f"{file.name}: paths of this machine replaced or left out")
    return clean.encode()


def _as_safetensors(file: Path, base: str | None, notes: list[str]) -> bytes | None:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        clean = {**header, "__metadata__": _clean(header.get("__metadata__", {}), base, notes, file.name)}
        if clean["__metadata__"] == header.get("__metadata__", {}):
            return None
        text = json.dumps(clean, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + opened.read()


def _searched(file: Path, base: str | None, notes: list[str]) -> None:
    """Refuse a file that holds a path of a machine, in plain or in gzip's bytes."""
    if not file.stat().st_size:
        return
    own = [str(path) for path in (Path.home(), Path.cwd(), file.resolve().parent) if len(path.parts) > 2]
    pattern = re.compile(b"|".join([_IN_BINARY, *(re.escape(path.encode()) for path in own)]))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        zipped = mapped[:2] == b"\x1f\x8b"
        found = pattern.search(gzip.decompress(mapped[:]) if zipped else mapped)
        name = found and found[0].decode(errors="replace")
    if name:
        raise FormatError(
            f"{file}: names a path of this machine ({name}), which cannot be removed from this kind of file",
            "Convert the adapter to a format with a readable config: mlx-lora convert SRC DST --to peft, and push DST.",
        )


_COPIES = {
    ".json": _as_json,
    ".yaml": _as_yaml,
    ".yml": _as_yaml,
    ".md": _as_text,
    ".safetensors": _as_safetensors,
}


def _clean(value: Any, base: str | None, notes: list[str], where: str, key: str = "") -> Any:
    """``value``, the entry ``key``, without paths.

    The base's path is replaced by ``base``; other paths are left out or, inside texts, shortened.
    """
    if isinstance(value, dict):
        named = {key: item for key, item in value.items() if not _PATH.fullmatch(str(key))}
        notes += [f"{where}: {key!r} is a local path: left out" for key in value.keys() - named.keys()]
        made = {key: _entry(str(key), item, base, notes, f"{where}: {key}") for key, item in named.items()}
        return {key: item for key, item in made.items() if item is not _LEFT_OUT}
    if isinstance(value, list):
        made = [_entry(key, item, base, notes, where) for item in value]
        return [item for item in made if item is not _LEFT_OUT]
    return value


def _entry(key: str, value: Any, base: str | None, notes: list[str], where: str) -> Any:
    if key == "hf_dataset" and value:
        return _hub_data(value, notes, where)
    if key in _FILE_KEYS and isinstance(value, dict):
        notes.append(f"{where} names local files: left out")
        return _LEFT_OUT
    if not isinstance(value, str):
        return _clean(value, base, notes, where, key)
    if key in _BASE_KEYS and value and hub_name(value) != value:
        name = hub_name(value) or base
        notes.append(f"{where} {value!r} is a local folder: {f'replaced by {name}' if name else 'left out'}")
        return _LEFT_OUT if name is None else name
    if value and (_PATH.fullmatch(value) or (key in _FILE_KEYS and data_name(value) is None)):
        notes.append(f"{where} {value!r} is a local path: left out")
        return _LEFT_OUT
    return _INSIDE.sub(lambda match: _last(match[0]), value)


def _hub_data(value: Any, notes: list[str], where: str) -> Any:
    """mlx-lm's ``hf_dataset`` with only the names of data sets on the Hub: other entries may name local files."""
    sections = value if isinstance(value, list) else [value]
    paths = [section.get("path") for section in sections if isinstance(section, dict)]
    names = [{"path": path} for path in paths if isinstance(path, str) and data_name(path)]
    if [*sections] != names:
        notes.append(f"{where}: only names of data sets on the Hub are kept")
    return (names if isinstance(value, list) else names[0]) if names else _LEFT_OUT


_FILE_KEYS = {
    *("data_files", "data", "path", "data_dir"),
    *("adapter_path", "resume_adapter_file", "init_reference", "out_dir"),
}


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
