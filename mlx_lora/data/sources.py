"""Finds the rows of each split: in a folder with one file per split, in a single file, or in a dataset on the Hub.

A split's rows are ``train.jsonl`` or another format of ``files.py``, several files ``train-00000-of-00002.parquet``, or
a folder ``train`` of files, as ``datasets`` saves them. If there is no validation split, a part of the training rows
is held out, always the same rows of the same data. ``rows.py`` checks the values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HOLD_OUT, HOLD_OUT_FROM, HOLD_OUT_MOST, DataConfig
from ..errors import ConfigError, DataError
from .columns import KEYS, check_templates, filled
from .faults import Fault, Place, counted
from .files import FORMATS, Row, file_format, read_file, without_nulls
from .numbered import check_parts

# Names of a split's files and of a split on the Hub, as in datasets. The first one is mlx-lora's name.
NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test", "testing")}
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
    """The rows found for the splits, with notes, warnings and faults."""

    parts: list[Part] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(config: DataConfig, splits: Sequence[str], faults: list[Fault]) -> Source:
    """Read the rows that ``config.hf_dataset``, or else ``config.data``, names; unreadable rows become faults."""
    if config.valid_split is not None and "valid" not in splits:
        raise ConfigError("valid_split is for training: there is no validation set here", "Leave it out.")
    if config.hf_dataset:
        return _from_sections(config, splits, faults)
    path = Path(config.data).expanduser()
    if path.is_dir():
        return _from_folder(path, config, splits, faults)
    if path.is_file():
        return _from_file(path, config, splits, faults)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.data) and not file_format(path.name):
        return _from_hub(config, splits)
    raise DataError(
        f"There is no folder or file {config.data!r}.",
        "Give a folder with train.jsonl and valid.jsonl, a .jsonl file, or a Hugging Face dataset as owner/name.",
    )


def _from_folder(path: Path, config: DataConfig, splits: Sequence[str], faults: list[Fault]) -> Source:
    source = Source()
    wanted = {*splits, "train"} if "valid" in splits else set(splits)
    found = {split: _files(path, split, faults) for split in NAMES if split in wanted}

    def part(split: str) -> Part:
        files = found[split]
        rows = [row for file in files for row in read_file(file, faults, source.notes)]
        return Part(split, str(files[0] if len(files) == 1 else files[0].parent), rows, config)

    for split in splits:
        if found[split]:
            source.parts.append(part(split))
            if split not in str(found[split][0].relative_to(path)).lower() and split != "train":
                source.notes.append(f"Reading {found[split][0]} as the {_SAID[split]} set")
        elif split != "valid":
            raise _missing(path, split)
    if "valid" in splits and found["valid"]:
        _check_no_hold_out(config, str(found["valid"][0]))
    elif "valid" in splits and found["train"]:
        _hold_out(source, _train_part(source) or part("train"), config)
        others = [file for file in sorted(path.glob("eval*.*")) if file_format(file.name)]
        for file in others:  # the validation set to some, the test set to others
            source.warnings.append(f"{file} is not read: rename it to valid or test to use it")
    return source


def _train_part(source: Source) -> Part | None:
    return next((part for part in source.parts if part.split == "train"), None)


_SAID = {"train": "training", "valid": "validation", "test": "test"}


def _files(path: Path, split: str, faults: list[Fault]) -> list[Path]:
    """The files of a split in a folder, or in its folder ``data``; several only if they are numbered or a folder's."""
    names = "|".join(NAMES[split])
    entries = sorted(path.iterdir())
    files = [entry for entry in entries if entry.is_file() and file_format(entry.name)]
    single = [file for file in files if re.fullmatch(rf"({names})\.\w+(\.gz)?", file.name, re.IGNORECASE)]
    numbered = [file for file in files if re.match(rf"({names})-\d+-of-\d+\b", file.name, re.IGNORECASE)]
    folders = [entry for entry in entries if entry.is_dir() and entry.name.lower() in NAMES[split]]
    inside = [
        [f for f in sorted(folder.iterdir()) if file_format(f.name) and f.name not in _NO_ROWS] for folder in folders
    ]
    groups = [*([file] for file in single), *filter(None, [numbered, *inside])]
    if split == "train" and not groups and (path / "state.json").is_file():  # datasets' save_to_disk of one split
        groups = [[e for e in entries if re.fullmatch(r"data-\d+-of-\d+\.arrow", e.name)]]
    if len(groups) > 1:
        others = ", ".join(group[0].name for group in groups[1:])
        faults.append(Fault(Place(str(groups[0][0])), f"there is also {others}: remove one of them"))
    if groups:
        check_parts(groups[0], faults)
    if not groups and path.name != "data" and (path / "data").is_dir():
        return _files(path / "data", split, faults)
    return groups[0] if groups else []


