"""``log.jsonl`` in a run's folder: every report of the run except Progress, as one JSON object per line.

Each line has a ``kind``, the class name of the report, a ``time`` in seconds since 1970, and the fields of the report.
A line of kind ``Run`` begins each call: its settings, data, base model, versions and machine. Lines of kind ``Answers``
hold answers to held-out prompts, see ``held_out.py``. NaN and infinities are null.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MLXLoRAWarning

LOG, PAGE = "log.jsonl", "report.html"
_TEMPORARY = ".log.jsonl.new"


class Lines(NamedTuple):
    """The readable lines of a log, and the number of unreadable ones: a killed process may leave half a line."""

    records: list[dict[str, Any]]
    unreadable: int = 0


def read_log(folder: str | Path) -> Lines:
    """Read the log in ``folder``. Raises: OSError if there is none, or it cannot be read."""
    records, unreadable = [], 0
    for line in (Path(folder) / LOG).read_bytes().split(b"\n"):
        record = read_line(line)
        if record is not None:
            records.append(record)
        elif line.strip():
            unreadable += 1
    return Lines(records, unreadable)


def read_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it holds none."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def logged_until(folder: Path, iteration: int) -> list[dict[str, Any]]:
    """The lines logged up to ``iteration``, the last checkpoint. Later iterations are repeated on resume."""
    try:
        return [record for record in read_log(folder).records if _iteration(record) <= iteration]
    except OSError:  # an older version wrote no log
        return []


class RunLog:
    """Writes the log in ``folder``. A write that fails ends the log with a warning; the run goes on.

    If the folder is gone, the lines wait for the next checkpoint, which creates it again or raises an error.
    """

    def __init__(self, folder: Path, held_back: bool = False):
        """``held_back``: keep the lines in memory until ``release``, because an earlier run's log is in the folder."""
        self.folder, self._held, self._failed = folder, [] if held_back else None, False
        self._gone = False  # whether the folder was deleted while the run wrote to it

    @property
    def written(self) -> bool:
        """Whether the lines are in the file, so that a report can be made from them."""
        return self._held is None and not self._failed

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        """Write a line at once. Values that JSON does not support become text."""
        line = _line({"kind": kind, "time": round(time.time(), 3), **fields})
        if self._held is not None:
            self._held.append(line)
        else:
            self._write("a", [line])

    def release(self) -> None:
        """Write the lines that were held back, once the earlier run's log has been moved."""
        if self._gone:
            self._gone = False
            text = f"{self.folder}: was deleted during the run. Its log starts again before this checkpoint."
            warnings.warn(text, MLXLoRAWarning, stacklevel=2)
        if self._held:
            held, self._held = self._held, None
            self._write("w", held)
        self._held = None

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Let the file hold ``records`` alone."""
        new = self.folder / _TEMPORARY
        if self._write("w", [_line(record) for record in records], new):
            os.replace(new, self.folder / LOG)

    def _write(self, how: str, lines: list[str], path: Path | None = None) -> bool:
        if self._failed:
            return False
        try:
            # JSON writes half of a surrogate pair as \udc80 and reads it back unchanged.
            with open(path or self.folder / LOG, how, encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(lines))
        except OSError as problem:
            if not self.folder.exists():
                self._held, self._gone = lines, True
                return False
            self._failed = True
            text = f"{self.folder / LOG}: cannot be written ({problem.strerror}). The run goes on without a log."
            warnings.warn(text, MLXLoRAWarning, stacklevel=2)
        return not self._failed


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` as JSON values: at every depth, NaN and infinities become None, and unsupported values text."""
    return json.loads(json.dumps(fields, default=str), parse_constant=lambda _: None)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), ensure_ascii=False) + "\n"


def _iteration(record: dict[str, Any]) -> float:
    """The iteration of a record; 0 for a record without one, such as a warning."""
    value = record.get("iteration")
    return value if isinstance(value, (int, float)) else 0
