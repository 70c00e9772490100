"""Answers to held-out prompts for the page: which model gave them, and the words that differ from the expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .history import History

_MOST = 1500  # characters of a text on the page
_ALIKE = 0.4  # minimum share of common words to mark the words that differ


class Text(NamedTuple):
    """A text as pieces (text, whether it differs from the expected answer), and a note if it was cut."""

    pieces: list[tuple[str, bool]]
    cut: str = ""
    equal: bool = False  # to the expected answer


def prompts(history: History) -> list[dict[str, Any]]:
    """For each held-out prompt: the ``prompt``, the ``expected`` answer, and ``given``: (model, Text)."""
    named = _whose(history)
    rows: dict[tuple[str, str], list] = {}
    for label, record in named:
        for answer in record.get("answers") or ():
            if isinstance(answer, dict):
                question, expected = str(answer.get("question") or ""), str(answer.get("expected") or "")
                given = _compared(str(answer.get("given") or ""), expected)
                rows.setdefault((question, expected), []).append((label, given))
    return [
        {"prompt": _compared(question), "expected": _compared(expected), "given": given}
        for (question, expected), given in rows.items()
    ]


def beside(runs: Sequence[History]) -> list[dict[str, Any]]:
    """As ``prompts``, for the prompts that all runs answered: the base's answer, then the last one of each run.

    If the runs' base models answer differently, each base's answer is shown.
    """
    found = [_last_given(run) for run in runs]
    base = [_given(run.answers.get("base", {})) for run in runs]
    shared = [key for key in found[0] if all(key in own for own in found)]
    one_base = len({tuple(own.get(key) for key in shared) for own in base}) == 1
    rows = []
    for row in shared:
        named = [("base", base[0])] if one_base else [(f"{r.name}, base", b) for r, b in zip(runs, base, strict=True)]
        named += [(run.name, own) for run, own in zip(runs, found, strict=True)]
        given = [(label, _compared(answers[row], row[1])) for label, answers in named if row in answers]
        rows.append({"prompt": _compared(row[0]), "expected": _compared(row[1]), "given": given})
    return rows


def correct_beside(runs: Sequence[History]) -> list[tuple[str, int, int]]:
    """(name of the run, answers equal to the expected one, answers) of the last answers of each run."""
    return [
        (run.name, sum(given == key[1] for key, given in answers.items()), len(answers))
        for run in runs
        for answers in [_last_given(run)]
    ]


def _last_given(run: History) -> dict[tuple[str, str], str]:
    return next((given for of in ("best", "first") if (given := _given(run.answers.get(of, {})))), {})


def _given(record: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The answers of a record by (question, expected answer)."""
    answers = [answer for answer in record.get("answers") or () if isinstance(answer, dict)]
    return {(str(a.get("question") or ""), str(a.get("expected") or "")): str(a.get("given") or "") for a in answers}


def why_none(history: History) -> str:
    """Why the run has no answers."""
    return str(history.answers.get("base", {}).get("why") or "this run kept none")


def correct(history: History) -> list[tuple[str, int, int]]:
    """(model, answers equal to the expected one, answers)."""
    found = []
    for label, record in _whose(history):
        given = [answer for answer in record.get("answers") or () if isinstance(answer, dict)]
        found.append((label, sum(a.get("given") == a.get("expected") for a in given), len(given)))
    return found


def _whose(history: History) -> list[tuple[str, dict[str, Any]]]:
    """The records of answers, each with a label, in training order; each checkpoint once."""
    found: dict[Any, tuple[list[str], dict[str, Any]]] = {}
    for of in ("base", "first", "best"):
        if record := history.answers.get(of):
            found.setdefault(record.get("iteration"), ([], record))[0].append(of)
    best = history.best[0] if history.best else None
    for iteration, (names, _) in found.items():
        if iteration == best and "best" not in names:
            names.append("best")
        elif names == ["best"] and iteration != best:  # without a best checkpoint, the last one answered
            names[:] = ["last"]
    return [
        ("base" if names == ["base"] else f"{' and '.join(names)} · {iteration}", record)
        for iteration, (names, record) in found.items()
        if record.get("answers")
    ]


def _compared(text: str, expected: str | None = None) -> Text:
    shown = text[:_MOST]
    cut = f"… {len(text):,} characters in all" if len(text) > _MOST else ""
    if expected is None or text == expected:
        return Text([(shown, False)], cut, equal=expected is not None)
    new, old = (re.findall(r"\s+|\w+|[^\w\s]", part) for part in (shown, expected[:_MOST]))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < _ALIKE:  # otherwise every word would be marked
        return Text([(shown, False)], cut)
    steps = matcher.get_opcodes()
    return Text([("".join(new[j:k]), tag != "equal") for tag, _, _, j, k in steps if k > j], cut)
