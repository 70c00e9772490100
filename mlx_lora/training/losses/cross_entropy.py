"""The cross entropy of the next token, the loss of ordinary fine-tuning."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...device import is_cpu
from ..head import loss_in_chunks
from ..packed_cache import packed_cache


def loss(model: nn.Module, tokens: Any, mask: Any, segments: Any = None) -> tuple[mx.array, mx.array]:
    """The cross entropy of the learned tokens, in nats, as a sum, and the number of these tokens.

    Arguments and results: see `losses/__init__.py`. Padding changes nothing, because the models are causal, and neither
    does packing (`segments`): the sum of a batch is the sum of its rows.
    """
    tokens, mask = mx.array(tokens), mx.array(mask)
    inputs, targets, count = tokens[:, :-1], tokens[:, 1:], mask.astype(mx.float32).sum()
    options = {} if segments is None else {"cache": packed_cache(model, mx.array(segments)[:, :-1])}
    total = loss_in_chunks(model, inputs, targets, mask, token_losses, **options)
    if total is not None:
        return total, count
    losses = token_losses(model(inputs, **options), targets)
    # `where`, not a product: infinity times 0 is not 0.
    return mx.where(mask, losses, 0).sum(), count


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """The cross entropy of each token, in float32. logits: [..., vocab]; targets: [...]. Returns [...].

    `mx.fast.cross_entropy` is one kernel on a GPU, reduces in float32 and makes no float32 copy of half-precision
    logits. On the CPU it reduces in the dtype of the logits (bfloat16: off by 0.05 nats), so they are converted to
    float32 first.
    """
    if is_cpu():
        logits = logits.astype(mx.float32)
    if hasattr(mx.fast, "cross_entropy"):
        return mx.fast.cross_entropy(logits, targets)
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