_NO_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json")  # other files that datasets saves


def _missing(path: Path, split: str) -> DataError:
    inside = sorted(entry.name for entry in path.iterdir())
    have = ", ".join(inside[:12]) + (" ..." if len(inside) > 12 else "") or "nothing"
    files = [name for name in inside if file_format(name)]
    hint = f"Name it {split}.jsonl (or {', '.join(list(FORMATS)[2:6])}), one row a line."
    if len(files) == 1 and split == "train":
        hint = f"If {files[0]} has the training rows, give the file itself: --data {path / files[0]}"
    return DataError(f"There is no {split}.jsonl in {path}; it has: {have}.", hint)


def _from_file(path: Path, config: DataConfig, splits: Sequence[str], faults: list[Fault]) -> Source:
    if not file_format(path.name):
        raise DataError(
            f"{path} has a format that mlx-lora does not read.",
            f"Write it as {', '.join(FORMATS)}, or one of these with .gz.",
        )
    source = Source()
    rows = read_file(path, faults, source.notes)
    if "train" not in splits:  # one file is the one split asked for; it cannot be two
        if len(splits) == 1:
            source.parts.append(Part(splits[0], str(path), rows, config))
            return source
        raise DataError(
            f"{path} is one file, but {' and '.join(splits)} are needed.", "Give a folder with a file for each split."
        )
    source.parts.append(Part("train", str(path), rows, config))
    if "valid" in splits:
        _hold_out(source, source.parts[0], config)
    if "test" in splits:
        source.warnings.append(f"{path} is one file: there is no test set")
    return source


def _hold_out(source: Source, train: Part, config: DataConfig) -> None:
    """Move a part of the training rows to the validation set; the same rows for the same number of rows and share."""
    asked, rows = config.valid_split is not None, train.rows
    share = config.valid_split if asked else HOLD_OUT
    if share == 0:
        source.warnings.append("valid_split is 0: there will be no validation loss")
        return
    if len(rows) < (2 if asked else HOLD_OUT_FROM):
        source.warnings.append(
            f"{train.name} has {counted(len(rows), 'row')}, too few to hold some out: there will be no validation loss"
            + ("" if asked else "; --valid-split holds out a share of any number of rows")
        )
        return
    count = min(max(1, round(len(rows) * share)), len(rows) - 1)
    count = count if asked else min(count, HOLD_OUT_MOST)
    # A fixed seed, so that runs with different seeds are compared on the same rows.
    out = set(np.random.RandomState(0).permutation(len(rows))[:count].tolist())
    train.rows = [row for i, row in enumerate(rows) if i not in out]
    held = [row for i, row in enumerate(rows) if i in out]
    source.parts.append(Part("valid", f"{train.name} (held out)", held, train.config))
    source.notes.append(
        f"{train.name}: {count} of its {counted(len(rows), 'row')}, drawn with a fixed seed, "
        f"{'is' if count == 1 else 'are'} held out for validation (--valid-split)"
    )


