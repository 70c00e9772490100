"""Records a run: its log, its answers to held-out prompts, its page ``report.html``, and experiment trackers.

One object sees every report. Nothing here changes the run: answering changes neither the model nor the random
numbers, and a failed write is a warning.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import __version__
from ..data import Splits
from ..device import as_dict, describe
from ..errors import MLXLoRAError, MLXLoRAWarning
from ..formats.mlx_lm import WEIGHTS
from ..training import Checkpoint, Done, TrainingState
from .adapters import weights_of
from .folder import RunFolder, is_main_process
from .held_out import HeldOut
from .log import PAGE, RunLog, logged_until
from .peers import working
from .reports import Loading, Started, TestReport
from .settings import Settings
from .tracking import Tracker, trackers
from .unfinished import checkpoint_lines

BETWEEN_PAGES = 60.0  # minimum seconds between two versions of report.html during the run
BASE, FIRST, BEST = "base", "first", "best"  # whose answers
_SKIPPED = ("Progress", "Loading")
_ONCE = ("TrainReport", "Checkpoint")  # reports of an iteration, whose lines are written once


class Recorder:
    """Records the run in ``folder``. Other processes than the main one only answer prompts, so that none waits."""

    def __init__(self, folder: RunFolder, settings: Settings):
        self.folder, self.settings = folder, settings
        self.main = is_main_process()
        self.log: RunLog | None = None  # set at Started; until then, the run may be refused
        self.waiting: list[tuple[str, dict[str, Any]]] = []  # lines from before
        self.past: list[dict[str, Any]] = []  # what the resumed run has logged
        self.state: TrainingState | None = None  # that it continues from
        self.answered: dict[str, int] = {}  # iteration of the answers, by the model that gave them
        self.best: int | None = None  # iteration of the best checkpoint
        self.page_at = time.monotonic()
        self.trackers: list[Tracker] = []

    def start_trackers(self) -> None:
        """Start an experiment in each tracker. Raises: ConfigError: a package is not installed."""
        settings = self.settings
        if self.main:
            self.trackers = trackers(
                settings.report_to, settings.project_name, settings.tracked(), self.folder.path, settings.resume
            )

    def prepare(self, model: nn.Module, tokenizer: Any, sets: Splits, state: TrainingState | None) -> Iterator[Loading]:
        """Choose the held-out prompts, and answer them with ``model``, which has no adapter yet.

        Args:
            state: that the run continues from; None for a new one.
        """
        self.model, self.state = model, state
        if state is not None:
            self.past = logged_until(self.folder.path, state.iteration)
            self.best = state.tally.best_iteration or None
        for record in self.past:
            if record["kind"] == "Answers":
                self.answered[str(record.get("of"))] = record.get("iteration")
        self.waiting.insert(0, ("Run", self._described(sets)))
        config = self.settings.train
        self.held_out = HeldOut(self.settings.data, sets, tokenizer, config.report_prompts, config.batch_size)
        if BASE not in self.answered:
            if self.held_out.asked:
                yield Loading("answers", f"{len(self.held_out.asked)} held-out prompts")
            self._answer(BASE, 0)

    def record(self, reports: Iterator[Any]) -> Iterator[Any]:
        """Yield ``reports``, and record each. ``Done`` is yielded after the page is written."""
        try:
            with closing(reports):
                for report in reports:
                    self._see(report)
                    yield report
                    if isinstance(report, Checkpoint):
                        self._after_checkpoint(report.iteration)
        except MLXLoRAError:
            self._write_page()
            raise
        finally:
            for tracker in self.trackers:
                with suppress(Exception):
                    tracker.close()

    def _see(self, report: Any) -> None:
        kind = type(report).__name__
        if kind in _SKIPPED:
            return
        if isinstance(report, Started):
            self._open()
        if not (kind in _ONCE and self._logged_before(kind, report.iteration)):
            self._add(kind, asdict(report))
            self._track(report)
        if isinstance(report, Started):
            self._answer_first_again()
        elif kind == "NewBest":
            self.best = report.iteration
        elif isinstance(report, Done):
            self._answer_best(report.iteration)
            if report.stopped or self.settings.test_batches is None:
                self._write_page()
        elif isinstance(report, TestReport):
            self._write_page()

    def _logged_before(self, kind: str, iteration: int) -> bool:
        """Whether the resumed run has logged this before: after a failed metric, it ends the same iteration again."""
        if self.state is None or iteration != self.resumed:
            return False
        return kind == "Checkpoint" or any((r["kind"], r.get("iteration")) == (kind, iteration) for r in self.past)

    def _track(self, report: Any) -> None:
        for tracker in list(self.trackers):
            try:
                tracker.see(report)
            except Exception as problem:  # such as a network that is gone
                self.trackers.remove(tracker)
                text = f"{tracker.name} no longer receives reports: {problem}. The run goes on."
                warnings.warn(text, MLXLoRAWarning, stacklevel=2)

    def _open(self) -> None:
        """Open the log. If the folder holds an earlier run, lines wait for the first checkpoint."""
        waiting, self.waiting = self.waiting, []
        if not self.main:
            return
        new = self.state is None
        self.log = RunLog(self.folder.path, held_back=new and self.folder.earlier)
        self.folder.before_checkpoint = self.log.release
        if self.past:
            self.log.replace(self.past)
        if not new:
            for report in checkpoint_lines(self.past, self.state, self.folder.numbered(self.resumed)):
                self.log.add(type(report).__name__, asdict(report))
        for kind, fields in waiting:
            self.log.add(kind, fields)

    @property
    def resumed(self) -> int | None:
        """The iteration that the run continues from; None for a new one."""
        return None if self.state is None else self.state.iteration

    def _saved(self) -> list[Any]:
        """The iterations of the checkpoints that the run has logged."""
        return [record.get("iteration") for record in self.past if record["kind"] == "Checkpoint"]

    def _add(self, kind: str, fields: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.add(kind, fields)
        elif self.main:
            self.waiting.append((kind, {"time": round(time.time(), 3), **fields}))

    def _after_checkpoint(self, iteration: int) -> None:
        if FIRST not in self.answered:
            self._answer(FIRST, iteration)
        if time.monotonic() - self.page_at > BETWEEN_PAGES:
            self._write_page()

    def _answer(self, of: str, iteration: int) -> None:
        """Answer the prompts with the current model. Without answers, the base's line has the reason."""
        given = [asdict(answer) for answer in self.held_out.answer(self.model)]
        self.answered[of] = iteration
        if given or of == BASE:
            self._add("Answers", {"of": of, "iteration": iteration, "why": self.held_out.why, "answers": given})

    def _answer_with(self, of: str, iteration: int, file: Path) -> None:
        try:
            with weights_of(self.model, file):
                self._answer(of, iteration)
        except (ValueError, OSError, RuntimeError, MLXLoRAError) as problem:
            if self.main:
                text = f"report.html lacks the answers of the {of} checkpoint: {problem}"
                warnings.warn(text, MLXLoRAWarning, stacklevel=2)

    def _answer_first_again(self) -> None:
        """Answer with the first checkpoint if a process was killed between writing it and answering."""
        if self.resumed is None or FIRST in self.answered or self._saved() not in ([], [self.resumed]):
            return
        if self.held_out.asked and self.past:
            self._answer_with(FIRST, self.resumed, self.folder.numbered(self.resumed))

    def _answer_best(self, last: int) -> None:
        """Answer with the best checkpoint, or with the last one if the run has no best one."""
        best = last if self.best is None else self.best
        if not self.held_out.asked or best in (self.answered.get(FIRST), self.answered.get(BEST)):
            return
        if best == last:
            self._answer(BEST, best)
        else:
            self._answer_with(BEST, best, self.folder.path / BEST / WEIGHTS)

    def _described(self, sets: Splits) -> dict[str, Any]:
        identity, settings = self.folder.identity, self.settings
        base, versions = identity["base"], ("mlx", "mlx-lm", "matplotlib")
        summaries = {split: getattr(getattr(sets, split), "summary", None) for split in settings.splits}
        return {
            "iteration": self.resumed or 0,
            "settings": identity["settings"],
            "base": {name: base.get(name) for name in ("model_type", "weights")},
            "data": {split: asdict(summary) for split, summary in summaries.items() if summary is not None},
            "versions": {"mlx-lora": __version__, **{name: version(name) for name in versions}},
            "machine": {**as_dict(describe(measure=False)), "processes": mx.distributed.init().size()},
        }

    def _write_page(self) -> None:
        """Write ``report.html``. A failure gives a warning and does not end the run."""
        if self.log is None or not self.log.written:
            return
        from .report import write_report

        try:
            with working():  # the other processes wait
                write_report([self.folder.path], self.folder.path / PAGE)
        except Exception as problem:
            text = f"report.html was not written: {problem}. Make it again with mlx-lora report {self.folder.path}"
            warnings.warn(text, MLXLoRAWarning, stacklevel=2)
        self.page_at = time.monotonic()
