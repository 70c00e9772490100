"""Batches of packed sequences: several rows side by side in each, none of them cut.

An epoch is a permutation of the rows that depends on (seed, epoch), cut into windows. In a window, the rows are placed
from the longest to the shortest, each into the first sequence that has room for it (first-fit decreasing). The
sequence with the most room left is taken apart again, and its rows go into the next window. The sequences are shuffled
and cut into batches.
Widths: all batches are as wide as the longest row that the data set may have, ``max_seq_length`` tokens. Only the
last batch of an epoch may be narrower: its rows are spread over all its sequences, and its width is the smallest
multiple of an eighth of the full width that holds them. So a compiled step is traced for few shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..config import DataConfig
from .batches import UNIT, Dataset, check_shares

WINDOW = 4096  # rows packed together
NARROWER = 8  # the width of the batch left at the end of an epoch is a multiple of this fraction of the full one


class PackedBatch(NamedTuple):
    """Sequences of rows, padded with 0 on the right."""

    tokens: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T - 1] bool: whether the target tokens[:, j + 1] is learned; no row's first token is
    segments: np.ndarray  # [B, T] int32: 1 for the tokens of a sequence's first row, 2 for the second; 0 for padding


def packed_batches(
    dataset: Dataset, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[PackedBatch]:
    """An endless iterator of packed batches, the same for the same seed. Each epoch has every row once.

    Args:
        batch_size: sequences in a batch, over all processes.
        start: batches, over all epochs, that an earlier run consumed. Their rows are placed again, but not copied.
        rank, world: this process takes sequences ``rank::world`` of each batch.

    Returns: an iterator of batches of ``batch_size // world`` sequences.
    """
    check_shares(dataset, batch_size, rank, world)

    def generate() -> Iterator[PackedBatch]:
        epoch, skip = 0, start
        while True:
            batches = _epoch(dataset.lengths, capacity(dataset), batch_size, seed, epoch)
            for sequences, room in batches[skip:]:
                yield _collate(dataset, sequences[rank::world], batch_size // world, room)
            epoch, skip = epoch + 1, max(0, skip - len(batches))

    return generate()


def packed_batches_per_epoch(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> int:
    """The number of batches in an epoch; it may differ from one to the next. The rows are placed, but not copied."""
    return len(_epoch(dataset.lengths, capacity(dataset), batch_size, seed, epoch))


def capacity(dataset: Dataset) -> int:
    """Tokens in a sequence: the data set's ``max_seq_length``, and at least those of its longest row."""
    limit = getattr(getattr(dataset, "summary", None), "limit", 0) or DataConfig.max_seq_length
    return max(limit, int(dataset.lengths.max()))


def _epoch(lengths: np.ndarray, most: int, batch_size: int, seed: int, epoch: int) -> list[tuple[list[list[int]], int]]:
    """The batches of an epoch: the rows of each sequence of a batch, and the width of the batch in tokens."""
    random = np.random.RandomState([seed, epoch])
    order, full, left = random.permutation(len(lengths)), [], []
    window = min(WINDOW, -(-len(order) // 2))  # at least two, else rows of unequal lengths are always packed alike
    for at in range(0, len(order), window):
        packed = first_fit_decreasing([*left, *order[at : at + window].tolist()], lengths, most)
        emptiest = min(range(len(packed)), key=lambda i: lengths[packed[i]].sum())
        left = packed.pop(emptiest)
        full += packed
    sequences = [full[i] for i in random.permutation(len(full))]
    end = len(sequences) // batch_size * batch_size
    batches = [(sequences[i : i + batch_size], most) for i in range(0, end, batch_size)]
    last = _narrowest([*sequences[end:], left], lengths, most, batch_size)
    batches.insert(random.randint(len(batches) + 1), last)
    return batches


def first_fit_decreasing(rows: list[int], lengths: np.ndarray, most: int) -> list[list[int]]:
    """Sequences of at most ``most`` tokens that contain every row once."""
    room = np.full(len(rows), most)
    sequences: list[list[int]] = [[] for _ in rows]
    for row in sorted(rows, key=lambda row: -lengths[row]):  # a stable sort: equal lengths stay in their order
        first = int(np.argmax(room >= lengths[row]))
        room[first] -= lengths[row]
        sequences[first].append(row)
    return [sequence for sequence in sequences if sequence]


def _narrowest(
    sequences: list[list[int]], lengths: np.ndarray, most: int, batch_size: int
) -> tuple[list[list[int]], int]:
    """The rows of ``sequences`` in at most ``batch_size`` sequences of the smallest planned width that is enough."""
    rows = [row for sequence in sequences for row in sequence]
    for part in range(1, NARROWER):
        room = -(-most * part // NARROWER)
        if lengths[rows].max() <= room and len(spread := first_fit_decreasing(rows, lengths, room)) <= batch_size:
            return spread, room
    return sequences, most


def _collate(dataset: Dataset, sequences: list[list[int]], size: int, room: int) -> PackedBatch:
    width = -(-max(1, room - 1) // UNIT) * UNIT + 1
    tokens = np.zeros((size, width), np.int32)
    mask = np.zeros((size, width), bool)
    segments = np.zeros((size, width), np.int32)
    for k, rows in enumerate(sequences):
        at = 0
        for number, row in enumerate(rows, 1):
            example = dataset[row]
            place = np.s_[k, at : at + len(example.tokens)]
            tokens[place], mask[place], segments[place] = example.tokens, example.mask, number
            mask[k, at] = False  # the previous row's last token does not predict this row's first token
            at += len(example.tokens)
    return PackedBatch(tokens, mask[:, 1:], segments)
