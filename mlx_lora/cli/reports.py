"""Shows the reports of a run as text or JSON with a progress bar, and handles Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import click

from ..errors import ConfigError
from . import console
from .sparkline import status

RECENT = 200  # number of iterations whose losses the bar draws


class Stop:
    """The ``stop`` of a run. Ctrl-C during training stops after the iteration; a second one interrupts.

    Use it as a context manager. Before training and after it (``armed`` is False) Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.asked = self.armed = False

    def __enter__(self) -> Stop:
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # only the main thread may handle signals
            self._before = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: Any) -> None:
        if self.asked or not self.armed:
            raise KeyboardInterrupt
        self.asked = True
        console.note("\nStopping after this iteration. Press Ctrl-C again to stop now, without saving.")

    def __call__(self) -> bool:
        return self.asked


def show_reports(
    reports: Iterable[Any], stop: Stop | None = None, *, as_json: bool = False, rows: int = 0
) -> dict[str, Any]:
    """Show ``reports`` as they come, in the main process.

    Args:
        rows: expected number of ``Answer`` reports, for the progress bar.

    Returns: the last report of each class, by the name of the class.
    """
    from ..runs import is_main_process

    stop, display, last = stop or Stop(), Display(as_json, rows, hidden=not is_main_process()), {}
    try:
        with stop:
            for report in reports:
                name = type(report).__name__
                last[name] = report
                stop.armed = "Started" in last and "Done" not in last
                display.show(name, report)
    finally:
        display.bar.close()
    return last


def ask_for_prefix(reports: Iterator[Any], yes: bool) -> Iterator[Any]:
    """Yield ``reports``, and ask the user before the run keeps states of frozen layers."""
    with closing(reports):
        for report in reports:
            yield report
            if type(report).__name__ != "PrefixCache" or yes:
                continue
            if not sys.stdin.isatty():
                raise ConfigError("--cache-prefix asks for confirmation, and there is no terminal", "Add --yes.")
            click.confirm("Keep it?", default=True, abort=True, err=True)


