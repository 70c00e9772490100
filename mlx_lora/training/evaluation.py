"""The mean loss of a model on a data set."""

from __future__ import annotations

import math
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.forward_paths import as_generated
from ..base.modes import mode
from ..config import LABELS, PAIRS, TrainConfig, preference_of
from ..config import TOKENS as ROWS
from ..data import Dataset, eval_batches
from ..errors import ConfigError, TrainingError
from .losses import TOKENS, loss_named, means
from .reports import Evaluation


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 4,
    limit: int = -1,
    loss: str = "cross_entropy",
    options: dict[str, float] | None = None,
    *,
    prefix: Any = None,
) -> Evaluation:
    """The mean loss of `model` on `dataset`: the sum over all batches and processes, divided by the count.

    If a model computes something else without a cache than in generation, it is called with a cache. Dropout is off.
    Afterwards every module is back in its mode (training or evaluation). No random numbers are drawn.

    Args:
        limit: batches to measure at most; -1 for the whole set.
        loss: a name in `LOSSES`.
        options: of the loss, `TrainConfig(loss=...).preference_options()`; its defaults if left out.
        prefix: an open `FrozenPrefix` of this model that keeps the states of `dataset`.

    Raises: TrainingError if there is nothing to measure, or no reference to compare with (see `referenced`).
        ConfigError for an unknown loss, or one that takes other rows.
    """
    batch_loss = loss_named(loss, TrainConfig(loss=loss).preference_options() if options is None else options)
    check_rows(dataset, loss)
    if preference_of(loss).reference and dataset.reference is None:
        raise TrainingError(
            f"{loss} compares with a reference, and the data set has no log-probabilities of the reference.",
            "Call mlx_lora.training.referenced(model, dataset, loss, batch_size) with the reference first.",
        )
    group = mx.distributed.init()
    tic = time.perf_counter()
    names: list[str] = []
    sums = np.zeros(2)  # loss and count, then sums and counts of `names`
    with as_generated(model, dataset[0].tokens if len(dataset) else ()), mode(model, training=False):
        batches = eval_batches(dataset, batch_size, limit, group.rank(), group.size())
        if prefix is not None:
            batch_loss, batches = prefix.loss(batch_loss), prefix.eval_batches(batches, batch_size, limit)
        for batch in batches:
            total, count, *rest = batch_loss(model, *(mx.array(array) for array in batch))
            measured = rest[0] if rest else {}
            names = list(measured)
            parts = mx.stack([total, count, *(part for parts in measured.values() for part in parts)])
            sums = sums + np.array(parts, np.float64) if sums.any() else np.array(parts, np.float64)
    if group.size() > 1:
        sums = np.array(mx.distributed.all_sum(mx.array(sums), group=group), np.float64)
    total, count, *rest = sums.tolist()
    measured = dict(zip(names, zip(rest[::2], rest[1::2], strict=True), strict=True))
    tokens, _ = measured.get(TOKENS, (count, None))
    if count == 0:
        raise TrainingError(
            "There is nothing to evaluate: no row of the set has a token to learn.",
            "Check that the set is not empty and that max_seq_length does not cut off every answer.",
        )
    mean = total / count
    perplexity = None if TOKENS in measured else math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, round(tokens), perplexity, time.perf_counter() - tic, means(measured))


def check_rows(dataset: Dataset, loss: str) -> None:
    """Raise a ConfigError if the data set's rows are not of the kind that the loss takes."""
    kind = preference_of(loss).rows
    if (found := getattr(dataset, "kind", ROWS)) != kind:
        raise ConfigError(
            f"The loss {loss!r} takes {_ROWS[kind]}, and the data set has {_ROWS[found]}.",
            f"Give load_dataset or tokenize the argument kind={kind!r}, or set another loss.",
        )


_ROWS = {ROWS: "rows to imitate", PAIRS: "pairs of a chosen and a rejected answer", LABELS: "answers with labels"}
