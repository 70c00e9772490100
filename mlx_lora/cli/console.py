"""Output: data on stdout, everything else on stderr; with ``--json`` one JSON object per line on stdout."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import click


def note(text: str = "") -> None:
    """Print a line on stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(click.style("Warning: ", fg="yellow") + text, err=True)


def title(text: str) -> None:
    """Print a bold line on stderr."""
    click.echo(click.style(text, bold=True), err=True)


def data(text: str, newline: bool = True) -> None:
    """Print the command's output on stdout, unbuffered."""
    click.echo(text, nl=newline)
    sys.stdout.flush()


def event(kind: str, fields: dict[str, Any]) -> None:
    """Print ``{"event": kind, ...}`` as one line of JSON on stdout; NaN and infinities become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    data(json.dumps({"event": kind, **clean}, default=str, ensure_ascii=False))


def report_event(report: Any) -> None:
    """Print a report as an event: its class name and its fields."""
    event(type(report).__name__, dataclasses.asdict(report))


def table(rows: list[tuple], head: tuple[str, ...]) -> str:
    """Format ``rows`` in aligned columns, numbers to the right."""
    cells = [head, *[tuple(str(c) for c in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def gigabytes(count: float) -> str:
    """Format bytes as 1.50 GB (10^9 bytes), small ones as 15 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def seconds(value: float) -> str:
    """Format seconds as 1:15 or 1:01:15."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Bar:
    """A progress bar (tqdm's), shown only if stderr is a terminal."""

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
        """Advance by one, with ``facts`` next to the bar."""
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
