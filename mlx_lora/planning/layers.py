"""Leaves equal layers out of a model, so that the memory of many layers follows from a trace of few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.modules import layer_paths

_FEW = 8  # layers: up to this many, all are traced
_LONGEST_PERIOD = 8


def repeats(model: nn.Module) -> list[tuple[int, int, int]]:
    """(first layer, layers per period, periods) of each run of layers in which a pattern repeats.

    Layers are equal if their parameters have the same shapes and dtypes, the same parameters are trained, and all other
    attributes are equal.
    """
    layers = _layers(model)
    if layers is None or len(layers[0][layers[1]]) <= _FEW:
        return []
    signs = [_sign(layer) for layer in layers[0][layers[1]]]
    best: list[tuple[int, int, int]] = []
    for period in range(1, _LONGEST_PERIOD + 1):
        found, at = [], 0
        while at + period < len(signs):
            end = at
            while end + period < len(signs) and signs[end] == signs[end + period]:
                end += 1
            count = (end + period - at) // period
            if count > 3:
                found.append((at, period, count))
                at += period * count
            else:
                at += 1
        if _left(found, len(signs)) < _left(best, len(signs)):
            best = found
    return best


@contextmanager
def shortened(model: nn.Module, runs: list[tuple[int, int, int]], counts: list[int]) -> Iterator[None]:
    """A context in which each of ``runs`` has only the given number of periods."""
    if not runs:
        yield
        return
    parent, name = _layers(model)
    before = parent[name]
    kept = list(before)
    for (first, period, periods), count in reversed(list(zip(runs, counts, strict=True))):
        del kept[first + period * count : first + period * periods]
    parent[name] = kept
    try:
        yield
    finally:
        parent[name] = before


def run_modules(model: nn.Module, run: tuple[int, int, int]) -> list[nn.Module]:
    """The modules of the layers of one of ``repeats``, with those inside them."""
    first, period, periods = run
    parent, name = _layers(model)
    return [module for layer in parent[name][first : first + period * periods] for module in layer.modules()]


def frozen_bytes(model: nn.Module, run: tuple[int, int, int]) -> int | None:
    """Bytes of the weights of a period, if ``run`` comes before all that is trained; else None."""
    first, period, periods = run
    parent, name = _layers(model)
    layers, end = parent[name], first + period * periods
    of_layers = [len(tree_flatten(layer.trainable_parameters())) for layer in layers]
    if any(of_layers[:end]) or sum(of_layers) != len(tree_flatten(model.trainable_parameters())):
        return None
    return sum(a.nbytes for layer in layers[first : first + period] for _, a in tree_flatten(layer.parameters()))


def _left(runs: list[tuple[int, int, int]], total: int) -> int:
    return total - sum(period * (periods - 3) for _, period, periods in runs)


def _layers(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module and the attribute that hold the list of layers."""
    paths = layer_paths(model)
    parts = paths[0].split(".")[:-1] if paths else []
    if not parts:
        return None
    parent: Any = model
    for part in parts[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent.get(part)
        if parent is None:
            return None
    found = parent.get(parts[-1]) if isinstance(parent, nn.Module) else None
    return (parent, parts[-1]) if isinstance(found, list) and len(found) == len(paths) else None


def _sign(layer: nn.Module) -> tuple:
    trained = {name for name, _ in tree_flatten(layer.trainable_parameters())}
    arrays = [(name, tuple(a.shape), str(a.dtype), name in trained) for name, a in tree_flatten(layer.parameters())]
    plain, numbers = (bool, int, float, str, type(None)), ("layer_idx", "layer_index", "layer_id")
    facts = []
    for path, module in layer.named_modules():
        own = {**vars(module), **{k: v for k, v in module.items() if not isinstance(v, mx.array)}}
        same = sorted((k, v) for k, v in own.items() if isinstance(v, plain) and k not in numbers)
        facts.append((path, type(module).__name__, *same))
    return (*arrays, repr(facts))
