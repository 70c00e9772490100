"""Training curves for experiment trackers: TensorBoard, Trackio, Weights & Biases, SwanLab. All packages are optional.

TensorBoard's files are in the folder of the run, under ``tensorboard``; the others have their own projects.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..training import TrainReport, ValReport
from .log import plain
from .reports import Started


def trackers(
    names: Iterable[str], project: str | None, settings: dict[str, Any], folder: Path, resume: bool
) -> list[Tracker]:
    """A tracker for each named service. Raises: ConfigError that names all packages that are not installed."""
    kinds, missing = {name: TensorBoard if name == "tensorboard" else Project for name in names}, []
    for name in kinds:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(f"report_to {', '.join(missing)}: not installed", f"pip install {' '.join(missing)}")
    found = []
    for name, kind in kinds.items():
        try:
            found.append(kind(name, project or Path.cwd().name, settings, folder, resume))
        except Exception as problem:  # such as an account that is not logged in
            for tracker in found:
                tracker.close()
            hint = f"Set {name} up by its own documentation, or leave it out of report_to."
            raise ConfigError(f"report_to {name}: cannot start an experiment: {problem}", hint) from problem
    return found


def values_of(report: TrainReport | ValReport) -> dict[str, float]:
    """The numbers of a report by name: its fields, as mlx-lm names them, and its metrics as train/... or val/...."""
    fields = asdict(report)
    prefix = "val/" if isinstance(report, ValReport) else "train/"
    metrics = {prefix + name: value for name, value in fields.pop("metrics").items()}
    return {name: value for name, value in {**fields, **metrics}.items() if name != "iteration" and value is not None}


class Tracker:
    """An experiment in one service, called ``name``."""

    name: str

    def see(self, report: Any) -> None:
        """Log a report of training or validation; ignore others."""
        if isinstance(report, (TrainReport, ValReport)):
            self.log(values_of(report), report.iteration)

    def log(self, values: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Finish the experiment."""


class Project(Tracker):
    """A service with wandb's ``init``, ``log`` and ``finish``. Their prints go to stderr; stdout is for data."""

    def __init__(self, name: str, project: str, settings: dict[str, Any], folder: Path, resume: bool):
        self.name, self.module = name, importlib.import_module(name)
        with redirect_stdout(sys.stderr):
            self.module.init(project=project, config=plain(settings))

    def log(self, values: dict[str, float], iteration: int) -> None:
        with redirect_stdout(sys.stderr):
            self.module.log(values, step=iteration)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.module.finish()


class TensorBoard(Tracker):
    """An event file in ``tensorboard/<time of the run's start>``, written by TensorBoard alone, without TensorFlow."""

    def __init__(self, name: str, project: str, settings: dict[str, Any], folder: Path, resume: bool):
        self.name, self.writer = name, None
        earlier = sorted((folder / name).glob("*")) if resume else []
        self.folder = earlier[-1] if earlier else folder / name / time.strftime("%Y-%m-%d_%H-%M-%S")

    def see(self, report: Any) -> None:
        if isinstance(report, Started):
            self._open(report.iteration)
        super().see(report)

    def _open(self, iteration: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer, self._event, self._summary = EventFileWriter(str(self.folder)), Event, Summary
        if iteration:  # TensorBoard then drops the points that a killed run logged after its last checkpoint
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=iteration + 1, session_log=start))

    def log(self, values: dict[str, float], iteration: int) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self.writer.add_event(self._event(wall_time=time.time(), step=iteration, summary=summary))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
