"""Shared by the preference losses: log-probabilities of answers, sums over pairs, and their metrics."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..head import loss_in_chunks
from .cross_entropy import token_losses

TOKENS = "tokens"  # key among a loss's metrics: the number of learned tokens


def losses_of_tokens(model: nn.Module, tokens: mx.array) -> mx.array:
    """The cross entropy of each token but the first, in nats. tokens: [B, T]. Returns [B, T-1] float32."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = loss_in_chunks(model, inputs, targets, None, token_losses)
    return token_losses(model(inputs), targets) if found is None else found


def masked_sum(losses: mx.array, mask: mx.array, **options: Any) -> mx.array:
    """The sum of the losses where the mask is True. `where`, not a product: infinity times 0 is not 0."""
    return mx.where(mask, losses, 0).sum(**options)


def log_probabilities(model: nn.Module, tokens: Any, mask: Any) -> mx.array:
    """The log-probability of each answer [B], float32. tokens: [B, T]; mask: [B, T-1], True for its targets."""
    return -masked_sum(losses_of_tokens(model, mx.array(tokens)), mx.array(mask), axis=1)


def halves(array: mx.array) -> tuple[mx.array, mx.array]:
    """The chosen and the rejected answers of a batch of pairs."""
    return array[: array.shape[0] // 2], array[array.shape[0] // 2 :]


def log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, mx.array(0.0, x.dtype))


def preference(margin: mx.array, label_smoothing: float) -> mx.array:
    """-log of the probability that the answer with more reward is better (Bradley-Terry), from the margin of rewards.

    With `label_smoothing`, that share of the pairs is assumed to be swapped.
    """
    return -log_sigmoid(margin) * (1 - label_smoothing) - log_sigmoid(-margin) * label_smoothing


def summed(
    losses: mx.array, mask: mx.array, rewards: mx.array, log_probabilities: mx.array, more: dict | None = None
) -> tuple[mx.array, mx.array, dict[str, tuple[mx.array, mx.array]]]:
    """The result of a loss of pairs: sum, number of pairs, and further metrics.

    Args:
        losses: [B]. mask: [2B, T-1]; pairs with an empty mask are padding and do not count.
        rewards, log_probabilities: [2B], of the chosen and the rejected answers.
        more: further metrics, as sums and counts.
    """
    there = halves(mask.any(axis=1))[0]
    count = there.astype(mx.float32).sum()
    found = {}
    for name, values in (("rewards", rewards), ("logps", log_probabilities)):
        chosen, rejected = halves(mx.stop_gradient(values))
        found[f"{name}/chosen"] = (masked_sum(chosen, there), count)
        found[f"{name}/rejected"] = (masked_sum(rejected, there), count)
    chosen, rejected = halves(mx.stop_gradient(rewards))
    found["rewards/accuracies"] = (masked_sum((chosen > rejected).astype(mx.float32), there), count)
    found |= {name: tuple(mx.stop_gradient(part) for part in parts) for name, parts in (more or {}).items()}
    found[TOKENS] = (mask.astype(mx.float32).sum(), count)
    return masked_sum(losses, there), count, found


def over_processes(*sums: mx.array) -> list[mx.array]:
    """The sums [] added up over all processes, as constants."""
    stacked = mx.stop_gradient(mx.stack(sums))
    group = mx.distributed.init()
    if group.size() > 1:
        stacked = mx.distributed.all_sum(stacked, group=group)
    return [stacked[k] for k in range(len(sums))]


def cross_entropy_of_chosen(losses: mx.array, mask: mx.array, pairs: mx.array) -> tuple[mx.array, dict]:
    """The mean cross entropy over the tokens of all processes, times the number of pairs, by which the trainer divides.

    Args:
        losses: [B, T-1]. mask: [B, T-1], the tokens that count. pairs: [], of this process.

    Returns: the product [], and the mean to report.
    """
    count = mask.astype(mx.float32).sum()
    tokens, all_pairs = over_processes(count, pairs)
    total = masked_sum(losses, mask)
    return all_pairs * total / mx.maximum(tokens, 1), {"nll_loss": (total, count)}
