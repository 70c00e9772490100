"""What an epoch of a data set consists of: tokens, padding, batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..data import batches, packing


@dataclass(frozen=True)
class Epoch:
    """Every row of the training set once."""

    rows: int
    tokens: int
    learned_tokens: int
    padding: float  # share of the tokens computed that are padding
    batches: int
    longest: int  # tokens of the widest batch
    packed_padding: float  # the share with --pack


def epoch_of(rows: Any, train: TrainConfig) -> Epoch:
    """An epoch of ``rows``, a data set of ``mlx_lora.data``."""
    lengths, size, seed = np.asarray(rows.lengths), train.batch_size, train.seed
    together = packing._epoch(lengths, packing.capacity(rows), size, seed, 0)
    packed = sum(size * _multiple(room) for _, room in together)
    apart = rows.epoch(size, seed, 0)
    padded = sum(size * rows.width(one) for one in apart)
    tokens = int(lengths.sum())
    computed, count = (packed, len(together)) if train.pack else (padded, len(apart))
    longest = max(_multiple(room) for _, room in together) if train.pack else int(rows.widths[-1])
    summary = getattr(rows, "summary", None)
    learned = summary.learned_tokens if summary else tokens
    return Epoch(len(lengths), tokens, learned, 1 - tokens / computed, count, longest, 1 - tokens / packed)


def _multiple(room: int) -> int:
    return -(-max(1, room - 1) // batches.UNIT) * batches.UNIT + 1
