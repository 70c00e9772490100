"""The losses that `TrainConfig.loss` can name. A new one is a file in this folder and a row of `LOSSES`.

A loss is a function `loss(model, *batch) -> (sum, count)` of a batch's arrays, in the order of its fields. It names
the kinds of batches that it takes by its arguments:

    model   maps tokens [B, T] to logits [B, T, vocab]
    tokens  [B, T] int32, padded on the right with 0
    mask    [B, T-1] bool: whether the target `tokens[:, j+1]`, predicted at position j, is learned
    segments  [B, T] int32, only in packed batches: equal for the tokens of one row, which attend only to each other
    lengths, reference   of batches of pairs, see `data.preferences.PairBatch`
    label, other_tokens, other_mask, reference   of batches of labelled answers, see `data.preferences.LabelBatch`
    sum     float32 []: the loss as a sum over counted units, not a mean
    count   float32 []: the number of these units (tokens, pairs or answers)

The trainer adds sums and counts over the batches of an optimizer step and over all processes, and divides. It also
compiles the function, so the function must consist of MLX operations and cannot read values.

A loss may return a third value, `{name: (sum, count)}`: further metrics, reported as means. `TOKENS` holds the number
of learned tokens if the loss counts something else. The options of a preference loss are in its row of
`config.PREFERENCES`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ...errors import ConfigError
from . import cpo, cross_entropy, dpo, kto, orpo
from .answers import TOKENS as TOKENS

Loss = Callable[..., tuple[mx.array, mx.array] | tuple[mx.array, mx.array, dict]]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy.loss,
    "dpo": dpo.loss,
    "ipo": dpo.ipo,
    "orpo": orpo.loss,
    "kto": kto.loss,
    "simpo": cpo.simpo,
    "cpo": cpo.loss,
}


def loss_named(name: str, options: dict[str, Any] | None = None) -> Loss:
    """The row `name` of `LOSSES`, with its options. Raises: ConfigError."""
    if name not in LOSSES:
        raise ConfigError(f"There is no loss {name!r}.", f"Set loss to one of: {', '.join(LOSSES)}.")
    return functools.partial(LOSSES[name], **options) if options else LOSSES[name]


def means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The means of a loss's further metrics, from sums and counts; a metric with count 0 is left out.

    The margin is the mean reward of the good answers minus that of the bad ones; with pairs this is the mean
    difference.
    """
    found = {name: total / count for name, (total, count) in sums.items() if count and name != TOKENS}
    if {"rewards/chosen", "rewards/rejected"} <= set(found):
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def check_takes_packed(name: str) -> None:
    """Raise a ConfigError for a loss that has no argument `segments`."""
    if "segments" not in inspect.signature(loss_named(name)).parameters:
        raise ConfigError(f"pack: the loss {name!r} does not take packed rows", "Leave --pack out.")
