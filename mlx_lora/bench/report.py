"""The report of ``bench check``: its schema, writing, and reading. ``markdown.py`` renders it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..device import Device
from ..errors import FormatError

SCHEMA = 1
MEASURED, DRY_RUN = "measured", "dry run"
NOT_REACHED, RUNNING, DONE, CUT_SHORT, FAILED = "not reached", "running", "done", "cut short", "failed"


@dataclass(frozen=True)
class Figure:
    """One measured quantity. Its spread is the middle half of the samples."""

    part: str  # of the check: "kernels", "decoding", "training", ...
    model: str
    what: str  # such as "q, k, v" or "one step of 1 x 256 tokens"
    path: str  # the path: "base", "kernels", "plain", "mlx-lm", ...
    unit: str  # "us", "ms", "tokens/s", "MB", or "x" for a ratio
    median: float
    low: float  # first quartile
    high: float  # third quartile
    samples: int
    how: str = MEASURED  # or "dry run": emulated kernels, whose speed is meaningless
    estimate: float | None = None  # made before the measurement, in the same unit

    @property
    def off(self) -> float | None:
        """The error of the estimate relative to the measurement: 0.1 is 10 % too high."""
        return None if self.estimate is None or not self.median else self.estimate / self.median - 1


def figure(samples: list[float], *names: str, estimate: float | None = None) -> Figure:
    """A figure from its samples. names: part, model, what, path and unit."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    low, high = max(low, min(samples)), min(high, max(samples))  # with two or three samples, `quantiles` extrapolates
    return Figure(*names, statistics.median(samples), low, high, len(samples), estimate=estimate)


@dataclass(frozen=True)
class Failure:
    """A kernel test that failed, or that ended its process."""

    test: str
    seed: str  # the last seeds that the test set, from which its data follow
    message: str
    command: str  # runs this test alone


@dataclass
class KernelTests:
    """The kernel tests on the GPU."""

    backend: str = ""  # Metal, CUDA or emulated
    selected: int = 0
    passed: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> tests

    @property
    def ran(self) -> int:
        return self.passed + len(self.failures) + sum(self.skipped.values())


@dataclass
class Part:
    """A part of the check: whether it ended, and the machine's thermal state before and after it."""

    name: str
    state: str = NOT_REACHED
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    thermal: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All results of one run of ``bench check``."""

    machine: Device
    advice: list[str]  # the doctor's
    versions: dict[str, str]  # os, mlx, mlx-lm, mlx-lora, git revision
    started: str  # ISO 8601
    minutes: float  # the budget
    emulated: bool  # a dry run
    seconds: float = 0.0
    ended: str = "unfinished"  # or "finished", "out of time", "interrupted", "failed"
    parts: list[Part] = field(default_factory=list)
    tests: KernelTests = field(default_factory=KernelTests)
    figures: list[Figure] = field(default_factory=list)
    schema: int = SCHEMA

    def put(self, new: Figure) -> None:
        """Add a figure, replacing the one with fewer samples."""
        names = (new.part, new.model, new.what, new.path, new.unit)
        for i, old in enumerate(self.figures):
            if (old.part, old.model, old.what, old.path, old.unit) == names:
                self.figures[i] = new
                return
        self.figures.append(new)

    def find(self, part: str, model: str, what: str, path: str, unit: str) -> Figure | None:
        names = (part, model, what, path, unit)
        return next((f for f in self.figures if (f.part, f.model, f.what, f.path, f.unit) == names), None)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_report(report: Report, path: Path) -> None:
    """Write ``report`` as JSON, atomically."""
    write_whole(path, json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(path: str | Path) -> Report:
    """Read a report back. Raises: FormatError that lists everything in the file that does not match the schema."""
    hint = "Name a report.json that scripts/check_gpu wrote, with this version of mlx-lora."
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not a report: {error}", hint) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        version = found.get("schema") if isinstance(found, dict) else None
        raise FormatError(f"{path} is not a report of schema {SCHEMA}: its schema is {version!r}", hint)
    faults: list[str] = []
    report = _read(Report, found, "report", faults)
    if faults:
        raise FormatError("\n".join(f"{path}: {fault}" for fault in faults), hint)
    return report


def _read(kind: Any, value: Any, where: str, faults: list[str]) -> Any:
    """``value`` from JSON as a ``kind``: a dataclass, a list or dict of some kind, an optional, or a scalar."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where, faults)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = {f.name: typing.get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}
        faults += [f"{where}.{name} is missing" for name in hints if name not in value]
        faults += [f"{where}.{name} is unknown" for name in value if name not in hints]
        read = {n: _read(hints[n], v, f"{where}.{n}", faults) for n, v in value.items() if n in hints}
        return None if faults else kind(**read)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], v, f"{where}[{i}]", faults) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _read(arguments[1], v, f"{where}.{name}", faults) for name, v in value.items()}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    faults.append(f"{where} is {value!r}, not a {name}")
    return None
