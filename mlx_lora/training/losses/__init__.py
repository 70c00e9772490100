"""The losses that `TrainConfig.loss` can name. A new one is a file in this folder and a row of `LOSSES`.

A loss is a function `loss(model, tokens, mask) -> (sum, count)`:

    model   maps tokens [B, T] to logits [B, T, vocab]
    tokens  [B, T] int32, padded on the right with 0
    mask    [B, T-1] bool: whether the target `tokens[:, j+1]`, predicted at position j, is learned
    sum     float32 []: the loss summed over what it counts, not their mean
    count   float32 []: how many were counted (tokens, or whatever the loss is a mean of)

The trainer divides: it adds sums and counts over the batches of an optimizer step and over all processes. The trainer
also compiles the function, so that it must be made of MLX operations and may not look at values.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ...errors import ConfigError
from . import cross_entropy

Loss = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy.loss,
}


def loss_named(name: str) -> Loss:
    """The row `name` of `LOSSES`. Raises: ConfigError."""
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}.", f"Set loss to one of: {', '.join(LOSSES)}.")
    return LOSSES[name]
