"""A run, read from its log: curves, the best checkpoint, answers, settings. Only the log's records are read."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import PAIRS, preference_of
from ..log import read_log

# Curves of every run: key -> (title, unit). Each is drawn from the fields of this name in the reports.
CURVES = {
    "loss": ("Loss", "nats per token"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Speed", "learned tokens per second"),
    "peak_memory": ("Peak memory", "GB"),
}
TRAIN, VALID = "training", "validation"


@dataclass
class Curve:
    """Points of one quantity, by iteration; None if it was not finite."""

    iterations: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, iteration: int, value: float | None) -> None:
        self.iterations.append(iteration)
        self.values.append(value)

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass
class History:
    """What a run did.

    curves: by quantity, then by data set, ``TRAIN`` or ``VALID``. best: the record of the best checkpoint, (iteration,
    name, value), or None. answers: the records of kind ``Answers``, by the model that gave them.
    """

    folder: Path
    name: str
    unreadable: int  # lines of the log
    records: list[dict[str, Any]]
    curves: dict[str, dict[str, Curve]]
    best: tuple[int, str, float] | None
    answers: dict[str, dict[str, Any]]

    def last_of(self, kind: str) -> dict[str, Any]:
        """The last record of a kind; empty if there is none."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})

    def all_of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def iteration(self) -> int:
        """The last iteration that was logged."""
        return max((int(number(record.get("iteration")) or 0) for record in self.records), default=0)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by flat name, such as ``optimizer.learning_rate``."""
        return flat(self.last_of("Run").get("settings"))

    @property
    def finished(self) -> bool:
        """Whether the run ended by itself and was not resumed afterwards."""
        ends = [record for record in self.records if record["kind"] in ("Run", "Done")]
        return bool(ends) and ends[-1]["kind"] == "Done" and not ends[-1].get("stopped")

    @property
    def ended_early(self) -> int | None:
        """The iteration at which patience ended the run; None if it did not."""
        done = self.last_of("Done")
        early = self.finished and done.get("reason") == "patience"
        return int(number(done.get("iteration")) or 0) if early else None

    @property
    def rows(self) -> str:
        """The kind of rows that the run learns from: texts to imitate, pairs of answers, or answers with labels."""
        return preference_of(str(self.settings.get("train.loss"))).rows

    @property
    def expected(self) -> str:
        """The label for the answers in the data."""
        return "chosen" if self.rows == PAIRS else "expected"

    @property
    def seconds(self) -> float:
        """The time of all calls; an unfinished call counts up to its last line."""
        total, begin, last = 0.0, None, None
        for record in self.records:
            now = number(record.get("time"))
            if record["kind"] == "Run":
                total, begin = total + _span(begin, last), now
            last = now if now is not None else last
        return total + _span(begin, last)


def read_history(folder: Path, name: str | None = None) -> History:
    """Read the run in ``folder``. Raises: OSError: it has no log."""
    records, unreadable = read_log(folder)
    curves: dict[str, dict[str, Curve]] = {}
    for record in records:
        on = {"TrainReport": TRAIN, "ValReport": VALID}.get(record["kind"])
        iteration = number(record.get("iteration"))
        if on is None or iteration is None:
            continue
        values = {"loss": record.get("train_loss" if on == TRAIN else "val_loss")}
        values |= {key: record[key] for key in CURVES if key != "loss" and key in record}
        values |= mapping(record.get("metrics"))
        for key, value in values.items():
            curves.setdefault(str(key), {}).setdefault(on, Curve()).add(int(iteration), number(value))
    answers = {str(r.get("of")): r for r in records if r["kind"] == "Answers"}
    best = _best(records, curves)
    return History(folder, name or folder.resolve().name, unreadable, records, curves, best, answers)


def _best(records: list[dict[str, Any]], curves: dict) -> tuple[int, str, float] | None:
    """The best checkpoint chosen by the run; else the lowest validation loss."""
    chosen = [r for r in records if r["kind"] == "NewBest" and number(r.get("value")) is not None]
    if chosen and number(chosen[-1].get("iteration")) is not None:
        return int(chosen[-1]["iteration"]), str(chosen[-1].get("name")), float(chosen[-1]["value"])
    measured = curves.get("loss", {}).get(VALID, Curve())
    pairs = zip(measured.iterations, measured.values, strict=True)
    # there are no checkpoints before this
    points = [(value, at) for at, value in pairs if value is not None and at > 0]
    return (min(points)[1], "val_loss", min(points)[0]) if points else None


def mapping(value: Any) -> dict[str, Any]:
    """``value`` if it is a mapping; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def flat(nested: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with names such as ``optimizer.learning_rate``."""
    found: dict[str, Any] = {}
    for name, value in mapping(nested).items():
        found |= flat(value, f"{path}{name}.") if mapping(value) else {f"{path}{name}": value}
    return found


def clean(value: Any) -> Any:
    """Text without control characters and half surrogate pairs, which HTML does not allow; other values unchanged."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in value)


def number(value: Any) -> float | None:
    """``value`` if it is a finite number; None otherwise."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if whole and -math.inf < value < math.inf else None


def _span(begin: float | None, end: float | None) -> float:
    return max(0.0, end - begin) if begin is not None and end is not None else 0.0
