"""Losses of pairs that compare with a reference: DPO (arXiv:2305.18290) and IPO (arXiv:2310.12036)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .answers import halves, log_probabilities, preference, summed


def loss(
    model: nn.Module, tokens: Any, mask: Any, lengths: Any, reference: Any, *, beta: float, label_smoothing: float
) -> tuple[mx.array, mx.array, dict]:
    """-log sigmoid(reward of the chosen - reward of the rejected answer); a reward is beta log(p / p_reference).

    With `label_smoothing` s (conservative DPO) the loss is (1 - s) times that, plus s times the loss of the swapped
    pair. TRL 1.16 ignores s with its loss type "sigmoid", which is this loss, and uses it in "robust", "exo_pair" and
    "aot", which are other losses. Arguments and results: see `losses/__init__.py`.
    """
    mask = mx.array(mask)
    found = log_probabilities(model, tokens, mask)
    rewards = beta * (found - mx.array(reference))
    chosen, rejected = halves(rewards)
    return summed(preference(chosen - rejected, label_smoothing), mask, rewards, found)


def ipo(
    model: nn.Module, tokens: Any, mask: Any, lengths: Any, reference: Any, *, beta: float
) -> tuple[mx.array, mx.array, dict]:
    """(difference of log(p / p_reference) - 1 / (2 beta))^2, with logarithms averaged over an answer's tokens."""
    mask = mx.array(mask)
    found = log_probabilities(model, tokens, mask)
    ratios = found - mx.array(reference)
    chosen, rejected = halves(ratios / mx.maximum(mask.sum(axis=1), 1))
    return summed((chosen - rejected - 1 / (2 * beta)).square(), mask, beta * ratios, found)
