"""``chunked_sum`` and ``chunked_losses``: losses of many tokens without holding all logits in memory.

MLX's own operations only.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import ConfigError
from .registry import with_backward

Losses = Callable[[dict[str, mx.array], mx.array, mx.array], mx.array]


def chunked_sum(
    losses: Losses,
    parameters: dict[str, mx.array],
    hidden: mx.array,
    targets: mx.array,
    mask: mx.array,
    rows: int,
    gradients: bool,
) -> mx.array:
    """The sum of the losses of the unmasked tokens.

    Semantics::

        return mx.where(mask, losses(parameters, hidden, targets), 0).sum()

    Args:
        losses: (parameters, hidden [n, D], targets [n]) -> [n] float32, row by row.
        parameters: the trained parameters of the output head; they and ``hidden`` get gradients.
        hidden: [N, D]. targets: [N]. mask: [N] booleans.
        rows: tokens at a time.
        gradients: whether a backward pass will follow. If so, each piece is differentiated right after its forward
            pass: a gradient [N, D] is kept and nothing is computed twice, where autograd would keep all logits.
    """
    forward = _forward(losses, tuple(parameters), rows, gradients)
    arrays = (hidden, targets, mask, *parameters.values())
    return (with_backward(forward, _backward)(*arrays) if gradients else forward(*arrays))[0]


def chunked_losses(
    losses: Losses, parameters: dict[str, mx.array], hidden: mx.array, targets: mx.array, rows: int
) -> mx.array:
    """The loss of each token [N] float32, whose gradient may then have any weights.

    Semantics::

        return losses(parameters, hidden, targets)

    Args: as for ``chunked_sum``. The backward pass computes the logits a second time, a piece at a time.
    """
    names = tuple(parameters)

    def forward(hidden, targets, *values):
        known, found = dict(zip(names, values, strict=True)), []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            here = mx.depends([hidden[part]], found[-1:])[0] if found else hidden[part]
            found.append(losses(known, here, targets[part]))
        return mx.concatenate(found)

    def backward(primals, cotangent, _):
        hidden, targets, *values = primals
        _, of_hidden, *of_values = _forward(losses, names, rows, True)(hidden, targets, cotangent, *values)
        scaled = [g.astype(v.dtype) for g, v in zip(of_values, values, strict=True)]
        return (of_hidden.astype(hidden.dtype), mx.zeros_like(targets), *scaled)

    return with_backward(forward, backward)(hidden, targets, *parameters.values())


def _forward(losses: Losses, names: tuple[str, ...], rows: int, gradients: bool) -> Callable:
    def piece(values, hidden, targets, mask):
        found = losses(dict(zip(names, values, strict=True)), hidden, targets)
        # `where`, not a product: a masked token's value, which may be inf, must not reach the sum.
        return mx.where(mask != 0, found if mask.dtype == mx.bool_ else mask * found, 0).sum()

    def forward(hidden, targets, mask, *values):
        total, of_hidden, of_values = mx.array(0.0), [], [mx.zeros(v.shape, mx.float32) for v in values]
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            here = hidden[part]
            if of_hidden:  # only after the previous piece, whose logits and head gradients are then freed
                here = mx.depends([here], [total, of_hidden[-1], *of_values])[0]
            elif start:
                here = mx.depends([here], [total])[0]
            arguments = (list(values), here, targets[part], mask[part])
            if gradients:
                loss, (d_values, d_hidden) = mx.value_and_grad(piece, argnums=(0, 1))(*arguments)
                of_hidden.append(d_hidden)
                of_values = [sum_ + d.astype(mx.float32) for sum_, d in zip(of_values, d_values, strict=True)]
            else:
                loss = piece(*arguments)
            total = total + loss
        if not gradients:
            return (total,)
        return (total, mx.concatenate(of_hidden), *of_values)

    return forward


def _backward(primals, cotangents, outputs):
    hidden, targets, mask, *values = primals
    _, of_hidden, *of_values = outputs
    by = cotangents[0]
    of_hidden, *of_values = _once(of_hidden, *of_values)
    scaled = [(by * g).astype(v.dtype) for g, v in zip(of_values, values, strict=True)]
    return ((by * of_hidden).astype(hidden.dtype), mx.zeros_like(targets), mx.zeros_like(mask), *scaled)


def _no_second(primals, cotangents, _):
    raise ConfigError(
        "this loss is computed in chunks, which has no second derivative",
        "Use a smaller batch: a loss over few enough logits is not chunked.",
    )


# The gradients are computed with the loss. Without this error, their own gradient would silently be zero.
_once = with_backward(lambda *gradients: gradients, _no_second)
