"""Decide which row is admitted next and which lane computes next. This module knows nothing about models."""

from __future__ import annotations

import time
from collections import Counter

from .requests import Row

Name = tuple  # of a lane, whose rows need the same adapters on the model


class Schedule:
    """The rows of an engine.

    It is fair between adapters: the requests of each adapter are numbered by round, one per round, and the lowest
    number is admitted first. So many requests for one adapter delay other adapters by only one round, and no request
    waits for ever.

    Args:
        turn_seconds: how long a lane computes while others have rows.
    """

    def __init__(self, turn_seconds: float):
        self.turn_seconds = turn_seconds
        self.waiting: list[tuple[Name, Row]] = []
        self.active: dict[Name, list[Row]] = {}
        self._round = 0  # round of the last admitted row
        self._rounds: dict[str | None, int] = {}  # adapter -> round of its newest row
        self._turn: tuple[Name, float] | None = None  # the current lane, and when its turn began
        self._served: dict[Name, float] = {}  # when a lane's last turn ended

    @property
    def rows(self) -> list[Row]:
        return [*(row for _, row in self.waiting), *self.computed]

    @property
    def computed(self) -> list[Row]:
        """The rows that are in a lane."""
        return [row for rows in list(self.active.values()) for row in rows]

    def add(self, name: Name, row: Row) -> None:
        """Queue a row for lane ``name``."""
        if row.round is None:
            adapter = row.request.adapter
            self._rounds = {each: last for each, last in self._rounds.items() if last > self._round}
            row.round = self._rounds[adapter] = 1 + self._rounds.get(adapter, self._round)
        self.waiting.append((name, row))

    def first(self) -> tuple[Name, Row] | None:
        """The row to admit next, with its lane: by round, then fewest rows of its adapter, then age."""
        beside = Counter(row.request.adapter for row in self.computed)
        order = lambda each: (each[1].round, beside[each[1].request.adapter], each[1].arrived)  # noqa: E731
        return min(self.waiting, key=order, default=None)

    def admit(self, name: Name, row: Row) -> None:
        """Move a waiting row into lane ``name``."""
        self.waiting.remove((name, row))
        self.active.setdefault(name, []).append(row)
        self._round = max(self._round, row.round)

    def remove(self, row: Row) -> Name | None:
        """Remove a row. Returns the lane that it was in."""
        self.waiting = [each for each in self.waiting if each[1] is not row]
        name = next((name for name, rows in self.active.items() if row in rows), None)
        if name is not None:
            self.active[name].remove(row)
            if not self.active[name]:
                del self.active[name]
                self._served.pop(name, None)
        return name

    def next(self) -> Name | None:
        """Return the lane to compute: the current one, unless its time is over and another lane has rows."""
        now, names = time.perf_counter(), list(self.active)
        if self._turn is not None and self._turn[0] in names:
            name, since = self._turn
            if len(names) == 1 or now - since < self.turn_seconds:
                return name
            names.remove(name)
            self._served[name] = now
        name = min(names, key=lambda each: self._served.get(each, 0.0), default=None)
        self._turn = None if name is None else (name, now)
        return name
