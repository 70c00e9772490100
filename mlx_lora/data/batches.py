"""Tokenized rows in memory, and batches of them: little padding, few shapes, every row once an epoch.

Widths: a dataset has at most 32 widths to which batches are padded, chosen for its lengths (the compiled step is traced
once for each width). A width is 1 more than a multiple of 4, so that the inputs ``tokens[:, :-1]`` have a multiple of 4
columns.
Order: the rows are sorted by length and cut into groups, which are the same in all epochs. In each epoch, the rows of a
group are shuffled and cut into batches, and then all batches are shuffled, both by (seed, epoch). So the rows of a
batch have similar lengths, every epoch has other batches, and a row is nearly always padded to the same width.
One batch of an epoch may be filled with empty rows. Their mask is False, so that they do not count in the loss.
There is no MLX here, and no global random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..config import TOKENS
from ..errors import ConfigError, DataError

MAX_WIDTHS = 32
UNIT = 4  # every width is a multiple of this plus 1; 8 would pad short rows (90 tokens) by 4 %


class Example(NamedTuple):
    """The tokens of one row."""

    tokens: np.ndarray  # [L] int32
    mask: np.ndarray  # [L] bool: whether token i is learned; mask[0] is False

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences that the model reads: the row itself, or the two answers of a pair."""
        return (self,)

    def cut(self, limit: int) -> Example:
        """The row without the tokens from `limit` on."""
        return Example(self.tokens[:limit], self.mask[:limit])


@dataclass(frozen=True)
class Summary:
    """How many rows were read, truncated and dropped. A truncated row may be kept or dropped."""

    rows: int
    kept: int
    truncated: int
    dropped: int
    tokens: int  # of the kept rows
    learned_tokens: int
    longest: int  # tokens of the longest row, before truncation
    limit: int = 0  # max_seq_length
    source: str = "rows"
    left_out: tuple[str, ...] = ()  # what the chat template leaves out of the rows
    reading: tuple[str, ...] = ()  # how the rows were read, unless that is obvious

    def warnings(self) -> list[str]:
        """One sentence for each change to the data that the user did not ask for."""
        lines = []
        if self.truncated:
            lines.append(
                f"{self.truncated} of {self.rows} rows in {self.source} were cut to {self.limit} tokens "
                f"(longest: {self.longest}); raise --max-seq-length to keep all of their tokens"
            )
        if self.dropped:
            lines.append(f"{self.dropped} of {self.rows} rows in {self.source} had no token to learn and were dropped")
        return [*lines, *self.left_out]


