"""The frozen layers' output that ``cache_prefix`` keeps: its size and the saved time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from ..training.prefix import kept_tokens
from .estimate import Frozen
from .step import Parts


@dataclass(frozen=True)
class Prefix:
    """The kept output of the frozen layers before the first trained one."""

    layers: int
    place: str  # memory or disk
    bytes: int
    reused: float  # share of the rows read in all epochs whose states are already kept


def prefix_of(frozen: Frozen | None, sets: Any, train: TrainConfig, exact: bool) -> Prefix | None:
    """The kept output of a run on ``sets``; None without ``cache_prefix``.

    Args:
        exact: states are kept for each width of a batch, as on a CPU.
    """
    if frozen is None:
        return None
    tokens, found = kept_tokens(
        sets.train, sets.valid, exact, train.batch_size, train.seed, train.iters, train.val_batches
    )
    later = 1 - len(sets.train.epoch(train.batch_size, train.seed, 0)) / train.iters  # share of the iterations
    return Prefix(frozen.layers, train.cache_prefix, tokens * frozen.state, (found or 0.0) * max(0.0, later))


def with_prefix(parts: Parts, prefix: Prefix | None) -> Parts:
    """The parts of the peak, with the kept output if it is in memory."""
    if prefix is None or prefix.place != "memory":
        return parts
    return parts + Parts(0, 0, 0, 0, 0, prefix.bytes, prefix.bytes)