class Display:
    """Shows one report after another."""

    def __init__(self, as_json: bool, rows: int = 0, hidden: bool = False):
        self.as_json, self.hidden = as_json, hidden
        self.bar = console.Bar(rows, hidden=as_json or hidden or not rows)
        self.losses: deque[float | None] = deque(maxlen=RECENT)
        self.speed: float | None = None  # tokens per second
        self.memory: float | None = None  # GB

    def show(self, name: str, report: Any) -> None:
        """Step the bar, print a JSON object, or print a line."""
        if name == "Started":
            self.iters = report.iters
            self.bar = console.Bar(report.iters, report.iteration, hidden=self.as_json or self.hidden)
        elif name == "TrainReport":
            self.speed, self.memory = report.tokens_per_second, report.peak_memory
        elif name == "TestReport":
            self.bar.close()
        if self.hidden:
            return
        if name == "Progress":
            self.losses.append(report.loss)
            room = self.bar.room
            self.bar.step(status(room, self.losses, self.speed, self.memory, self.bar.levels) if room else "")
        elif name == "Answer":
            self.bar.step()
        elif self.as_json and name not in _NOTES:
            console.report_event(report)
        else:
            getattr(self, name)(report)

    def Loading(self, r: Any) -> None:
        console.note(f"{_LOADING[r.what]} {r.name}")

    def Warned(self, r: Any) -> None:
        console.warn(r.text)

    def Planned(self, r: Any) -> None:
        console.note(planned_line(r))

    def DataLoaded(self, r: Any) -> None:
        for text in r.notes:
            console.note(text)
        for text in r.warnings:
            console.warn(text)
        rows = ", ".join(f"{count:,} {_SPLITS[split]} rows" for split, count in r.rows.items())
        tokens = f"; {r.learned_tokens:,} tokens to learn per epoch" if r.learned_tokens else ""
        console.note(f"Data: {rows}{tokens}")

    def PrefixCache(self, r: Any) -> None:
        reused = "" if r.reused is None else f"; used for {r.reused:.0%} of the rows after the first epoch"
        where = "in memory" if r.place == "memory" else f"in {r.place}, which is deleted when the run is complete"
        console.note(
            f"The output of the first {r.layers} of {r.of} layers will be kept {where}: about "
            f"{console.gigabytes(r.bytes)} of {console.gigabytes(r.free)} free{reused}"
        )

    def Started(self, r: Any) -> None:
        share = 100 * r.trainable / r.parameters
        console.note(
            f"Trainable: {r.trainable:,} of {r.parameters:,} parameters ({share:.3f} %) in {r.modules} modules"
        )
        console.note(f"Validates every {r.steps_per_eval} iterations, saves every {r.save_every} iterations")

    def EarlierRunMoved(self, r: Any) -> None:
        self.bar.line(f"{r.path.parent} held an earlier run. Moved its files to {r.path}")

    def TrainReport(self, r: Any) -> None:
        left = (self.iters - r.iteration) / r.iterations_per_second if r.iterations_per_second else 0
        self.bar.line(
            f"Iteration {r.iteration:>5}: loss {r.train_loss:.3f}, learning rate {r.learning_rate:.2e}, "
            f"{r.tokens_per_second:,.0f} tokens/s, {r.iterations_per_second:.2f} it/s, "
            f"{r.trained_tokens:,} tokens, peak {r.peak_memory:.2f} GB, {console.seconds(left)} left{_metrics(r)}"
        )

    def ValReport(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: validation loss {r.val_loss:.3f}{_metrics(r)} ({r.val_time:.1f} s)")

    def NewBest(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: best checkpoint so far ({r.name} {r.value:.3f})")

    def SkippedStep(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: skipped a step, its gradient is not finite ({r.in_a_row} in a row)")

    def Checkpoint(self, r: Any) -> None:
        self.bar.line(f"Iteration {r.iteration:>5}: saved {r.path}")

    def Done(self, r: Any) -> None:
        skipped = f", {r.skipped_steps} steps skipped" if r.skipped_steps else ""
        how = {"stopped": "Stopped", "patience": "Ended early, because the validation did not improve,"}.get(
            r.reason, "Done"
        )
        self.bar.line(
            f"{how} after {console.seconds(r.seconds)}: {r.trained_tokens:,} tokens "
            f"learned, peak {r.peak_memory:.2f} GB{skipped}"
        )

    def TestReport(self, r: Any) -> None:
        perplexity = "" if r.perplexity is None else f", perplexity {r.perplexity:.3f}"
        console.data(f"Test loss {r.loss:.3f}{perplexity} ({r.tokens:,} tokens)")
        if r.answered:
            correct = round(r.exact_match * r.answered)
            console.data(f"Exact match {correct} of {r.answered} ({100 * r.exact_match:.0f} %)")
        for name, value in r.metrics.items():
            console.data(f"{name} {value:.4f}")


def _metrics(r: Any) -> str:
    """The metrics as text. Rewards and log-probabilities of the two answers are only in ``--json``."""
    shown = {name: value for name, value in r.metrics.items() if not name.endswith(("/chosen", "/rejected"))}
    return "".join(f", {name} {value:.3f}" for name, value in shown.items())


def planned_line(r: Any) -> str:
    """The short form of a plan."""
    if r.peak is None:
        return f"Plan: none, because {r.reason}"
    length = f"{r.iters:,} iterations" + (f" ({r.epochs:g} epochs)" if r.epochs is not None else "")
    padding = f", {100 * r.padding:.0f} % padding" if r.padding is not None else ""
    time = f"about {console.seconds(r.seconds)}" if r.seconds else "time unknown: nothing was trained here yet"
    memory = f"peak about {console.gigabytes(r.peak)} of {console.gigabytes(r.limit)}"
    return f"Plan: {r.trainable:,} parameters to train, {memory}; {length}{padding}, {time}"


# On stderr, also with --json.
_NOTES = ("Loading", "Warned", "Planned", "DataLoaded", "PrefixCache", "Started", "EarlierRunMoved")
_LOADING = {
    "model": "Loading",
    "data": "Reading",
    "reference": "Computing the log-probabilities of the reference:",
    "init": "Reading training data for the initialisation",
    "answers": "Answering",
}
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}
