"""The peak memory of a training step, from a trace of the step on arrays that are never computed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..base.modes import mode
from ..base.modules import dims, kind
from ..config import TrainConfig
from ..fast.swap import traced_only
from ..training.losses import loss_named
from ..training.optimizers import MasterWeights
from ..training.recompute import recomputed_layers
from ..training.step import Step
from .custom_vjps import trace_with_vjps
from .graph import Graph, fuse
from .memory import Peak, Queue, peak_of


def stand_in(array: mx.array) -> mx.array:
    """An array of the same shape and dtype that takes no memory."""
    return mx.broadcast_to(mx.zeros((), array.dtype), array.shape)


@dataclass(frozen=True)
class Parts:
    """The parts of the peak, in bytes."""

    weights: int  # frozen parameters, with a CPU's float32 copies of quantized ones
    adapter: int  # trained parameters: current and initial values
    optimizer: int  # its state, and the sums of gradients between its steps
    logits: int
    activations: int  # also gradients and everything else that a step computes
    peak: int
    kept: int = 0  # output of frozen layers, with ``cache_prefix`` "memory"

    def __add__(self, other: Parts) -> Parts:
        return Parts(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Parts) -> Parts:
        return Parts(*map(operator.sub, astuple(self), astuple(other)))

    def __mul__(self, times: float) -> Parts:
        return Parts(*(round(part * times) for part in astuple(self)))


class Traced:
    """Traces steps on ``model``, whose arrays need not be evaluated. The model keeps them.

    Args:
        updates: earlier traces of the optimizer's part of a step, which does not depend on the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[], opt.Optimizer],
        config: TrainConfig,
        queue: Queue,
        updates: dict[tuple, _Found] | None = None,
    ):
        self.model, self.make, self.config, self.queue = model, make, config, queue
        self._updates = {} if updates is None else updates
        self._kept_for: set[int] = set()  # modules, by id, for which the model keeps arrays

    def keeps_for(self, modules: Iterable[nn.Module]) -> bool:
        """Whether a traced step kept arrays of one of ``modules`` between calls, such as copies of weights."""
        return not self._kept_for.isdisjoint(map(id, modules))

    def parts(self, *batch: mx.array) -> Parts:
        """The peak of a step on a batch of such arrays, after the first step of a run."""
        with _restored(self.model), mode(self.model, training=True), _checkpointing(self.model, self.config):
            trained = dict(tree_flatten(self.model.trainable_parameters()))
            weights = {p: a for p, a in tree_flatten(self.model.parameters()) if p not in trained}
            optimizer = MasterWeights(self.make())
            optimizer.init(trained)
            step = Step(
                self.model,
                optimizer,
                loss=loss_named(self.config.loss, self.config.preference_options()),
                seed=0,
                fused=self.config.grad_accumulation_steps == 1,
                max_grad_norm=self.config.max_grad_norm,
            )
            state = step.state
            first = _bytes(trained)  # the step keeps the parameters that it started with
            if self.config.grad_accumulation_steps == 1:
                sums = {}
                run = step._train_batch_fn
                found = self._peak(run, weights, (trained, state), batch, first)
            else:
                sums = step._nothing
                kept = first + _bytes(sums) + _bytes(state)
                found = self._peak(step._accumulate_fn, weights, (trained, sums), batch, kept)
                kept = first + _bytes(sums) + found.weights
                key = self.config.max_grad_norm, *trained
                if key not in self._updates:
                    self._updates[key] = self._peak(step._update_fn, {}, (trained, state, sums), (), 0)
                update = self._updates[key]
                update = replace(update, peak=replace(update.peak, total=update.peak.total + kept))
                found = max(found, update, key=lambda one: one.peak.total)
            adapter, held, frozen = 2 * first, _bytes(state) + 2 * _bytes(sums), found.weights
            rest = found.peak.total - frozen - adapter - held - found.logits
            return Parts(frozen, adapter, held, found.logits, max(0, rest), found.peak.total)

    def _peak(self, run: Callable, weights: dict, changing: tuple, batch: tuple, resident: int) -> _Found:
        graph, kept = self._graph(run, weights, changing, batch)
        shared = len(weights) - len({id(array) for array in weights.values()})
        count, fixed = len(tree_flatten(changing)), len(weights) - shared + len(kept)
        peak = peak_of(graph, graph.inputs[fixed : fixed + count], resident, self.queue)
        vocabulary = vocabulary_of(self.model)
        wide = [name for name in peak.live if graph.shapes.get(name, ())[-1:] == (vocabulary,)]
        of_weights = sum(graph.bytes(name) for name in graph.inputs[:fixed])
        return _Found(peak, sum(peak.live[name] for name in wide), of_weights)

    def _graph(self, run: Callable, weights: dict, changing: tuple, batch: tuple) -> tuple[Graph, list]:
        """The fused graph of ``run(*changing, *batch)``, and the arrays that the model caches between calls."""
        kept: dict[Any, mx.array] = {}
        flat = [array for _, array in tree_flatten(changing)]
        own = {id(array): array for array in weights.values()}  # several modules may share an array

        known: dict[Any, mx.array] = {}  # their stand-ins in the trace

        def keep(module: nn.Module, name: str, compute: Callable[[], mx.array]) -> mx.array:
            key = id(module), name
            self._kept_for.add(id(module))
            if key not in known:
                known[key] = compute()
                kept[key] = stand_in(known[key])
            return known[key]

        def function(*arrays: mx.array) -> list[mx.array]:
            known.update(zip(kept, arrays, strict=False))
            rest = iter(arrays[len(known) :])
            given = {key: next(rest) for key in own}
            self.model.update(tree_unflatten([(name, given[id(array)]) for name, array in weights.items()]))
            arguments = tree_map(lambda _: next(rest), changing)
            return [array for _, array in tree_flatten(run(*arguments, *rest))]

        inputs = [*map(stand_in, own.values()), *map(stand_in, flat), *batch]
        with traced_only(keep):  # also while the vjps are traced
            graph = trace_with_vjps(function, inputs)
            if kept:  # now that their shapes are known, they become inputs
                known.clear()
                graph = trace_with_vjps(function, [*kept.values(), *inputs])
        fuse(graph)
        return graph, list(kept)


@dataclass(frozen=True)
class _Found:
    peak: Peak
    logits: int  # bytes at the peak
    weights: int  # bytes of frozen inputs


def vocabulary_of(model: nn.Module) -> int:
    """Rows of the largest embedding."""
    return max((dims(m)[0] for m in model.modules() if kind(m) == "embedding"), default=0)


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the parameters of ``model`` on exit, because tracing leaves tracers in them."""
    before = model.parameters()
    try:
        yield
    finally:
        model.update(before)


@contextmanager
def _checkpointing(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    if not config.grad_checkpoint:
        yield
        return
    with recomputed_layers(model):
        yield
