"""The output of frozen layers, computed once for each row and kept (`cache_prefix`).

With adapters on the last layers only, the embedding and the layers before them never change, so neither does the input
of the first trained layer for a row. The class of the last frozen layer is replaced by one that returns kept states
instead of its own output. The model's own code still builds the frozen layers, but nothing reads their result, so MLX
never computes it. Masks, caches and random keys are made as always.

A matrix product rounds by its shape: a row's states differ in the last bit if the batch is padded to another width,
but not with the row's place in the batch or with the other rows. So states are kept for each pair of (row, width) on a
CPU, and every loss has the same bits as without the option. On a GPU (`exact=False`) one width serves for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..data import Dataset
from ..data.batches import batches_per_epoch, eval_rows
from ..device import is_cpu
from .prefix_checks import check_model
from .prefix_states import MemoryStates
from .seam import Seam

_EPOCHS = 20  # epochs to simulate for the size; later epochs rarely need other widths


class FrozenPrefix:
    """The frozen layers before the first trained one, and the states that they compute.

    Args:
        train_set, valid_set: the rows whose states are kept.
        states: where to keep them: `MemoryStates` (the default) or `FileStates`; may be set later.
        exact: keep states for each width; None: on a CPU.

    Raises: ConfigError if no layer before the first trained one is frozen, if trained parameters act before it, or if
        later layers read more of the frozen layers than the last one's output.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset,
        valid_set: Dataset | None = None,
        *,
        states: Any = None,
        exact: bool | None = None,
    ):
        self.states = MemoryStates() if states is None else states
        self.exact = is_cpu() if exact is None else exact
        self._model, self._sets = model, (train_set, valid_set)
        self.count, self.layers, self.probe = check_model(model, train_set)
        self._seam = Seam(self.layers[self.count - 1])
        random = {"inputs": mx.random.state, "outputs": mx.random.state}  # gradient checkpointing draws keys
        self._compiled = mx.compile(self._record, **random)

    @contextmanager
    def on(self) -> Iterator[None]:
        """While the context is open, the last frozen layer can return kept states; on exit it has its own class again.

        On exit the states are closed; those in memory are freed.
        """
        try:
            with self._seam.open():
                yield
        finally:
            self.states.close()

    def loss(self, function: Callable) -> Callable:
        """`function(model, *batch)` as a function of (model, hidden [B, T, D], *batch) that starts from `hidden`."""

        def from_hidden(model: nn.Module, hidden: mx.array, *batch: mx.array):
            with self._seam.given(hidden):
                return function(model, *batch)

        return from_hidden

    def train_batches(self, batches: Iterator[Any], batch_size: int, seed: int, start: int) -> Iterator[tuple]:
        """The arrays of `batches` (from `data.train_batches`, starting at `start`), preceded by their hidden states."""
        dataset = self._sets[0]
        epoch, skip = divmod(start, batches_per_epoch(dataset, batch_size))
        while True:
            upcoming = dataset.epoch(batch_size, seed, epoch)[skip:]
            waiting: dict[int, list[int]] = {}  # by width: rows of this epoch without states, in reverse order
            for rows in reversed(upcoming):
                waiting.setdefault(dataset.width(rows), []).extend(int(row) for row in rows[::-1])
            for rows in upcoming:
                arrays = tuple(mx.array(array) for array in next(batches))
                yield self._hidden(0, rows, arrays[0], waiting, self._compiled), *arrays
            epoch, skip = epoch + 1, 0

    def eval_batches(self, batches: Iterator[Any], batch_size: int, limit: int) -> Iterator[tuple]:
        """The same for `data.eval_batches` of the validation set."""
        for rows, batch in zip(eval_rows(self._sets[1], batch_size, limit), batches, strict=True):
            arrays = tuple(mx.array(array) for array in batch)
            yield self._hidden(1, rows, arrays[0], {}, self._record), *arrays

    def expected(self, batch_size: int, seed: int, iters: int, val_batches: int) -> tuple[int, float | None]:
        """The size and the use of a run's kept states.

        Returns: (approximate bytes, the share of rows read after the first epoch whose states are kept; None if the
            run ends within its first epoch).
        """
        tokens, reused = kept_tokens(*self._sets, self.exact, batch_size, seed, iters, val_batches)
        return tokens * self.probe.shape[-1] * self.probe.itemsize, reused

    def _record(self, tokens: mx.array) -> mx.array:
        """The output of the last frozen layer [B, T, D] for `tokens` [B, T]."""
        with self._seam.recording() as seen:
            self._model(tokens)
        return seen[0]

    def _hidden(self, which: int, rows: np.ndarray, tokens: mx.array, waiting: dict, compute: Callable) -> mx.array:
        """The states [B, T - 1, D] of a batch of `rows` with these `tokens` [B, T]; computes those that are missing."""
        dataset, (size, width) = self._sets[which], tokens.shape
        kept_for = width if self.exact else 0
        found = [self.states.get((which, int(row), kept_for)) for row in rows]
        if missing := [int(row) for row, states in zip(rows, found, strict=True) if states is None]:
            missing += self._also_missing(which, missing, waiting.get(width, []), kept_for, size)
            computed = self._compute(dataset, missing, size, width, compute)
            for row, states in computed.items():
                self.states.put((which, row, kept_for), states)
            found = [computed[int(r)] if s is None else s for r, s in zip(rows, found, strict=True)]
        # Where a row ends, its last state is repeated: zeros would divide by zero in a norm without an epsilon.
        hidden = np.empty((size, width - 1, found[0].shape[-1]), found[0].dtype)
        for k in range(size):
            states = found[min(k, len(found) - 1)]
            hidden[k, : len(states)], hidden[k, len(states) :] = states, states[-1]
        return mx.array(hidden).view(self.probe.dtype)

    def _also_missing(self, which: int, missing: list, waiting: list, kept_for: int, size: int) -> list[int]:
        """Missing rows of later batches of this width, which fill up the batch to be computed."""
        also: list[int] = []
        while waiting and len(missing) + len(also) < size:
            row = waiting.pop()
            if row not in missing and row not in also and (which, row, kept_for) not in self.states:
                also.append(row)
        return also

    def _compute(self, dataset: Dataset, rows: list[int], size: int, width: int, compute: Callable) -> dict:
        """The states of each row [len - 1, D], computed in the shape of the batch; half precision as integers."""
        tokens = np.zeros((size, width - 1), np.int32)
        for k, row in enumerate(rows):
            inputs = dataset[row].tokens[: width - 1]
            tokens[k, : len(inputs)] = inputs
        hidden = compute(mx.array(tokens))
        bits = {2: mx.uint16, 4: mx.uint32}[hidden.itemsize]
        states = np.array(hidden.view(bits))
        # A row may have its first token as its only input.
        return {row: states[k, : max(1, len(dataset[row].tokens) - 1)].copy() for k, row in enumerate(rows)}


def kept_tokens(
    train_set: Dataset, valid_set: Dataset | None, exact: bool, batch_size: int, seed: int, iters: int, val_batches: int
) -> tuple[int, float | None]:
    """(approximate number of tokens whose states a run keeps, the share as in `FrozenPrefix.expected`)."""
    pairs: set[tuple[int, int]] = set()
    each, read, new = batches_per_epoch(train_set, batch_size), 0, 0
    for epoch in range(min(-(-iters // each), _EPOCHS)):
        before = len(pairs)
        for rows in train_set.epoch(batch_size, seed, epoch)[: iters - epoch * each]:
            width = train_set.width(rows) if exact else 0
            pairs.update((int(row), width) for row in rows)
            read += len(rows) if epoch else 0
        new += len(pairs) - before if epoch else 0
    tokens = sum(int(train_set.lengths[row]) - 1 for row, _ in pairs)
    if valid_set is not None and len(valid_set) and val_batches:
        tokens += sum(
            int((valid_set.lengths[rows] - 1).sum()) for rows in eval_rows(valid_set, batch_size, val_batches)
        )
    return tokens, 1 - new / read if read else None
