"""Reads rows from a folder with {train,valid,test}.jsonl, from one file, or from a dataset of the Hugging Face Hub.

Each value is read with its position, for error messages. ``rows.py`` checks the values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import ConfigError, DataError
from .rows import Row

HOLD_OUT, HOLD_OUT_MOST, HOLD_OUT_FROM = (
    0.05,
    500,
    20,
)  # share of the rows, at most so many, of files of at least so many
_SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
_ALIASES = {"train": ("training",), "valid": ("val", "validation", "dev", "eval"), "test": ("testing",)}
_SECTION = ("path", "config", "train_split", "valid_split", "test_split")
_FEATURES = ("text_feature", "prompt_feature", "completion_feature", "chat_feature")


@dataclass
class Part:
    """Rows for one split, from one file or dataset."""

    split: str
    name: str  # "data/train.jsonl"
    rows: list[Row]
    config: DataConfig  # with the keys of these rows


@dataclass
class Source:
    """The rows found for the splits, and warnings."""

    parts: list[Part] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(config: DataConfig, splits: Sequence[str], faults: list[str]) -> Source:
    """Read the rows that ``config.hf_dataset``, or else ``config.data``, names; lines that are not JSON are faults."""
    if config.hf_dataset:
        return _from_sections(config, splits)
    path = Path(config.data).expanduser()
    if path.is_dir():
        return _from_folder(path, config, splits, faults)
    if path.is_file():
        return _from_file(path, config, splits, faults)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.data) and path.suffix not in (".jsonl", ".json"):
        return _from_hub(config, splits)
    raise DataError(
        f"There is no folder or file {config.data!r}.",
        "Give a folder with train.jsonl and valid.jsonl, a .jsonl file, or a Hugging Face dataset as owner/name.",
    )


def read_file(path: Path, faults: list[str]) -> list[Row]:
    """The values in a .jsonl file (one on each line, blank lines skipped) or in a .json file (one list)."""
    name = str(path)
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json":
        values = _parse(data, name, faults)
        if values is not None and not isinstance(values, list):
            faults.append(
                f"{name}: is one value, not a list: write [{{...}}, {{...}}], or one row on each line of a .jsonl file"
            )
            return []
        return [Row(f"{name}:{i}", value) for i, value in enumerate(values or [], 1)]
    if data.lstrip()[:1] == b"[":
        faults.append(
            f"{name}:1: a JSON list where one object on each line is needed: name the file .json, or write lines"
        )
        return []
    rows = []
    # Not splitlines(): it also splits at U+2028 and others, which JSON strings may contain unescaped.
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where, before = f"{name}:{number}", len(faults)
            value = _parse(line, where, faults)
            if len(faults) == before:
                rows.append(Row(where, value))
    return rows


def _parse(data: bytes, where: str, faults: list[str]) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        faults.append(f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        faults.append(
            f"{where}: not JSON ({error.msg}, {place}): write one {{...}} on each line, quotes and newlines escaped"
        )
    except RecursionError:
        faults.append(f"{where}: nested too deeply: flatten the row")
    return None


def _from_folder(path: Path, config: DataConfig, splits: Sequence[str], faults: list[str]) -> Source:
    source = Source()
    inside = sorted(entry.name for entry in path.iterdir())
    for split in splits:
        files = [path / f"{split}{suffix}" for suffix in (".jsonl", ".json") if (path / f"{split}{suffix}").is_file()]
        if len(files) == 2:
            faults.append(f"{files[0]}: there is also {files[1].name}: remove one of them")
        elif files:
            source.parts.append(Part(split, str(files[0]), read_file(files[0], faults), config))
        else:
            near = [n for n in inside if n.rsplit(".", 1)[0] in _ALIASES[split] and n.endswith((".jsonl", ".json"))]
            fix = f"; rename {near[0]} to {split}.jsonl to use it" if near else ""
            if split == "valid":
                source.warnings.append(f"no valid.jsonl in {path}: there will be no validation loss{fix}")
                continue
            have = ", ".join(inside[:12]) + (" ..." if len(inside) > 12 else "") or "nothing"
            raise DataError(
                f"There is no {split}.jsonl in {path}; it has: {have}.",
                f"Rename {near[0]} to {split}.jsonl."
                if near
                else f"Write {split}.jsonl, one JSON object on each line.",
            )
    return source


def _from_file(path: Path, config: DataConfig, splits: Sequence[str], faults: list[str]) -> Source:
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(
            f"{path} is not a .jsonl file.", "Convert it to one JSON object on each line, and name it .jsonl."
        )
    rows = read_file(path, faults)
    if "train" not in splits:  # one file is the one split asked for; it cannot be two
        if len(splits) == 1:
            return Source([Part(splits[0], str(path), rows, config)])
        raise DataError(
            f"{path} is one file, but {' and '.join(splits)} are needed.", "Give a folder with a file for each split."
        )
    source = Source()
    if "valid" in splits:
        held = min(max(1, int(len(rows) * HOLD_OUT)), HOLD_OUT_MOST) if len(rows) >= HOLD_OUT_FROM else 0
        if held:
            out = {(2 * k + 1) * len(rows) // (2 * held) for k in range(held)}
            valid = [row for i, row in enumerate(rows) if i in out]
            rows = [row for i, row in enumerate(rows) if i not in out]
            source.parts.append(Part("valid", f"{path} (held out)", valid, config))
            source.warnings.append(
                f"{path} is one file: {held} of its {held + len(rows)} rows, evenly spread, are held out for "
                "validation; to choose them yourself, give a folder with train.jsonl and valid.jsonl"
            )
        else:
            source.warnings.append(f"{path} has fewer than {HOLD_OUT_FROM} rows: there will be no validation loss")
    if "test" in splits:
        source.warnings.append(f"{path} is one file: there is no test set")
    source.parts.insert(0, Part("train", str(path), rows, config))
    return source


def _from_hub(config: DataConfig, splits: Sequence[str]) -> Source:
    found = _load(config.data, {}, None)
    source = Source()
    for split in splits:
        name = next((name for name in _SPLITS[split] if name in found), None)
        if name:
            source.parts.append(Part(split, config.data, _rows(found[name], f"{config.data}/{name}"), config))
        elif split == "valid":
            source.warnings.append(f"{config.data} has no validation split: there will be no validation loss")
        else:
            raise DataError(
                f"The dataset {config.data} has no {split} split, only {', '.join(map(str, found))}.",
                f"Name the rows in an hf_dataset section of the YAML file: path, {split}_split.",
            )
    return source


def _from_sections(config: DataConfig, splits: Sequence[str]) -> Source:
    sections = config.hf_dataset if isinstance(config.hf_dataset, (list, tuple)) else [config.hf_dataset]
    _check_sections(sections)
    source = Source()
    for section in sections:
        path, options = section["path"], section.get("config") or {}
        options = {"name": options} if isinstance(options, str) else dict(options)
        keys = dataclasses.replace(config, **{key: section[key] for key in _FEATURES if section.get(key)})
        defaults = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}  # mlx-lm's
        for split in splits:
            wanted = section.get(f"{split}_split", defaults[split])
            if wanted:
                rows = _rows(_load(path, options, wanted), f"{path}/{wanted}")
                source.parts.append(Part(split, path, rows, keys))
    for split in splits:
        if not any(part.split == split for part in source.parts):
            if split != "valid":
                raise ConfigError(
                    f"hf_dataset names no rows for the {split} set", f"Add {split}_split: to the section."
                )
            source.warnings.append("hf_dataset names no valid_split: there will be no validation loss")
    return source


def _check_sections(sections: Sequence[Any]) -> None:
    faults = []
    known = (*_SECTION, *_FEATURES)
    for number, section in enumerate(sections, 1):
        where = "hf_dataset" if len(sections) == 1 else f"hf_dataset, entry {number}"
        if not isinstance(section, dict):
            faults.append(f"{where} must be a mapping with a path, not {section!r}")
            continue
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                faults.append(f"{where} has the unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if not isinstance(section.get("path"), str):
            faults.append(f"{where} needs a path: the dataset's name")
        if not isinstance(section.get("config") or {}, (str, dict)):
            faults.append(f"{where} needs a mapping as its config: arguments of datasets.load_dataset")
    if faults:
        raise ConfigError("\n".join(faults), f"The keys are {', '.join(known)}.")


def _load(path: str, options: dict, split: str | None) -> Any:
    """``datasets.load_dataset``: a dataset or, where ``split`` is None, a mapping of them."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"There is no folder or file {path!r}, and loading a dataset of that name needs the datasets package.",
            "pip install 'mlx-lora[hub]', or give a folder with train.jsonl and valid.jsonl.",
        ) from None
    try:
        return datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # of many types: no network, no such name, no such split, a gated set
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"There is no folder or file {path!r}, and the dataset of that name cannot be loaded: {said}",
            "Check the name on huggingface.co/datasets, the name of the split, and the network.",
        ) from error


def _rows(values: Iterable[dict], name: str) -> list[Row]:
    return [Row(f"{name}:{i}", value) for i, value in enumerate(values, 1)]
