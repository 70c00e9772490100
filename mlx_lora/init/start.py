"""The starts that a config asks for, layer by layer: which of ``initialisation`` makes them, how they enter a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapter import explicit_config, raise_faults
from ..base.modules import dense_weight, dims, kind
from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError
from ..layers import AdapterLayer
from . import FROM_DATA, eva, from_weight, loftq_pair, lora_ga
from .eva import RHO, TAU


def starts_of(
    model: nn.Module,
    config: AdapterConfig,
    chosen: dict[str, nn.Module],
    ranks: dict[str, int],
    batches: Iterable | None,
    reference: nn.Module | None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A [.., r, in], B [.., out, r]) of the layers that do not start as they are made."""
    init, scales = config.init, {path: config.scale_of(path) for path in chosen}
    if (reference is not None) != (init == "loftq"):
        raise ConfigError(
            "init 'loftq' and a reference model belong together",
            "Name the model before quantizing, or make base and adapter by mlx-lora quantize --loftq-rank.",
        )
    if init == "default" or not chosen:
        return {}
    if init in FROM_DATA and batches is None:
        raise ConfigError(f"init {init!r} looks at data", "attach(model, config, batches).")
    limited = ("linear",) if init in FROM_DATA else ("linear", "switch")
    others = [
        f"{path}: init {init} does not start {kind(m)} layers" for path, m in chosen.items() if kind(m) not in limited
    ]
    if init != "gaussian":
        raise_faults(others, "Leave them out: name the modules to adapt with --keys.")
    if init == "eva":
        found = eva(
            model,
            chosen,
            ranks,
            _first(batches, config.init_batches or 32),
            config.eva_rho or RHO,
            config.eva_tau or TAU,
        )
        outs = {path: dims(module)[1] for path, module in chosen.items()}
        return {p: (e.a, np.zeros((outs[p], e.rank), np.float32)) for p, e in found.items() if e.rank}
    if init == "lora_ga":
        return lora_ga(model, chosen, ranks, _first(batches, config.init_batches or 8))
    starts, original = {}, dict(reference.named_modules()) if reference is not None else {}
    for path, module in chosen.items():
        weight = np.array(dense_weight(module))
        if init == "loftq":
            whole = original.get(path)
            if whole is None or kind(whole) != kind(module) or dims(whole) != dims(module):
                raise AdapterError(
                    f"{path}: the reference model has no such layer",
                    "Name the same model as it was before it was quantized.",
                )
            starts[path], _ = loftq_pair(
                np.array(dense_weight(whole)), lambda _, q=weight: q, ranks[path], scales[path]
            )
        else:
            if kind(module) == "embedding":
                weight = weight.T  # lora_a is of the vocabulary
            starts[path] = from_weight(init, weight, ranks[path], scales[path])
    return starts


def _first(batches: Iterable, count: int) -> Iterator:
    yield from itertools.islice(batches, count)


def start_layer(layer: AdapterLayer, a: np.ndarray, b: np.ndarray) -> None:
    """Put a pair A [.., r, in], B [.., out, r] into a layer, in the layer's own layout."""
    if a.ndim == 2:
        a, b = a.T, b.T
    a, b = mx.array(np.ascontiguousarray(a)), mx.array(np.ascontiguousarray(b))
    if hasattr(layer, "start_from"):
        layer.start_from(a, b)
    else:
        layer.lora_a, layer.lora_b = a.astype(layer.lora_a.dtype), b.astype(layer.lora_b.dtype)


def with_ranks(config: AdapterConfig, before: dict[str, int], ranks: dict[str, int]) -> AdapterConfig:
    """``config`` with these ranks; alpha grows with a rank, so that gradients keep their size (PEFT's rule)."""
    scales = {}
    for path, rank in ranks.items():
        grown = math.sqrt(rank / before[path]) if config.rslora else 1.0
        scales[path] = config.scale_of(path) * grown
    return replace(explicit_config(config, ranks, scales), init=config.init, keys=config.keys)
