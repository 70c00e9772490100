"""One optimizer step as pure, compiled functions of arrays. Loops, reports and files are the trainer's.

With one batch in a step, everything is one compiled function. With more, there are two: `accumulate` (traced once for
each shape of batch) and `update` (traced once). The frozen parameters are constants of the graph: they are neither
copied nor returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from .losses import TOKENS, Loss
from .optimizers import MasterWeights


class Outcome(NamedTuple):
    """The result of one batch. grad_norm and finite are None if the batch did not complete an optimizer step."""

    loss: float  # summed over the units that the loss counts, such as the learned tokens of the batch
    count: int  # number of these units
    tokens: int  # learned tokens
    grad_norm: float | None = None  # of the mean gradient, before clipping
    finite: bool | None = None  # False: the optimizer step was skipped
    measured: Mapping[str, tuple[float, float]] = MappingProxyType({})  # the loss's further metrics: sums and counts


class Step:
    """Trains the trainable parameters of `model`, batch by batch.

    Between calls the model holds the current parameters. After a failure, `settle` restores them.

    The random numbers of an iteration depend only on (seed, iteration, rank), because `run` seeds MLX's random state
    with these. So a resumed run draws the same numbers as an uninterrupted one, and draws by the caller between two
    iterations do not change the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MasterWeights,
        *,
        loss: Loss,
        seed: int,
        fused: bool,
        max_grad_norm: float | None = None,
        group: Any = None,
    ):
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._seed, self._max_norm = seed, max_grad_norm
        self._group = group if group is not None and group.size() > 1 else None
        self._template = model.trainable_parameters()
        self.parameters: dict[str, mx.array] = dict(tree_flatten(self._template))
        self.state = optimizer.state
        if not fused:
            zeros = {path: mx.zeros(p.shape, mx.float32) for path, p in self.parameters.items()}
            self._nothing = {"gradients": zeros, "loss": mx.array(0.0), "tokens": mx.array(0.0)}
        self._sums: dict[str, Any] | None = None
        self._fused = fused
        self._batch: mx.array | None = None  # loss and count of the current batch, then sums and counts of `_names`
        self._names: list[str] = []  # the loss's further metrics
        self._step: mx.array | None = None  # [gradient norm, finite] of the current step
        # The random state is an output so that no tracer stays in it; `run` seeds it before every call.
        random = {"inputs": mx.random.state, "outputs": mx.random.state}
        self._train_batch = mx.compile(self._train_batch_fn, **random)
        self._accumulate = mx.compile(self._accumulate_fn, **random)
        self._update = mx.compile(self._update_fn)

    def run(self, iteration: int, *batch: mx.array, ends_window: bool) -> None:
        """Start computing a batch (the loss's arguments after the model); `outcome` waits for the result."""
        size, rank = (self._group.size(), self._group.rank()) if self._group else (1, 0)
        mx.random.seed((self._seed << 32) | (iteration * size + rank))
        if self._fused:
            self.parameters, self.state, self._batch, self._step = self._train_batch(
                self.parameters, self.state, *batch
            )
        else:
            sums = self._sums or self._nothing
            self._sums, self._batch = self._accumulate(self.parameters, sums, *batch)
        self.settle()
        if ends_window and not self._fused:
            self.flush()
        mx.async_eval(self.parameters, self.state, self._sums or {}, self._batch)

    def flush(self) -> None:
        """Start the optimizer step on the batches accumulated so far."""
        self.parameters, self.state, self._step = self._update(self.parameters, self.state, self._sums)
        self._sums = None
        self.settle()

    def outcome(self) -> Outcome:
        """Wait for the started computation, and return its result."""
        loss, count, *rest = self._batch.tolist() if self._batch is not None else (0.0, 0)
        norm, finite = self._step.tolist() if self._step is not None else (None, None)
        self._batch = self._step = None
        measured = dict(zip(self._names, zip(rest[::2], rest[1::2], strict=True), strict=False))
        tokens, _ = measured.pop(TOKENS, (count, None))
        return Outcome(loss, round(count), round(tokens), norm, None if finite is None else bool(finite), measured)

    def settle(self) -> None:
        """Put the current arrays into the model and the optimizer; tracing leaves tracers in them."""
        self._put(self.parameters)
        self._optimizer.state = self.state

    @property
    def pending(self) -> dict[str, mx.array]:
        """The sums of the incomplete accumulation window, flattened; empty between windows."""
        return dict(tree_flatten(self._sums or {}))

    def restore(self, parameters: dict[str, mx.array], pending: dict[str, mx.array]) -> None:
        """Continue from these parameters, the optimizer's own state, and the sums of an incomplete window."""
        self.parameters, self.state = dict(parameters), self._optimizer.state
        self._sums = tree_map_with_path(lambda path, _: pending[path], self._nothing) if pending else None
        self.settle()

    def _put(self, parameters: dict[str, mx.array]) -> None:
        self._model.update(tree_map_with_path(lambda path, _: parameters[path], self._template))

    def _all_sum(self, arrays: list[mx.array]) -> list[mx.array]:
        """The sums of `arrays` over all processes."""
        if self._group is None:
            return arrays
        # average_gradients packs small arrays into buckets of 32 MiB: one collective for each bucket.
        return [mean * self._group.size() for mean in average_gradients(arrays, self._group)]

    def _sums_fn(self, parameters, *batch) -> tuple[dict[str, Any], mx.array]:
        """Sums over a batch: float32 gradients of this process, loss and count of all processes; and `_batch`."""

        def objective(parameters):
            self._put(parameters)
            loss, count, *rest = self._loss(self._model, *batch)
            measured = rest[0] if rest else {}
            self._names = list(measured)  # the same in every trace
            return loss, [count, *(part for parts in measured.values() for part in parts)]

        (loss, rest), gradients = mx.value_and_grad(objective)(parameters)
        loss, count, *rest = self._all_sum([loss, *rest])
        gradients = tree_map(lambda g: g.astype(mx.float32), gradients)
        return {"gradients": gradients, "loss": loss, "tokens": count}, mx.stack([loss, count, *rest])

    def _accumulate_fn(self, parameters, sums, *batch):
        new, batch = self._sums_fn(parameters, *batch)
        return tree_map(mx.add, sums, new), batch

    def _train_batch_fn(self, parameters, state, *batch):
        sums, batch = self._sums_fn(parameters, *batch)
        parameters, state, step = self._update_fn(parameters, state, sums)
        return parameters, state, batch, step

    def _update_fn(self, parameters, state, sums):
        """One optimizer step on the mean gradient. Nothing changes if the loss or gradient norm is not finite."""
        count = sums["tokens"]
        totals = self._all_sum(list(sums["gradients"].values()))
        mean = {path: g / mx.maximum(count, 1) for path, g in zip(sums["gradients"], totals, strict=True)}
        norm = mx.sqrt(sum(g.square().sum() for g in mean.values()))
        if self._max_norm is not None:
            shrink = self._max_norm / mx.maximum(norm, self._max_norm)
            mean = {path: g * shrink for path, g in mean.items()}
        finite = mx.isfinite(norm) & mx.isfinite(sums["loss"])
        good = finite & (count > 0)  # without learned tokens there is no update, not even by momentum
        # The optimizer modifies the dicts of its state, so it gets copies of them.
        self._optimizer.state = tree_map(lambda x: x, state)
        updated = self._optimizer.apply_gradients(mean, parameters), self._optimizer.state
        parameters, state = tree_map(lambda new, old: mx.where(good, new, old), updated, (parameters, state))
        return parameters, state, mx.stack([norm, finite.astype(mx.float32)])