def _check_no_hold_out(config: DataConfig, valid: str) -> None:
    if config.valid_split is not None:
        raise ConfigError(
            f"valid_split {config.valid_split} contradicts the validation set {valid}",
            "Leave valid_split out to validate on that set, or remove that set.",
        )


def _from_hub(config: DataConfig, splits: Sequence[str]) -> Source:
    found = _load(config.data, {}, None)
    source = Source()
    names = {split: next((name for name in NAMES[split] if name in found), None) for split in NAMES}
    for split in splits:
        if names[split]:
            rows = _rows(found[names[split]], f"{config.data}/{names[split]}")
            source.parts.append(Part(split, config.data, rows, config))
        elif split != "valid":
            raise DataError(
                f"The dataset {config.data} has no {split} split, only {', '.join(map(str, found))}.",
                f"Name the rows in an hf_dataset section of the YAML file: path, {split}_split.",
            )
    if "valid" in splits and names["valid"]:
        _check_no_hold_out(config, f"{config.data}/{names['valid']}")
    elif "valid" in splits and names["train"]:
        name = f"{config.data}/{names['train']}"
        train = _train_part(source) or Part("train", config.data, _rows(found[names["train"]], name), config)
        _hold_out(source, train, config)
    return source


def _from_sections(config: DataConfig, splits: Sequence[str], faults: list[Fault]) -> Source:
    sections = config.hf_dataset if isinstance(config.hf_dataset, (list, tuple)) else [config.hf_dataset]
    _check_sections(sections)
    source = Source()
    for section in sections:
        path, options = section["path"], section.get("config") or {}
        options = {"name": options} if isinstance(options, str) else dict(options)
        keys = dataclasses.replace(config, **{key: section[key] for key in _FEATURES if section.get(key)})
        defaults = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}  # mlx-lm's
        if config.valid_split is not None:
            if section.get("valid_split"):
                _check_no_hold_out(config, f"of hf_dataset, {section['valid_split']}")
            defaults |= {"train": "train", "valid": None}
        for split in splits:
            wanted = section.get(f"{split}_split", defaults[split])
            if wanted:
                rows = filled(_rows(_load(path, options, wanted), f"{path}/{wanted}"), section, faults)
                source.parts.append(Part(split, path, rows, keys))
    for split in splits:
        parts = [part for part in source.parts if part.split == split]
        if not parts and split != "valid":
            raise ConfigError(f"hf_dataset names no rows for the {split} set", f"Add {split}_split: to the section.")
        if not parts and config.valid_split is None:
            source.warnings.append("hf_dataset names no valid_split: there will be no validation loss")
    if config.valid_split is not None:
        for part in [part for part in source.parts if part.split == "train"]:
            _hold_out(source, part, config)
    return source


def _check_sections(sections: Sequence[Any]) -> None:
    faults = []
    known = (*_SECTION, *_FEATURES, *KEYS)
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
        faults += [f"{where} {fault}" for fault in check_templates(section)]
    if faults:
        raise ConfigError("\n".join(faults), f"The keys are {', '.join(known)}.")


def _load(path: str, options: dict, split: str | None) -> Any:
    """``datasets.load_dataset``: a dataset or, where ``split`` is None, a mapping of them."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"There is no folder or file {path!r}, and loading a dataset of that name needs the datasets package.",
            "pip install datasets pyarrow, or give a folder with train.jsonl and valid.jsonl.",
        ) from None
    try:
        return datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # the errors have many types: no network, no such name, no such split, a gated data set
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"There is no folder or file {path!r}, and the dataset of that name cannot be loaded: {said}",
            "Check the name on huggingface.co/datasets, the name of the split, and the network.",
        ) from error


def _rows(values: Iterable[dict], name: str) -> list[Row]:
    return [
        Row(Place(name, number), {key: without_nulls(item) for key, item in value.items()})
        for number, value in enumerate(values, 1)
    ]
