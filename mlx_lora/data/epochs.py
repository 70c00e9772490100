"""The number of batches of a run: ``iters``, or those of its ``epochs``; packed epochs differ in number."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from ..config import TrainConfig
from .batches import Dataset, batches_per_epoch
from .packing import packed_batches_per_epoch


def in_iterations(config: TrainConfig, train_set: Dataset) -> TrainConfig:
    """The config of a run over ``train_set``, counted in iterations instead of epochs."""
    iters = iterations(config, train_set)
    return replace(config, iters=iters, epochs=None, **config.rhythm_of(iters))


def iterations(config: TrainConfig, train_set: Dataset) -> int:
    """The number of batches of a run over ``train_set``. A part of an epoch is rounded up to whole batches."""
    if config.epochs is None or not len(train_set):  # ``train`` refuses an empty set
        return config.iters or 1
    asked = Fraction(str(config.epochs))  # the decimal as written, so that 0.1 of 30 batches is 3
    if not config.pack:
        return math.ceil(asked * batches_per_epoch(train_set, config.batch_size))
    whole = int(asked)
    count = [packed_batches_per_epoch(train_set, config.batch_size, config.seed, e) for e in range(math.ceil(asked))]
    return sum(count[:whole]) + (math.ceil((asked - whole) * count[-1]) if asked > whole else 0)
