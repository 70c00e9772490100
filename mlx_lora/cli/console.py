"""Output: data on stdout, everything else on stderr; with ``--json`` one JSON object per line on stdout."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import click

from . import sparkline


def note(text: str = "", newline: bool = True) -> None:
    """Print a line on stderr."""
    click.echo(text, nl=newline, err=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(click.style("Warning: ", fg="yellow") + text, err=True)


def error(message: str, hint: str) -> None:
    """Print an error and its fix on stderr."""
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    click.echo(click.style("Hint: ", bold=True) + hint, err=True)


def title(text: str) -> None:
    """Print a bold line on stderr."""
    click.echo(click.style(text, bold=True), err=True)


def data(text: str, newline: bool = True) -> None:
    """Print the command's output on stdout, unbuffered."""
    click.echo(text, nl=newline)
    sys.stdout.flush()


def event(kind: str, fields: dict[str, Any]) -> None:
    """Print ``{"event": kind, ...}`` as one line of JSON on stdout; NaN and infinities become null."""
    clean = json.loads(json.dumps({"event": kind, **fields}, default=str), parse_constant=lambda _: None)
    data(json.dumps(clean, ensure_ascii=False))


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

    def __init__(self, total: int, initial: int = 0, hidden: bool = False):
        from tqdm import tqdm

        self.levels = sparkline.BLOCKS if _shows(sparkline.BLOCKS) else sparkline.ASCII
        self._bar = tqdm(
            total=total,
            initial=initial,
            disable=hidden or not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
            ascii=self.levels == sparkline.ASCII,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{desc} {remaining} left",
            file=sys.stderr,
        )

    @property
    def room(self) -> int:
        """Columns for a text next to the bar; 0 if the bar is not shown."""
        if self._bar.disable:
            return 0
        return (self._bar.format_dict["ncols"] or 80) - 2 * len(str(self._bar.total)) - _AROUND

    def step(self, text: str = "") -> None:
        """Advance by one, with ``text`` next to the bar."""
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(1)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        note(text)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


_AROUND = len("100%|") + 8 + len("| / ") + len("1:00:00 left")  # columns of the bar itself, without numbers and text


def _shows(text: str) -> bool:
    """Whether the terminal at stderr can show ``text``."""
    try:
        text.encode(sys.stderr.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return os.environ.get("TERM", "dumb") not in ("dumb", "linux")
