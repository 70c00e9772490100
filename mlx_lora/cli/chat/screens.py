"""What shows the answers of ``chat``: plain text, JSON, or Markdown on a terminal (``rendered.py``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .. import console
from ..generate import answer_event


def screen_for(as_json: bool) -> Any:
    """The screen for standard output: JSON if asked for, Markdown on a terminal that can show it, else plain text."""
    if as_json:
        return JSON()
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from .rendered import Rendered

        return Rendered()
    return Plain()


class Plain:
    """Answers on stdout as they come, reasoning on stderr. Several answers come one after the other."""

    def show(self, events: Iterable[Any], conversation: Any, labels: list[str] | None) -> None:
        shown, kind = -1, "end"
        for event in in_order(events):
            if labels and event.number != shown:
                console.data(f"[{labels[event.number]}]")
            if event.kind != kind or (kind == "tool" and not event.text):
                self._break(kind)
                if event.kind == "tool":
                    self._write("tool", "Tool call: ")
            shown, kind = event.number, event.kind
            self._write(kind, event.text)
        self._break(kind)

    def _break(self, kind: str) -> None:
        """End the line of what was written before. An answer without text is an empty line."""
        if kind != "end":
            self._write(kind, "\n")

    def _write(self, kind: str, text: str) -> None:
        (console.note if kind == "reasoning" else console.data)(text, newline=False)


class JSON:
    """Each answer as one line, once it is complete."""

    def show(self, events: Iterable[Any], conversation: Any, labels: list[str] | None) -> None:
        for _ in events:
            pass
        for answer in conversation.answers:
            if answer.complete:
                more = {"adapter": answer.adapter, "reasoning": answer.reasoning, "tool_calls": answer.tools}
                answer_event(answer.last, answer.text, **more)


def in_order(events: Iterable[Any]) -> Iterator[Any]:
    """The events of several answers, all of one before those of the next."""
    waiting: dict[int, list] = {}
    current = 0
    for event in events:
        waiting.setdefault(event.number, []).append(event)
        while waiting.get(current):
            first = waiting[current].pop(0)
            current += first.kind == "end"
            yield first
    for number in sorted(waiting):  # of answers that were stopped
        yield from waiting[number]
