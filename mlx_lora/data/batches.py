"""Tokenized rows in memory, and batches of them: little padding, few shapes, every row once an epoch.

Widths: a plan of at most 32 for a dataset, placed where its lengths are (the compiled step is traced once a width).
A width is 1 more than a multiple of 4, so that the inputs ``tokens[:, :-1]`` have a multiple of 4 columns.
Order: an epoch is a permutation by (seed, epoch), cut into windows; rows are sorted by length inside a window, cut into
batches, and the batches shuffled. So neighbours in a batch are of like length, and new ones every epoch.
Tail: the last batch of an epoch is filled up with rows of nothing (mask False), unseen by a token-weighted loss.
No MLX here, and no global random state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, DataError

MAX_WIDTHS = 32
UNIT = 4  # of a width, minus 1; with 8, rounding alone pads short rows (90 tokens) by 4 %
WINDOW = 256  # batches that are sorted together


class Example(NamedTuple):
    """A row ready to learn from."""

    tokens: np.ndarray  # [L] int32
    mask: np.ndarray  # [L] bool: whether token i is to be learned; mask[0] is False


@dataclass(frozen=True)
class Summary:
    """What became of the rows. Truncated ones may be kept or dropped; ``tokens`` are those of the rows kept."""

    rows: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    learned_tokens: int
    longest: int  # tokens, before the cut
    limit: int = 0  # max_seq_length
    source: str = "rows"
    notes: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """One sentence for each thing that the user did not ask for."""
        lines = []
        if self.truncated:
            lines.append(
                f"{self.truncated} of {self.rows} rows in {self.source} were cut to {self.limit} tokens "
                f"(longest: {self.longest}); raise --max-seq-length to keep them whole"
            )
        if self.dropped:
            lines.append(
                f"{self.dropped} of {self.rows} rows in {self.source} had nothing left to learn and were dropped"
            )
        return [*lines, *self.notes]


class Dataset(Sequence):
    """Examples, in the order of their rows. ``lengths`` [N]; ``widths`` [W], to which batches are padded."""

    def __init__(self, examples: Iterable[Example], summary: Summary | None = None):
        self._examples = list(examples)
        self.lengths = np.array([len(example.tokens) for example in self._examples], np.int64)
        if summary is None:
            count, longest = len(self._examples), int(self.lengths.max(initial=0))
            learned = sum(int(example.mask.sum()) for example in self._examples)
            summary = Summary(count, count, 0, 0, int(self.lengths.sum()), learned, longest)
        self.summary = summary

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]

    @cached_property
    def widths(self) -> np.ndarray:
        return plan_widths(self.lengths)


class Batch(NamedTuple):
    """Rows padded to the right with 0."""

    tokens: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T - 1] bool: whether the target tokens[:, j + 1] counts


def train_batches(
    dataset: Dataset, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Batches without end, the same ones for the same seed.

    Args:
        batch_size: rows of the whole batch, over all ranks.
        start: batches already consumed by an earlier run, over all epochs; costs nothing to pass over.
        rank, world: this process takes rows ``rank::world`` of each batch, in the width of the whole batch. A rank may
            get rows of nothing only: average over the tokens of all ranks, not over ranks.
    Returns: an iterator of batches of ``batch_size // world`` rows.
    """
    _check(dataset, batch_size, rank, world)
    count = batches_per_epoch(dataset, batch_size)

    def generate() -> Iterator[Batch]:
        epoch, skip = divmod(start, count)
        while True:
            for rows in _epoch(dataset.lengths, batch_size, seed, epoch)[skip:]:
                yield _collate(dataset, rows, batch_size, rank, world)
            epoch, skip = epoch + 1, 0

    return generate()


def eval_batches(dataset: Dataset, batch_size: int, limit: int = -1, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Every row once, by length; or ``limit`` batches evenly spread over the lengths. Always the same ones.

    Args and returns: as ``train_batches``; ``limit=-1`` takes all.
    """
    _check(dataset, batch_size, rank, world)
    order = np.argsort(dataset.lengths, kind="stable")
    count = batches_per_epoch(dataset, batch_size)
    taken = range(count) if limit < 0 or limit >= count else [(2 * k + 1) * count // (2 * limit) for k in range(limit)]
    return (_collate(dataset, order[i * batch_size : (i + 1) * batch_size], batch_size, rank, world) for i in taken)


def batches_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Batches that show every row once."""
    return -(-len(dataset) // batch_size)


def plan_widths(lengths: np.ndarray, most: int = MAX_WIDTHS) -> np.ndarray:
    """The widths, at most ``most``, that pad the rows least.

    Args:
        lengths: tokens of each row [N].
    Returns: widths [W] in rising order; the last one holds the longest row.

    The best choice by dynamic programming over the lengths in units: ``best[j]`` is the least padding of the rows up to
    candidate j when j is a width, and each round allows one more width.
    """
    unit = UNIT * (1 + int(lengths.max()) // (UNIT * 512))  # bounds the candidates, and so the work, at 512^2 a round
    units = np.maximum(1, -(-(lengths - 1) // unit))
    sizes, counts = np.unique(units, return_counts=True)
    rows, total = np.cumsum(counts), np.cumsum(counts * sizes)
    # waste[i, j]: padding when the rows of candidates i + 1 ... j take the width of j
    waste = sizes * (rows - rows[:, None]) - (total - total[:, None])
    waste = np.where(np.tri(len(sizes), k=-1, dtype=bool).T, waste, np.iinfo(np.int64).max // 4)
    best = sizes * rows - total  # one width
    choices = []
    for _ in range(min(most, len(sizes)) - 1):
        through = best[:, None] + waste
        before = through.argmin(axis=0)
        better = through[before, np.arange(len(sizes))]
        choices.append(np.where(better < best, before, -1))
        best = np.minimum(better, best)
    j, chosen = len(sizes) - 1, [len(sizes) - 1]
    for before in reversed(choices):
        if before[j] >= 0:
            j = before[j]
            chosen.append(j)
    return sizes[chosen[::-1]] * unit + 1


def _epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch of an epoch."""
    # RandomState's stream is promised never to change, so a run resumes on another numpy as it would have gone on.
    random = np.random.RandomState([seed, epoch])
    order = random.permutation(len(lengths))
    count = -(-len(order) // batch_size)
    window = batch_size * max(1, min(WINDOW, count // 2))  # two windows at least, or the batches would never change
    batches = []
    for at in range(0, len(order), window):
        rows = order[at : at + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in random.permutation(count)]


def _collate(dataset: Dataset, rows: np.ndarray, batch_size: int, rank: int, world: int) -> Batch:
    width = int(dataset.widths[np.searchsorted(dataset.widths, dataset.lengths[rows].max())])
    tokens = np.zeros((batch_size // world, width), np.int32)
    mask = np.zeros((batch_size // world, width - 1), bool)
    for k, row in enumerate(rows[rank::world]):
        example = dataset[int(row)]
        tokens[k, : len(example.tokens)] = example.tokens
        mask[k, : len(example.tokens) - 1] = example.mask[1:]
    return Batch(tokens, mask)


def _check(dataset: Dataset, batch_size: int, rank: int, world: int) -> None:
    if len(dataset) == 0:
        raise DataError("The dataset is empty.", "Give at least one row.")
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ConfigError(
            f"a batch of {batch_size} rows cannot be shared equally by {world} processes (this is number {rank})",
            f"Take a batch_size that is a multiple of {world}.",
        )
