"""Check that all numbered files of a split exist, such as ``train-00000-of-00002.parquet``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .faults import Fault, Place

_MOST_NAMED = 5


def check_parts(files: Iterable[Path], faults: list[Fault]) -> None:
    """Refuse numbered files if one is missing or duplicated, or if their totals differ."""
    sets: dict[str, dict[str, dict[int, Path]]] = {}  # name -> total as written -> number -> file
    for file in files:
        if match := re.match(r"(.*?)-?(\d+)-of-(\d+)\b", file.name):
            name, number, total = match.groups()
            parts = sets.setdefault(name.lower(), {}).setdefault(total, {})
            if int(number) in parts:
                other = parts[int(number)].name
                faults.append(Fault(Place(str(file)), f"is the same part as {other}: remove one of them"))
            parts[int(number)] = file
    for name, totals in sets.items():
        if len(totals) > 1:
            file = next(iter(max(totals.items())[1].values()))
            text = f"and the other {name} files are parts of {' and '.join(sorted(totals))}: remove those of one set"
            faults.append(Fault(Place(str(file)), text))
            continue
        for total, parts in totals.items():
            _check_numbers(total, parts, faults)


def _check_numbers(total: str, parts: dict[int, Path], faults: list[Fault]) -> None:
    file = next(iter(parts.values()))
    first = 1 if int(total) in parts and 0 not in parts else 0
    due = set(range(first, first + int(total)))
    for number in sorted(set(parts) - due):
        faults.append(Fault(Place(str(parts[number])), "has a number above its total: rename or remove it"))
    if lost := sorted(due - set(parts)):
        written = re.search(r"\d+(?=-of-)", file.name)
        before, after = file.name[: written.start()], file.name[written.end() :]
        names = [f"{before}{number:0{len(written.group())}}{after}" for number in lost[:_MOST_NAMED]]
        more = f" and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        verb, what = ("is", "it") if len(lost) == 1 else ("are", "them")
        text = f"{', '.join(names)}{more} {verb} missing, of {int(total)} files: add {what}"
        faults.append(Fault(Place(str(file.parent)), text))
