"""Track the adapter of each row through mlx-lm's continuous batching.

mlx-lm's batches merge, extend, filter and extract the objects of a prompt cache. One more object in each row's cache
list says which adapter the row uses, so that it stays with the row while rows join and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class AdapterRows:
    """The names of the adapters of a batch's rows, with the methods of mlx-lm's batch caches."""

    def __init__(self, names: Sequence[Any]):
        self.names = list(names)

    def merge(self, caches: Sequence[AdapterRows]) -> AdapterRows:
        return AdapterRows([name for cache in caches for name in cache.names])

    def extend(self, other: AdapterRows) -> None:
        self.names += other.names

    def filter(self, keep: Any) -> None:
        keep = keep.tolist() if isinstance(keep, mx.array) else keep
        self.names = [self.names[index] for index in keep]

    def extract(self, index: int) -> AdapterRows:
        return AdapterRows([self.names[index]])

    def prepare(self, **_: Any) -> None:
        """Rows that are padded keep their adapters."""

    def finalize(self) -> None:
        """See ``prepare``."""

    @property
    def state(self) -> list:
        return []

    @property
    def nbytes(self) -> int:
        return 0


class RowModel(nn.Module):
    """The model that mlx-lm's batches call: it removes the last object of the caches, and selects each row's adapter.

    Args:
        choose: called before each forward pass with the names of the rows' adapters.
    """

    def __init__(self, model: nn.Module, choose: Callable[[list], None]):
        super().__init__()
        # Not stored as attributes, so that the model's parameters do not become parameters of this module.
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_choose", choose)

    @property
    def layers(self) -> Any:
        return self._model.layers

    def __call__(self, tokens: mx.array, cache: list, **options: Any) -> mx.array:
        *own, rows = cache
        self._choose(rows.names)
        return self._model(tokens, cache=own, **options)
