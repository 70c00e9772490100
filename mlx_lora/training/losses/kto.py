"""KTO: answers labelled good or bad, without pairs (arXiv:2402.01306)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .answers import TOKENS, log_probabilities, masked_sum, over_processes


def loss(
    model: nn.Module,
    tokens: Any,
    mask: Any,
    label: Any,
    other_tokens: Any,
    other_mask: Any,
    reference: Any,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[mx.array, mx.array, dict]:
    """1 - sigmoid(beta (r - kl)) for a good answer and 1 - sigmoid(beta (kl - r)) for a bad one, times its weight.

    r is log(p / p_reference), and kl is the mean of r over the batches of all processes, with the answers to other
    prompts. kl has no gradient and is at least 0. Arguments and results: see `losses/__init__.py`.
    """
    mask, label, reference = mx.array(mask), mx.array(label), mx.array(reference)
    there = mask.any(axis=1)
    count = there.astype(mx.float32).sum()
    others = mx.stop_gradient(log_probabilities(model, other_tokens, other_mask))
    found = log_probabilities(model, tokens, mask)
    total, rows = over_processes(masked_sum(others - reference[:, 1], there), count)
    kl = mx.maximum(total / mx.maximum(rows, 1), 0)
    ratios = found - reference[:, 0]
    losses = 1 - mx.sigmoid(beta * mx.where(label, ratios - kl, kl - ratios))
    losses = losses * mx.where(label, desirable_weight, undesirable_weight)
    more = {"kl": (kl * count, count), TOKENS: (mask.astype(mx.float32).sum(), count)}
    for side, chosen in (("chosen", there & label), ("rejected", there & ~label)):
        number = chosen.astype(mx.float32).sum()
        more[f"rewards/{side}"] = (masked_sum(beta * mx.stop_gradient(ratios), chosen), number)
        more[f"logps/{side}"] = (masked_sum(mx.stop_gradient(found), chosen), number)
    return masked_sum(losses, there), count, more
