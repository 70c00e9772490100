"""Where words go: data on stdout, everything else on stderr, one JSON object a line with ``--json``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import click


def note(text: str = "") -> None:
    """A line for the person, on stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    click.echo(click.style("Warning: ", fg="yellow") + text, err=True)


def title(text: str) -> None:
    click.echo(click.style(text, bold=True), err=True)


def data(text: str, newline: bool = True) -> None:
    """Output proper, on stdout, at once."""
    click.echo(text, nl=newline)
    sys.stdout.flush()


def event(kind: str, fields: dict[str, Any]) -> None:
    """One JSON object on a line of stdout: ``{"event": kind, ...}``; NaN and infinities become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    data(json.dumps({"event": kind, **clean}, default=str, ensure_ascii=False))


def report_event(report: Any) -> None:
    """A frozen report as an event: its class name and its fields."""
    event(type(report).__name__, dataclasses.asdict(report))


def table(rows: list[tuple], head: tuple[str, ...]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [head, *[tuple(str(c) for c in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def seconds(value: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bar:
    """A live progress bar on a terminal (tqdm's); silent where stderr is none."""

    def __init__(self, total: int, initial: int = 0, unit: str = "it", hidden: bool = False):
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=unit,
            disable=hidden or not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
            file=sys.stderr,
        )

    def step(self, **facts: str) -> None:
        if facts:
            self._bar.set_postfix(facts, refresh=False)
        self._bar.update(1)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        note(text)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
