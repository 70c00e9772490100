"""Check whether the frozen layers' output can be kept: settings, trained parameters, and a measurement on one row."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..base.forward_paths import check_trainable
from ..base.modes import mode
from ..base.modules import layer_paths
from ..errors import ConfigError
from .losses import loss_named
from .seam import Seam, skipped

HINT = "Leave --cache-prefix out (in Python cache_prefix='none'): the losses are the same without it."
_MOST = 64  # tokens of the row


def check_settings(loss: str, processes: int) -> None:
    """Refuse several processes, and losses that do not read each row once. Raises: ConfigError."""
    faults = []
    arguments = inspect.signature(loss_named(loss)).parameters.values()
    if [argument.name for argument in arguments if argument.default is argument.empty] != ["model", "tokens", "mask"]:
        faults.append(f"cache_prefix: the loss {loss!r} does not read each row once")
    if processes > 1:
        faults.append(
            f"cache_prefix: each of {processes} processes reads other rows in every epoch, so few kept states would "
            "be used"
        )
    if faults:
        raise ConfigError("\n".join(faults), HINT)


def check_model(model: nn.Module, rows: Any) -> tuple[int, list[nn.Module], mx.array]:
    """The frozen layers before the first one with trained parameters.

    Returns: (their number, all layers, their output for the first row of `rows` [1, T, D]).

    Raises: ConfigError.
    """
    count, layers = frozen_layers(model), list(model.layers)
    return count, layers, _measure(model, layers, count, rows)


def frozen_layers(model: nn.Module) -> int:
    """The number of layers before the first one with trained parameters.

    Raises: ConfigError if there are none, or if their output changes; ModelError, see `check_trainable`.
    """
    check_trainable(model)
    layers, paths = list(model.layers), layer_paths(model)
    trained = [path for path, _ in tree_flatten(model.trainable_parameters())]
    index = {path: next((i for i, p in enumerate(paths) if path.startswith(p + ".")), None) for path in trained}
    count = min((i for i in index.values() if i is not None), default=len(layers))
    if count == 0:
        raise ConfigError(
            "cache_prefix: the first layer is trained, so there are no frozen layers before it.",
            f"Train the last layers only, with --num-layers below {len(layers)}, or leave --cache-prefix out.",
        )
    if early := [p for p, i in index.items() if i is None and _in_embedding(model, p)]:
        raise ConfigError(f"cache_prefix: the input of every layer changes with the trained {', '.join(early)}.", HINT)
    if any(isinstance(m, nn.Dropout) and m._p_1 < 1 for layer in layers[:count] for m in layer.modules()):
        raise ConfigError("cache_prefix: the frozen layers have dropout, which is random for each batch.", HINT)
    return count


def _measure(model: nn.Module, layers: list[nn.Module], count: int, rows: Any) -> mx.array:
    """Compare one row both ways; return the states. Raises: ConfigError."""
    name = getattr(model, "model_type", None) or type(model).__name__
    tokens = mx.array(np.asarray(rows[0].tokens[:_MOST], np.int32))[None]
    seam = Seam(layers[count - 1])
    with mode(model, training=False), seam.open():
        with seam.recording() as seen:
            plain = model(tokens)
        if (
            len(seen) != 1
            or not isinstance(seen[0], mx.array)
            or seen[0].ndim != 3
            or seen[0].shape[1] != tokens.shape[1]
        ):
            raise ConfigError(f"cache_prefix: the layers of {name} do not pass on one hidden state per token.", HINT)
        hidden = seen[0]
        mx.eval(plain, hidden)
        try:
            with skipped(layers[: count - 1]), seam.given(hidden):
                kept = model(tokens)
                same = mx.array_equal(kept, plain).item()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            same = False
        if not same:
            raise ConfigError(
                f"cache_prefix: the later layers of {name} read more of the first {count} layers than the last one's "
                "output.",
                HINT,
            )
        if not mx.array_equal(_disturbed(model, tokens, seam), hidden).item():
            raise ConfigError(f"cache_prefix: trained parameters of {name} act in the first {count} layers.", HINT)
    return hidden


def _disturbed(model: nn.Module, tokens: mx.array, seam: Seam) -> mx.array:
    """The states, computed with other values of the trained parameters."""
    before = model.trainable_parameters()
    try:
        model.update(tree_map(lambda p: p + 1, before))
        with seam.recording() as seen:
            model(tokens)
        mx.eval(seen)
        return seen[0]
    finally:
        model.update(before)


def _in_embedding(model: nn.Module, path: str) -> bool:
    """Whether a parameter belongs to an embedding, or to an adapter on one."""
    module: Any = model
    for part in path.split("."):
        if isinstance(module, nn.Module) and (hasattr(module, "as_linear") or isinstance(module, nn.Embedding)):
            return True
        module = module[int(part)] if isinstance(module, list) else module[part]
    return False
