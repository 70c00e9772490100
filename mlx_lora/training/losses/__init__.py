"""The losses that `TrainConfig.loss` can name. A new one is a file in this folder and a row of `LOSSES`.

A loss is a function `loss(model, *batch) -> (sum, count)` of a batch's arrays, in the order of its fields. It names
the kinds of batches that it takes by its arguments:

    model   maps tokens [B, T] to logits [B, T, vocab]
    tokens  [B, T] int32, padded on the right with 0
    mask    [B, T-1] bool: whether the target `tokens[:, j+1]`, predicted at position j, is learned
    segments  [B, T] int32, of packed batches only: equal for the tokens of one row, which attend to each other alone
    sum     float32 []: the loss summed over what it counts, not their mean
    count   float32 []: how many were counted (tokens, or whatever the loss is a mean of)

The trainer divides: it adds sums and counts over the batches of an optimizer step and over all processes. The trainer
also compiles the function, so that it must be made of MLX operations and may not look at values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import mlx.core as mx

from ...errors import ConfigError
from . import cross_entropy

Loss = Callable[..., tuple[mx.array, mx.array]]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy.loss,
}


def loss_named(name: str) -> Loss:
    """The row `name` of `LOSSES`. Raises: ConfigError."""
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}.", f"Set loss to one of: {', '.join(LOSSES)}.")
    return LOSSES[name]


def check_takes_packed(name: str) -> None:
    """Raise a ConfigError for a loss that has no argument `segments`."""
    if "segments" not in inspect.signature(loss_named(name)).parameters:
        raise ConfigError(f"pack: the loss {name!r} does not take packed rows", "Leave --pack out.")
