"""The mean loss of a model on a data set."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..data import Dataset, eval_batches
from ..errors import TrainingError
from .losses import loss_named
from .reports import Evaluation


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 4,
    limit: int = -1,
    loss: str = "cross_entropy",
    prefix: Any = None,
) -> Evaluation:
    """The mean loss of `model` on `dataset`: the sum over all batches and processes, divided by the count.

    Dropout is off meanwhile. Afterwards every module is in the mode (training or evaluation) that it had before. No
    random numbers are drawn.

    Args:
        limit: batches to measure at most; -1 for the whole set.
        loss: a name in `LOSSES`.
        prefix: the open `FrozenPrefix` of this model that keeps the states of `dataset`.

    Raises: TrainingError where there is nothing to measure. ConfigError for an unknown loss.
    """
    batch_loss = loss_named(loss)
    group = mx.distributed.init()
    tic = time.perf_counter()
    total, count = 0.0, 0.0
    with mode(model, training=False):
        batches = eval_batches(dataset, batch_size, limit, group.rank(), group.size())
        if prefix is not None:
            batch_loss, batches = prefix.loss(batch_loss), prefix.eval_batches(batches, batch_size, limit)
        for batch in batches:
            sums = batch_loss(model, *(mx.array(array) for array in batch))
            mx.eval(sums)
            total, count = total + sums[0].item(), count + sums[1].item()
    if group.size() > 1:
        total, count = mx.distributed.all_sum(mx.array([total, count]), group=group).tolist()
    if count == 0:
        raise TrainingError(
            "There is nothing to evaluate: no row of the set has a token to learn.",
            "Check that the set is not empty and that max_seq_length does not cut off every answer.",
        )
    mean = total / count
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, round(count), perplexity, time.perf_counter() - tic)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into training or evaluation mode; on exit each gets its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module._set_training_mode(was)
