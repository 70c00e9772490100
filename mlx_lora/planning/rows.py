"""The tokens, padding and batches of an epoch of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import PAIRS, TOKENS, TrainConfig
from ..data import packing
from ..data.batches import UNIT, sizes


@dataclass(frozen=True)
class Epoch:
    """Every row of the training set once."""

    rows: int
    tokens: int  # includes both answers of a pair
    learned_tokens: int
    padding: float  # share of the computed tokens that are padding
    batches: int
    longest: int  # tokens of the widest batch
    packed_padding: float | None  # that share with --pack; None for rows that cannot be packed


def epoch_of(rows: Any, train: TrainConfig) -> Epoch:
    """An epoch of ``rows``, a data set of ``mlx_lora.data``."""
    size, seed = train.batch_size, train.seed
    whole, learned = sizes(rows)
    sequences = 2 if rows.kind == PAIRS else 1
    apart = [rows.width(one) for one in rows.epoch(size, seed, 0)]
    count, computed, longest = len(apart), sum(apart) * size * sequences, int(rows.widths[-1])
    packed = None
    if rows.kind == TOKENS:
        widths = [_multiple(room) for _, room in packing._epoch(rows.lengths, packing.capacity(rows), size, seed, 0)]
        packed = 1 - whole / (sum(widths) * size)
        if train.pack:
            count, computed, longest = len(widths), sum(widths) * size, max(widths)
    return Epoch(len(rows), whole, learned, 1 - whole / computed, count, longest, packed)


def _multiple(room: int) -> int:
    return -(-max(1, room - 1) // UNIT) * UNIT + 1
