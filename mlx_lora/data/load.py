"""Data sets: ``load_dataset`` from disk or the Hub, ``tokenize`` from rows in memory. One error lists all faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import ConfigError, DataError
from . import chat, sources
from .batches import Dataset, Example, Summary
from .rows import Row, Sample, check, listing


@dataclass
class Splits:
    """The data sets; None for a split that was not asked for or is not there.

    ``warnings`` are about the splits. Those about the rows of a set are in its summary.
    """

    train: Dataset | None = None
    valid: Dataset | None = None
    test: Dataset | None = None
    warnings: list[str] = field(default_factory=list)


def load_dataset(config: DataConfig, tokenizer: Any, splits: Sequence[str] = ("train", "valid")) -> Splits:
    """Read, check and tokenize the splits that ``config`` names.

    Args:
        tokenizer: mlx-lm's or transformers'.
        splits: any of train, valid and test. A missing valid set gives a warning, any other missing set an error.

    Raises: one ``DataError`` that lists all bad rows of all files.
    """
    if unknown := [split for split in splits if split not in ("train", "valid", "test")]:
        raise ConfigError(f"there is no split {unknown[0]!r}", "The splits are train, valid and test.")
    faults: list[str] = []
    source = sources.find(config, splits, faults)
    out = Splits(warnings=source.warnings)
    for split in splits:
        parts = [part for part in source.parts if part.split == split]
        if not parts:
            continue
        name = ", ".join(dict.fromkeys(part.name for part in parts))
        drafts, notes = [], []
        for part in parts:
            samples = check(part.rows, part.config, chat.template_of(tokenizer), faults)
            drafts += _encode_all(samples, tokenizer, part.config, faults)
            if not faults:
                notes += chat.template_warnings(samples, tokenizer)
        if faults:  # raised below, after all files are checked
            continue
        if not drafts and split == "valid":
            out.warnings.append(f"{name} has no rows: there will be no validation loss")
        else:
            setattr(out, split, _build(drafts, config.max_seq_length, name, notes))
    if faults:
        raise _error(faults)
    return out


def tokenize(rows: Iterable[dict], tokenizer: Any, config: DataConfig, source: str = "rows") -> Dataset:
    """A dataset from rows in memory. Errors name them ``source:1``, ``source:2`` and so on."""
    faults: list[str] = []
    numbered = [Row(f"{source}:{i}", row) for i, row in enumerate(rows, 1)]
    samples = check(numbered, config, chat.template_of(tokenizer), faults)
    drafts = _encode_all(samples, tokenizer, config, faults)
    if faults:
        raise _error(faults)
    return _build(drafts, config.max_seq_length, source, chat.template_warnings(samples, tokenizer))


def _encode_all(samples: list[Sample], tokenizer: Any, config: DataConfig, faults: list[str]) -> list[Example]:
    turns = config.mask_turns if config.mask_prompt else None
    out = []
    for sample in samples:
        try:
            ids, mask = chat.encode(sample, tokenizer, turns)
        except chat.Unrenderable as error:
            faults.append(f"{sample.where}: {error}")
        else:
            out.append(Example(np.array(ids, np.int32), mask))
    return out


def _build(drafts: list[Example], limit: int, source: str, notes: list[str]) -> Dataset:
    """Truncate to ``limit`` tokens, and drop the rows that then have no token to learn."""
    if not drafts:
        raise DataError(f"{source} has no rows.", "Write one JSON object on each line.")
    cut = [Example(example.tokens[:limit], example.mask[:limit]) for example in drafts]
    kept = [example for example in cut if example.mask.any()]
    truncated = sum(len(example.tokens) > limit for example in drafts)
    longest = max(len(example.tokens) for example in drafts)
    if not kept:
        fix = "Raise --max-seq-length" if truncated else "Add rows with an answer"
        raise DataError(
            f"Nothing to learn in {source}: none of its {len(drafts)} rows has a token to learn "
            f"among its first {limit} (longest row: {longest}).",
            f"{fix}, or leave mask_prompt out.",
        )
    summary = Summary(
        rows=len(drafts),
        kept=len(kept),
        truncated=truncated,
        dropped=len(drafts) - len(kept),
        tokens=sum(len(example.tokens) for example in kept),
        learned_tokens=sum(int(example.mask.sum()) for example in kept),
        longest=longest,
        limit=limit,
        source=source,
        notes=tuple(notes),
    )
    return Dataset(kept, summary)


def _error(faults: list[str]) -> DataError:
    return DataError(
        f"{len(faults)} error{'s' * (len(faults) > 1)} in the data:\n{listing(faults)}",
        'Correct these lines. Each must be one object: {"messages": [...]}, {"prompt": "...", "completion": "..."} '
        'or {"text": "..."}.',
    )
