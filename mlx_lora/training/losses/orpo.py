"""ORPO: cross entropy and the odds of the chosen answer in one loss, without a reference (arXiv:2403.07691)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .answers import cross_entropy_of_chosen, halves, log_sigmoid, losses_of_tokens, masked_sum, summed


def loss(
    model: nn.Module, tokens: Any, mask: Any, lengths: Any, reference: Any, *, beta: float
) -> tuple[mx.array, mx.array, dict]:
    """Cross entropy of the prompt and the chosen answer - beta log sigmoid(log of the ratio of both answers' odds).

    p is the geometric mean over an answer's tokens, and the odds are p / (1 - p). Arguments and results: see
    `losses/__init__.py`.
    """
    mask = mx.array(mask)
    losses = losses_of_tokens(model, mx.array(tokens))
    counts = mask.sum(axis=1)
    found = mx.where(counts > 0, -masked_sum(losses, mask, axis=1) / mx.maximum(counts, 1), -1)
    chosen, rejected = halves(found - _log_of_rest(found))
    log_odds = chosen - rejected
    ratio = log_sigmoid(log_odds)
    there = halves(counts > 0)[0]
    pairs = there.astype(mx.float32).sum()
    read = mx.arange(losses.shape[1]) < mx.array(lengths)[:, None] - 1  # all targets but the padding
    of_chosen, more = cross_entropy_of_chosen(halves(losses)[0], halves(read)[0], pairs)
    more["log_odds_ratio"] = (masked_sum(ratio, there), pairs)
    more["log_odds_chosen"] = (masked_sum(log_odds, there), pairs)
    total, count, more = summed(-beta * ratio, mask, beta * found, found, more)
    return total + of_chosen, count, more


def _log_of_rest(x: mx.array) -> mx.array:
    """log(1 - exp(x)) for x < 0, by the exact form: expm1 near 0, else log1p."""
    near = x > -0.6931472
    small, large = mx.where(near, x, -1.0), mx.where(near, -1.0, x)  # so that neither form's gradient is NaN
    return mx.where(near, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))
