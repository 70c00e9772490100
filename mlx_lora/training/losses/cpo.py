"""Losses of pairs without a reference: CPO (arXiv:2401.08417) and SimPO (arXiv:2405.14734)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .answers import cross_entropy_of_chosen, halves, losses_of_tokens, masked_sum, preference, summed


def loss(
    model: nn.Module,
    tokens: Any,
    mask: Any,
    lengths: Any,
    reference: Any,
    *,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
    simpo_gamma: float | None = None,
) -> tuple[mx.array, mx.array, dict]:
    """-log sigmoid(beta log(p of the chosen / p of the rejected answer)) + cpo_alpha * cross entropy of the chosen one.

    With `simpo_gamma` the logarithms are means over an answer's tokens, and `simpo_gamma` is the target margin.
    Arguments and results: see `losses/__init__.py`.
    """
    mask = mx.array(mask)
    losses = losses_of_tokens(model, mx.array(tokens))
    found = -masked_sum(losses, mask, axis=1)
    if simpo_gamma is not None:
        found = found / mx.maximum(mask.sum(axis=1), 1)
    rewards = beta * found
    chosen, rejected = halves(rewards)
    total, count, more = summed(
        preference(chosen - rejected - (simpo_gamma or 0), label_smoothing), mask, rewards, found
    )
    if cpo_alpha:
        of_chosen, reported = cross_entropy_of_chosen(halves(losses)[0], halves(mask)[0], count)
        total, more = total + cpo_alpha * of_chosen, {**reported, **more}
    return total, count, more


def simpo(model: nn.Module, *batch: Any, simpo_gamma: float, **options: float) -> tuple[mx.array, mx.array, dict]:
    """-log sigmoid(beta (mean log p of the chosen - mean log p of the rejected answer's tokens) - simpo_gamma)."""
    return loss(model, *batch, simpo_gamma=simpo_gamma, **options)
