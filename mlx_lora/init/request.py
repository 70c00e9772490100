"""The arguments of all initialisations, as one value."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import mlx.nn as nn
import numpy as np

from ..base.decompositions import Pair
from ..base.modules import dense_weight, dims
from ..config import AdapterConfig


@dataclass(frozen=True)
class Request:
    """What to initialise.

    Args:
        model: the base, without adapters.
        modules: the modules of ``model`` to adapt, by path.
        ranks: of each module.
        batches: with ``tokens`` [B, T] and ``mask`` [B, T-1] (which predictions count).
        reference: the model before quantization.
    """

    model: nn.Module
    config: AdapterConfig
    modules: dict[str, nn.Module]
    ranks: dict[str, int]
    batches: Iterable | None = None
    reference: nn.Module | None = None

    def first_batches(self, default: int) -> Iterator:
        """The first ``config.init_batches`` batches (default: ``default``)."""
        return itertools.islice(self.batches, self.config.init_batches or default)

    def peeked(self) -> tuple[list[int], Request]:
        """(tokens of the batches' first row, or empty; the request with all batches)."""
        batches = iter(self.batches)
        first = list(itertools.islice(batches, 1))
        row = np.array(first[0].tokens)[0].tolist() if first else []
        return row, replace(self, batches=itertools.chain(first, batches))

    def shape(self, path: str) -> tuple[int, ...]:
        """(.., out, in) of the module's update; an embedding is (dim, vocabulary)."""
        module = self.modules[path]
        columns, rows = dims(module)
        return (*((module.num_experts,) if module.weight.ndim == 3 else ()), rows, columns)

    def from_weights(self, pair: Callable[[np.ndarray, int, float], Pair]) -> dict[str, Pair]:
        """``pair(weight [.., out, in], rank, scale)`` for every module."""
        return {
            path: pair(np.array(dense_weight(module)), self.ranks[path], self.config.scale_of(path))
            for path, module in self.modules.items()
        }
