"""Faults of rows, their places, and a short list that names each kind of fault once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MOST_LINES = 10
_MOST_RANGES = 8


class Place(NamedTuple):
    """Where a row was read: a file or data set, and the line or row in it, from 1. A whole file has no number."""

    name: str
    number: int | None = None

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}:{self.number}"


class Fault(NamedTuple):
    """What is wrong with a row, and the fix. Faults of one file with the same text are one line."""

    where: Place
    text: str
    part: str = ""  # the part of the row that has the fault, such as "message 3"
    spot: str = ""  # the place in the line, such as "column 8"


def listing(faults: Sequence[Fault], most: int = MOST_LINES) -> str:
    """A line for each kind of fault in each file, with the numbers of its rows; ``most`` lines at most."""
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.where.name, fault.text), []).append(fault)
    lines = [_line(group) for group in kinds.values()]
    if len(lines) <= most:
        return "\n".join(lines)
    rest = list(kinds.values())[most - 1 :]
    names = dict.fromkeys(group[0].where.name for group in rest)
    rows = counted(sum(len(group) for group in rest), "row")
    return "\n".join([*lines[: most - 1], f"and {len(rest)} other kinds of faults in {rows} of {', '.join(names)}"])


def _line(group: list[Fault]) -> str:
    first = group[0]
    parts = dict.fromkeys(fault.part for fault in group)
    part = first.part if len(parts) == 1 else "a message"
    text = printable(f"{part} {first.text}".lstrip())
    numbers = sorted({fault.where.number for fault in group} - {None})
    if len(numbers) < 2:
        return f"{first.where}{first.spot and ', '}{first.spot}: {text}"
    return f"{first.where.name}, {len(numbers)} rows ({ranges(numbers)}): {text}"


def counted(count: int, what: str) -> str:
    """A number and a noun: "1 row", "2 rows"."""
    return f"{count} {what}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """The text with half surrogate pairs as escapes, because terminals and files cannot take them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "1-3, 7, 9-12"; only the first ranges if there are many."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{a}-{b}" if b > a else str(a) for a, b in spans[:_MOST_RANGES]]
    return ", ".join([*shown, "..."] if len(spans) > _MOST_RANGES else shown)
