"""The loss, and its mean over a data set. Sums and counts only: who divides, and when, is decided above."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import is_cpu
from ..errors import TrainingError
from .head import loss_in_chunks
from .reports import Evaluation


def loss_fn(model: nn.Module, tokens: Any, mask: Any) -> tuple[mx.array, mx.array]:
    """The cross entropy of the tokens to be learned, as a sum.

    Args:
        model: maps tokens [B, T] to logits [B, T, vocab].
        tokens: [B, T] integers, right padded. Causal models give every counted position the logits it would have
            unpadded and alone, so a batch's sum is the sum of its rows'.
        mask: [B, T-1] booleans; `mask[:, j]` says whether the target `tokens[:, j+1]` counts.

    Returns: (sum of the losses, float32 []; number of tokens counted, float32 []).
    """
    tokens, mask = mx.array(tokens), mx.array(mask)
    inputs, targets, count = tokens[:, :-1], tokens[:, 1:], mask.astype(mx.float32).sum()
    total = loss_in_chunks(model, inputs, targets, mask, token_losses)
    if total is not None:
        return total, count
    losses = token_losses(model(inputs), targets)
    # `where` and not a product: whatever an uncounted position holds, inf included, must not reach the sum.
    return mx.where(mask, losses, 0).sum(), count


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of each token, in float32. logits: [..., vocab]; targets: [...]. Returns [...].

    `mx.fast.cross_entropy` is one kernel on a GPU, reduces in float32 and keeps no float32 copy of half-precision
    logits. On the CPU it reduces in the dtype of the logits (bfloat16: off by 0.05 nats), so they are widened first.
    """
    if is_cpu():
        logits = logits.astype(mx.float32)
    if hasattr(mx.fast, "cross_entropy"):
        return mx.fast.cross_entropy(logits, targets)
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def evaluate(model: nn.Module, dataset: Any, batch_size: int = 4, limit: int = -1) -> Evaluation:
    """The mean loss of `model` on `dataset`, weighed by tokens; of all processes together where there are several.

    Dropout is off meanwhile; every module is left in the mode (training or not) it was found in. Draws no random
    numbers.

    Args:
        limit: batches to measure at most; -1 for the whole set.
    """
    from ..data import eval_batches

    group = mx.distributed.init()
    tic = time.perf_counter()
    loss, count = 0.0, 0.0
    with mode(model, training=False):
        for batch in eval_batches(dataset, batch_size, limit, group.rank(), group.size()):
            batch_loss, batch_count = loss_fn(model, batch.tokens, batch.mask)
            mx.eval(batch_loss, batch_count)
            loss, count = loss + batch_loss.item(), count + batch_count.item()
    if group.size() > 1:
        loss, count = mx.distributed.all_sum(mx.array([loss, count]), group=group).tolist()
    if count == 0:
        raise TrainingError(
            "There is nothing to evaluate: no row of the set has a token to learn.",
            "Check that the set is not empty and that max_seq_length does not cut off every answer.",
        )
    mean = loss / count
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(mean, round(count), perplexity, time.perf_counter() - tic)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into training or evaluation mode, and afterwards each back into its own."""
    found = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in found:
            module._set_training_mode(was)
