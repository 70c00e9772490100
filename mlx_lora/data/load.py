"""Data sets: ``load_dataset`` from disk or the Hub, ``tokenize`` from rows in memory. One error lists all faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import LABELS, PAIRS, TOKENS, DataConfig
from ..errors import ConfigError, DataError
from . import chat, sources
from .batches import Dataset, Summary, sizes
from .faults import Fault, Place, counted, listing
from .files import Row
from .preferences import AnswerEncoder, LabelDataset, PairDataset
from .rows import check
from .template import template_of


@dataclass
class Splits:
    """The data sets; None for a split that was not requested or does not exist.

    ``warnings`` and ``notes`` are about the splits. Those about the rows of a set are in its summary.
    """

    train: Dataset | None = None
    valid: Dataset | None = None
    test: Dataset | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # decisions made for the user, such as which file is read

    def all_warnings(self) -> list[str]:
        """The warnings about the splits and about the rows of each set."""
        return list(dict.fromkeys([*self.warnings, *(line for s in self._summaries() for line in s.warnings())]))

    def all_notes(self) -> list[str]:
        """The notes about the splits and about how the rows of each set are read."""
        return list(dict.fromkeys([*self.notes, *(line for s in self._summaries() for line in s.reading)]))

    def _summaries(self) -> list[Summary]:
        sets = (self.train, self.valid, self.test)
        return [data.summary for data in sets if isinstance(getattr(data, "summary", None), Summary)]


def load_dataset(
    config: DataConfig, tokenizer: Any, splits: Sequence[str] = ("train", "valid"), kind: str = TOKENS
) -> Splits:
    """Read, check and tokenize the splits that ``config`` names.

    Args:
        tokenizer: mlx-lm's or transformers'.
        splits: any of train, valid and test. A missing valid set gives a warning, any other missing set an error.
        kind: what the loss takes: ``preference_of(loss).rows``.

    Raises: one ``DataError`` that lists all bad rows of all files.
    """
    if unknown := [split for split in splits if split not in ("train", "valid", "test")]:
        raise ConfigError(f"there is no split {unknown[0]!r}", "The splits are train, valid and test.")
    faults: list[Fault] = []
    source = sources.find(config, splits, faults)
    out = Splits(warnings=source.warnings, notes=source.notes)
    for split in splits:
        parts = [part for part in source.parts if part.split == split]
        if not parts:
            continue
        name = ", ".join(dict.fromkeys(part.name for part in parts))
        drafts, left_out, reading = [], [], []
        for part in parts:
            made = _encode_all(part.rows, tokenizer, part.config, faults, kind)
            for total, new in zip((drafts, left_out, reading), made, strict=True):
                total += new
        if faults:  # raised below, after all files are checked
            continue
        if not drafts and split == "valid":
            out.warnings.append(f"{name} has no rows: there will be no validation loss")
        else:
            setattr(out, split, _build(drafts, config.max_seq_length, name, left_out, reading, kind))
    if faults:
        raise _error(faults)
    return out


def tokenize(
    rows: Iterable[dict], tokenizer: Any, config: DataConfig, source: str = "rows", kind: str = TOKENS
) -> Dataset:
    """A dataset from rows in memory. Errors name them ``source:1``, ... ``kind``: as in ``load_dataset``."""
    faults: list[Fault] = []
    numbered = [Row(Place(source, i), row) for i, row in enumerate(rows, 1)]
    drafts, left_out, reading = _encode_all(numbered, tokenizer, config, faults, kind)
    if faults:
        raise _error(faults)
    return _build(drafts, config.max_seq_length, source, left_out, reading, kind)


def _encode_all(
    rows: list[Row], tokenizer: Any, config: DataConfig, faults: list[Fault], kind: str
) -> tuple[list[Any], list[str], list[str]]:
    """The examples of one file's rows, warnings about what the chat template leaves out, and how the rows were read."""
    checked = check(rows, config, template_of(tokenizer), faults, kind)
    if kind == TOKENS:
        encoder = chat.Encoder(tokenizer, config.mask_turns if config.mask_prompt else None)
    else:
        encoder = AnswerEncoder(tokenizer, kind)
    out = []
    for sample in checked.samples:
        try:
            out += encoder.encode(sample)
        except chat.Unrenderable as error:
            faults.append(Fault(sample.where, str(error)))
    return out, [*checked.warnings, *encoder.warnings()], checked.reading


def _build(drafts: list[Any], limit: int, source: str, left_out: list[str], reading: list[str], kind: str) -> Dataset:
    """Truncate to ``limit`` tokens, and drop rows in which an answer has no token left to learn."""
    if not drafts:
        raise DataError(f"{source} has no rows.", "Write one JSON object on each line.")
    kept = [row for row in (draft.cut(limit) for draft in drafts) if all(s.mask.any() for s in row.sequences)]
    lengths = [max(len(s.tokens) for s in draft.sequences) for draft in drafts]
    truncated, longest = sum(length > limit for length in lengths), max(lengths)
    tokens, learned = sizes(kept)
    if not kept:
        fix = f"Raise --max-seq-length to {longest}" if truncated else "Add rows with an answer"
        raise DataError(
            f"Nothing to learn in {source}: none of its {counted(len(drafts), 'row')} has a token to learn "
            f"among its first {limit} (longest row: {longest}).",
            f"{fix}.",
        )
    summary = Summary(
        rows=len(drafts),
        kept=len(kept),
        truncated=truncated,
        dropped=len(drafts) - len(kept),
        tokens=tokens,
        learned_tokens=learned,
        longest=longest,
        limit=limit,
        source=source,
        left_out=tuple(dict.fromkeys(left_out)),
        reading=tuple(dict.fromkeys(reading)),
    )
    return _DATASETS[kind](kept, summary)


_DATASETS = {TOKENS: Dataset, PAIRS: PairDataset, LABELS: LabelDataset}


def _error(faults: list[Fault]) -> DataError:
    rows = len({fault.where for fault in faults})
    return DataError(
        f"{counted(rows, 'error')} in the data:\n{listing(faults)}",
        "Correct these rows as the lines above say, or remove them.",
    )
