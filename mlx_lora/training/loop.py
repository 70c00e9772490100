"""The loop of a training run: steps, validations and checkpoints, as a generator of reports. See `trainer.train`."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..base.forward_paths import THROUGH_CACHE, as_generated
from ..base.modes import mode
from ..config import TrainConfig
from ..data import Dataset, packed_batches, train_batches
from ..device import memory_limits
from ..errors import MLXLoRAError, MLXLoRAWarning, TrainingError
from .best import continued, is_best, out_of_patience, with_validation_of
from .checkpoints import Tally, TrainingState
from .evaluation import evaluate
from .losses import loss_named, means
from .optimizers import MasterWeights
from .packing_checks import check_rows
from .prefix import FrozenPrefix
from .recompute import recomputed_layers
from .reference import ready, stored
from .reports import Checkpoint, Done, NewBest, Progress, Report, SkippedStep, TrainReport, ValReport
from .step import Step


@dataclasses.dataclass
class Loop:
    """One call of `train`. The methods that yield are parts of the loop."""

    model: nn.Module
    optimizer: MasterWeights
    train_set: Dataset
    valid_set: Dataset | None
    config: TrainConfig
    checkpoint: Callable[[TrainingState], Any] | None
    stop: Callable[[], bool]
    metrics: Callable[[], dict[str, float]] | None
    fingerprint: dict[str, Any]
    group: Any
    prefix: FrozenPrefix | None
    begun: bool = False  # whether a step was taken

    def reports(self, resume: TrainingState | None) -> Iterator[Report]:
        begin = time.perf_counter()
        mx.reset_peak_memory()
        with ExitStack() as cleanup:
            cleanup.enter_context(memory_limits())
            # Before the layers are changed for training: the comparison needs the model's own layers.
            row, recomputes = self.train_set[0].tokens, self.config.grad_checkpoint
            if cleanup.enter_context(as_generated(self.model, row, recomputes)):
                warnings.warn(THROUGH_CACHE, MLXLoRAWarning, stacklevel=2)
            cleanup.enter_context(mode(self.model, training=True))
            if self.config.grad_checkpoint:
                cleanup.enter_context(recomputed_layers(self.model))
            if self.prefix is not None:
                cleanup.enter_context(self.prefix.on())
            self._prepare(resume)
            cleanup.callback(self._settle)
            reason = yield from self._iterate()
            if reason == "complete":
                yield from self._finish()
            tally = self.tally
            seconds, stopped = time.perf_counter() - begin, reason == "stopped"
            yield Done(tally.iteration, tally.trained_tokens, seconds, stopped, _peak(), tally.skipped_steps, reason)

    def _prepare(self, resume: TrainingState | None) -> None:
        mx.eval(self.model.parameters())  # otherwise each call of the compiled step would compute them again
        kept = resume.reference if resume is not None else None
        self.train_set = ready(self.model, self.train_set, self.config, "train", kept)
        self.valid_set = ready(self.model, self.valid_set, self.config, "valid", kept)
        if self.config.pack:
            with mode(self.model, training=False):
                longest = np.argsort(-self.train_set.lengths, kind="stable")[[0, min(1, len(self.train_set) - 1)]]
                check_rows(self.model, [self.train_set[int(row)] for row in longest])
        self.optimizer.init(dict(tree_flatten(self.model.trainable_parameters())))
        if resume is not None:
            self.optimizer.restore(resume.optimizer)
        loss = loss_named(self.config.loss, self.config.preference_options())
        self.step = Step(
            self.model,
            self.optimizer,
            loss=loss if self.prefix is None else self.prefix.loss(loss),
            seed=self.config.seed,
            fused=self.config.grad_accumulation_steps == 1,
            max_grad_norm=self.config.max_grad_norm,
            group=self.group,
        )
        self.tally = continued(Tally() if resume is None else resume.tally, self.config)
        if resume is not None:
            self.step.restore(resume.parameters, resume.pending)

    def _settle(self) -> None:
        """Leave no tracer in the model, the optimizer or the random state, however the run ended."""
        self.step.settle()
        mx.random.seed(self.config.seed)
        mx.eval(self.step.parameters, self.step.state)

    def _iterate(self) -> Iterator[Report]:
        """All iterations, with validations and checkpoints between them. Returns why the run ends, see `Done`."""
        config, tally = self.config, self.tally
        due = tally.unmeasured and tally.iteration % config.steps_per_eval == 0
        if tally.iteration == 0:
            yield from self._validate()
        elif tally.iteration < config.iters:
            if due and (ended := (yield from self._pause())):
                return ended
            if not due:
                self._measured()  # so that a failing metric ends the run now, not hours later
        self.begun = True
        if tally.iteration == config.iters:
            return "complete"
        batches = (packed_batches if config.pack else train_batches)(
            self.train_set,
            config.batch_size,
            seed=config.seed,
            start=tally.iteration,
            rank=self.group.rank(),
            world=self.group.size(),
        )
        if self.prefix is not None:
            batches = self.prefix.train_batches(batches, config.batch_size, config.seed, tally.iteration)
        batch = _arrays(next(batches))
        while True:
            tic = time.perf_counter()
            tally.iteration += 1
            last = tally.iteration == config.iters
            self.step.run(tally.iteration, *batch, ends_window=tally.iteration % config.grad_accumulation_steps == 0)
            if not last:
                batch = _arrays(next(batches))  # while the device computes
            outcome = self.step.outcome()
            if config.clear_cache_threshold is not None and mx.get_cache_memory() > config.clear_cache_threshold:
                mx.clear_cache()
            finite = math.isfinite(outcome.loss)
            if finite:
                tally.window_loss += outcome.loss
                tally.window_count += outcome.count
                tally.window_measured = _added(tally.window_measured, outcome.measured)
                tally.window_tokens += outcome.tokens
                tally.trained_tokens += outcome.tokens
            tally.window_iterations += 1
            tally.window_seconds += time.perf_counter() - tic

            yield Progress(tally.iteration, outcome.loss / outcome.count if finite and outcome.count else None)
            yield from self._count_step(outcome.finite, outcome.grad_norm)
            if tally.iteration % config.steps_per_report == 0:
                yield self._report()
            if last:
                return "complete"
            if ended := (yield from self._pause()):
                return ended

    def _pause(self) -> Iterator[Report]:
        """The validation and the checkpoint between two iterations. Returns why the run ends here, None to go on."""
        config, tally = self.config, self.tally
        best = tally.iteration % config.steps_per_eval == 0 and (yield from self._validate())
        ended = "patience" if out_of_patience(tally, config) else "stopped" if self._stopped() else None
        if best or ended or tally.iteration % config.save_every == 0:
            state = self._state()  # the state keeps a partial window, which is not applied
            if ended == "patience" and tally.window_iterations:
                yield self._report()
            yield from self._save(state, best)
        return ended

    def _finish(self) -> Iterator[Report]:
        """End a complete run: apply the last, partial window, and yield the last reports and checkpoint."""
        state = self._state()  # before the partial window is applied: a run with more iters would fill it instead
        if self.step.pending:
            self.step.flush()
            outcome = self.step.outcome()
            yield from self._count_step(outcome.finite, outcome.grad_norm)
        if self.tally.window_iterations:
            yield self._report()
        best = yield from self._validate(state)
        yield from self._save(dataclasses.replace(state, tally=with_validation_of(state.tally, self.tally)), best)

    def _count_step(self, finite: bool | None, norm: float | None) -> Iterator[Report]:
        """Count an optimizer step as good or skipped. Raises after too many skipped steps in a row."""
        tally = self.tally
        if finite is None:
            return
        tally.grad_norm = norm
        if finite:
            tally.skipped_in_a_row = 0
            return
        tally.skipped_steps += 1
        tally.skipped_in_a_row += 1
        yield SkippedStep(tally.iteration, tally.skipped_in_a_row)
        if tally.skipped_in_a_row >= self.config.max_skipped_steps:
            times = tally.skipped_in_a_row
            tally.skipped_in_a_row = 0  # a run resumed from here may try as many times again
            yield from self._save(self._state())
            raise TrainingError(
                f"The gradients were not finite in {times} steps in a row, up to iteration {tally.iteration}. "
                "The model has the parameters of the last good step.",
                "Lower learning_rate, add warmup or set max_grad_norm. Train a float16 model in bfloat16.",
            )

    def _report(self) -> TrainReport:
        tally = self.tally
        report = TrainReport(
            iteration=tally.iteration,
            train_loss=tally.window_loss / tally.window_count if tally.window_count else math.nan,
            learning_rate=self.optimizer.learning_rate.item(),
            iterations_per_second=tally.window_iterations / tally.window_seconds,
            tokens_per_second=tally.window_tokens / tally.window_seconds,
            trained_tokens=tally.trained_tokens,
            peak_memory=_peak(),
            grad_norm=tally.grad_norm,
            metrics=means(tally.window_measured),
        )
        tally.window_count, tally.window_measured = 0, {}
        tally.window_loss, tally.window_tokens, tally.window_iterations, tally.window_seconds = 0.0, 0, 0, 0.0
        return report

    def _measured(self) -> dict[str, float]:
        """The values of the metrics; none without metrics."""
        with mode(self.model, training=False):
            return self.metrics() if self.metrics and self.valid_set is not None else {}

    def _validate(self, state: TrainingState | None = None) -> Iterator[Report]:
        """Returns whether this is the best validation so far.

        If a metric fails after a step, the state is saved and the run ends. A resumed run validates at this iteration.

        Args:
            state: the state to save then; by default the current one.
        """
        if self.valid_set is None:
            return False
        config = self.config
        of_loss = config.loss, config.preference_options()
        measured = evaluate(
            self.model, self.valid_set, config.batch_size, config.val_batches, *of_loss, prefix=self.prefix
        )
        try:
            values = {**measured.metrics, **self._measured()}
        except MLXLoRAError:
            if self.begun:
                self.tally.unmeasured = True
                state = state or self._state()
                yield from self._save(dataclasses.replace(state, tally=with_validation_of(state.tally, self.tally)))
            raise
        self.tally.unmeasured = False
        report = ValReport(self.tally.iteration, measured.loss, measured.seconds, measured.tokens, values)
        yield report
        return is_best(self.tally, report, config)

    def _save(self, state: TrainingState, best: bool = False) -> Iterator[Report]:
        if self.checkpoint is not None:
            yield Checkpoint(self.tally.iteration, self.checkpoint(state))
        if best:
            yield NewBest(self.tally.iteration, self.config.best_by, self.tally.best_value)

    def _state(self) -> TrainingState:
        """The state of the run now. MLX's arrays never change in place, so references are enough."""
        return TrainingState(
            parameters=dict(self.step.parameters),
            optimizer=dict(tree_flatten(self.step.state)),
            pending=self.step.pending,
            reference=stored(train=self.train_set, valid=self.valid_set),
            tally=dataclasses.replace(self.tally),
            fingerprint=self.fingerprint,
        )

    def _stopped(self) -> bool:
        """Whether `stop` returned True in any process."""
        stopped = bool(self.stop())
        if self.group.size() > 1:
            stopped = mx.distributed.all_sum(mx.array(float(stopped)), group=self.group).item() > 0
        return stopped


def _added(sums: dict[str, Any], more: Any) -> dict[str, tuple[float, float]]:
    """The sums and counts of both, as a new dict, because states of the run share the old one."""
    zero = (0.0, 0.0)
    return {name: tuple(map(sum, zip(sums.get(name, zero), new, strict=True))) for name, new in more.items()}


def _arrays(batch: Any) -> tuple[mx.array, ...]:
    return tuple(mx.array(array) for array in batch)


def _peak() -> float:
    return mx.get_peak_memory() / 1e9  # GB