class Dataset(Sequence):
    """Examples in the order of their rows; ``lengths`` [N], and ``widths`` [W] to which batches are padded."""

    kind = TOKENS  # what a loss must take, see ``config.preference``

    def __init__(self, examples: Iterable[Example], summary: Summary | None = None):
        self._examples = list(examples)
        self.lengths = np.array([max(len(s.tokens) for s in sequences(row)) for row in self._examples], np.int64)
        if summary is None:
            count, longest = len(self._examples), int(self.lengths.max(initial=0))
            tokens, learned = sizes(self._examples)
            summary = Summary(count, count, 0, 0, tokens, learned, longest)
        self.summary = summary

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]

    @cached_property
    def widths(self) -> np.ndarray:
        return plan_widths(self._room)

    @property
    def limit(self) -> int:
        """The most tokens that a row may have."""
        return max(self.summary.limit, int(self.lengths.max(initial=0)))

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        return epoch_batches(self.lengths, self.widths, batch_size, seed, epoch)

    def width(self, rows: np.ndarray) -> int:
        """The tokens to which a batch of these rows is padded."""
        return int(self.widths[np.searchsorted(self.widths, self._room[rows].max())])

    def collate(self, rows: np.ndarray, size: int, rank: int = 0, world: int = 1) -> Batch:
        """A batch of ``rows``, filled with empty rows up to ``size``. Returns the rows ``rank::world`` of it."""
        return Batch(*pad([self[int(row)] for row in rows[rank::world]], size // world, self.width(rows)))

    @property
    def _room(self) -> np.ndarray:
        """Tokens that each row needs in a batch [N]."""
        return self.lengths

    @cached_property
    def digest(self) -> str:
        """A hash of the tokens and masks of all rows, in their order."""
        found = hashlib.sha256(self.lengths.tobytes())
        for start in range(0, len(self), 1024):
            rows = [s for row in self._examples[start : start + 1024] for s in sequences(row)]
            found.update(np.concatenate([row.tokens for row in rows]).astype(np.int32, copy=False).tobytes())
            found.update(np.packbits(np.concatenate([row.mask for row in rows]).astype(bool, copy=False)).tobytes())
        found.update(self._hashed())
        return found.hexdigest()

    def _hashed(self) -> bytes:
        """What the hash covers besides tokens and masks."""
        return b""


def sequences(row: Any) -> tuple[Any, ...]:
    """The sequences that the model reads for a row; the caller's own class needs only tokens and a mask."""
    return getattr(row, "sequences", (row,))


def sizes(rows: Iterable[Any]) -> tuple[int, int]:
    """(tokens, learned tokens) of all rows."""
    found = [s for row in rows for s in sequences(row)]
    return sum(len(s.tokens) for s in found), sum(int(s.mask.sum()) for s in found)


class Batch(NamedTuple):
    """Rows padded with 0 on the right."""

    tokens: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T - 1] bool: whether the target tokens[:, j + 1] is learned


def train_batches(
    dataset: Dataset, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """An endless iterator of batches, the same for the same seed.

    Args:
        batch_size: rows in a batch, over all processes.
        start: batches, over all epochs, that an earlier run consumed. They are skipped without being made.
        rank, world: this process takes rows ``rank::world`` of each batch, padded to the width of the whole batch. All
            its rows may be empty: average over the tokens of all processes, not over processes.

    Returns: an iterator of batches of ``batch_size // world`` rows.
    """
    check_shares(dataset, batch_size, rank, world)
    count = batches_per_epoch(dataset, batch_size)

    def generate() -> Iterator[Batch]:
        epoch, skip = divmod(start, count)
        while True:
            for rows in dataset.epoch(batch_size, seed, epoch)[skip:]:
                yield dataset.collate(rows, batch_size, rank, world)
            epoch, skip = epoch + 1, 0

    return generate()


def eval_batches(dataset: Dataset, batch_size: int, limit: int = -1, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Every row once, sorted by length; or ``limit`` batches evenly spread over the lengths. Always the same batches.

    Args and returns: as in ``train_batches``; ``limit=-1`` takes all batches.
    """
    check_shares(dataset, batch_size, rank, world)
    rows = eval_rows(dataset, batch_size, limit)
    return (dataset.collate(batch, batch_size, rank, world) for batch in rows)


def eval_rows(dataset: Dataset, batch_size: int, limit: int = -1) -> list[np.ndarray]:
    """The rows of each batch of ``eval_batches``."""
    order = np.argsort(dataset.lengths, kind="stable")
    count = batches_per_epoch(dataset, batch_size)
    taken = range(count) if limit < 0 or limit >= count else [(2 * k + 1) * count // (2 * limit) for k in range(limit)]
    return [order[i * batch_size : (i + 1) * batch_size] for i in taken]


def batches_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """The number of batches that contain every row once."""
    return -(-len(dataset) // batch_size)


def plan_widths(lengths: np.ndarray, most: int = MAX_WIDTHS) -> np.ndarray:
    """The widths, at most ``most``, with the least padding.

    Args:
        lengths: tokens of each row [N].
    Returns: widths [W], ascending; the longest row has at most the last one.

    Dynamic programming over the lengths in units: ``best[j]`` is the least padding of the rows up to candidate j if j
    is a width, and each round allows one more width.
    """
    unit = UNIT * (1 + int(lengths.max()) // (UNIT * 512))  # at most 512 candidates, so 512^2 operations a round
    units = np.maximum(1, -(-(lengths - 1) // unit))
    sizes, counts = np.unique(units, return_counts=True)
    rows, total = np.cumsum(counts), np.cumsum(counts * sizes)
    # waste[i, j]: padding if the rows of candidates i + 1 to j have the width of j
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


def epoch_batches(lengths: np.ndarray, widths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch of an epoch, for rows with ``lengths`` [N]."""
    # NumPy guarantees RandomState's stream, so a run can be resumed exactly with another version of NumPy.
    random = np.random.RandomState([seed, epoch])
    batches = []
    for group in length_groups(lengths, widths, batch_size):
        rows, first = random.permutation(group), len(group) % batch_size
        starts = [*([0] if first else []), *range(first, len(rows), batch_size)]
        batches += np.split(rows, starts[1:])
    return [batches[i] for i in random.permutation(len(batches))]


def length_groups(lengths: np.ndarray, widths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The rows in groups of similar lengths, always the same: the groups with the least padding.

    All groups but the first have whole batches. Each has at least two batches, if there are enough rows; a group of one
    batch would have the same batch in every epoch.

    A group ends at a width, except for less than a batch of rows, which the next group takes over. So every whole
    batch of a group has a row of the group's last width, unless two widths were joined because they had too few rows.
    """
    order = np.argsort(lengths, kind="stable")
    counts = np.searchsorted(lengths[order], widths, side="right")
    ends = np.unique([0, *np.maximum(0, counts - (counts - len(order)) % batch_size)])
    padded = widths[np.searchsorted(widths, lengths[order][ends - 1])]
    best, before = [0], [0]  # for each end: the padded tokens up to it, and the start of the last group before it
    for j in range(1, len(ends)):
        tokens = [
            best[i] + (ends[j] - ends[i]) * padded[j] if ends[j] - ends[i] > batch_size else np.inf for i in range(j)
        ]
        before.append(int(np.argmin(tokens)))
        best.append(tokens[before[j]])
    groups, j = [], len(ends) - 1
    while j > 0:
        groups.append(order[ends[before[j]] : ends[j]])
        j = before[j]
    return groups[::-1]


def pad(examples: Sequence[Example], slots: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [slots, width] and the mask of the targets [slots, width - 1]. Slots without an example are empty."""
    tokens, mask = np.zeros((slots, width), np.int32), np.zeros((slots, width - 1), bool)
    for k, example in enumerate(examples):
        tokens[k, : len(example.tokens)] = example.tokens
        mask[k, : len(example.tokens) - 1] = example.mask[1:]
    return tokens, mask


def check_shares(dataset: Dataset, batch_size: int, rank: int, world: int) -> None:
    if len(dataset) == 0:
        raise DataError("The dataset is empty.", "Give at least one row.")
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ConfigError(
            f"{batch_size} rows cannot be divided equally among {world} processes (this is number {rank})",
            f"Set batch_size to a multiple of {world}.",
        )
