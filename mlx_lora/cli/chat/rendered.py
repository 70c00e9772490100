"""Answers as Markdown on a terminal, by rich.

Each block of Markdown (a paragraph, a list, a code block) is printed once, when the next one begins. The block that
still grows is drawn below, as far as the screen has room, and drawn again as it changes. So nothing is printed twice,
however long the answer is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .screens import in_order

_INTERVAL = 0.08  # seconds between drawings, at least
_SHARE = 5  # and so many times as long as a drawing takes, so that long answers are not held up
_NARROWEST = 36  # columns of an answer next to another one
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model's text must not move the cursor


class Rendered:
    """Shows answers on the terminal at stdout; several side by side where it is wide enough."""

    def __init__(self, terminal: Any = None):
        from rich.console import Console

        self.console = terminal or Console(highlight=False)

    def show(self, events: Iterable[Any], conversation: Any, labels: list[str] | None) -> None:
        if labels and self.console.width >= _NARROWEST * len(labels):
            return self._side_by_side(events, labels)
        with Tail(self.console) as tail:
            block, shown = Block(), -1
            for event in in_order(events):
                if event.number != shown:
                    if labels:
                        self.console.rule(labels[event.number], align="left")
                    shown, block = event.number, Block()
                for finished in block.add(event.kind, event.text):
                    tail.clear()
                    self.console.print(finished)
                tail.draw(block.growing)
            tail.clear()
            if block.growing is not None:  # the answer was stopped
                self.console.print(block.growing)

    def _side_by_side(self, events: Iterable[Any], labels: list[str]) -> None:
        from rich.console import Group
        from rich.table import Table

        blocks: list[Block] = [Block() for _ in labels]
        finished: list[list[Any]] = [[] for _ in labels]

        def table() -> Any:
            grid = Table(expand=True, show_edge=False, pad_edge=False)
            for label in labels:
                grid.add_column(label, ratio=1, overflow="fold")
            grid.add_row(*(Group(*done, block.growing or "") for done, block in zip(finished, blocks, strict=True)))
            return grid

        with Tail(self.console) as tail:
            for event in events:
                finished[event.number] += blocks[event.number].add(event.kind, event.text)
                tail.draw(table)
        self.console.print(table())


class Block:
    """The text of one answer, block by block.

    growing: what is to be seen of the block that is not finished; None where there is nothing.
    """

    def __init__(self):
        self._kind, self._text, self._blocks = "end", "", 0

    @property
    def growing(self) -> Any:
        return _shown(self._kind, self._text) if self._text.strip() else None

    def add(self, kind: str, text: str) -> Iterator[Any]:
        """The blocks that ``text`` finishes, to be printed."""
        if kind != self._kind or (kind == "tool" and not text):
            yield from self._finish(len(self._text))
            self._kind = kind
        self._text += _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        if "\n" in text:
            yield from self._finish(self._finished())

    def _finish(self, length: int) -> Iterator[Any]:
        done, self._text = self._text[:length], self._text[length:]
        if done.strip():
            if self._blocks and self._kind != "reasoning":
                yield ""
            self._blocks += 1
            yield _shown(self._kind, done)

    def _finished(self) -> int:
        """Characters in the blocks that no further text can change: all before the last one that has a whole line."""
        whole = self._text[: self._text.rfind("\n") + 1]
        if self._kind != "text":
            return len(whole) if self._kind == "reasoning" else 0
        from markdown_it import MarkdownIt

        tokens = MarkdownIt().enable("table").enable("strikethrough").parse(whole)
        starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
        return sum(len(line) for line in whole.splitlines(keepends=True)[: starts[-1]]) if starts else 0


def _shown(kind: str, text: str) -> Any:
    from rich.markdown import Markdown
    from rich.text import Text

    if kind == "text":
        return _Lines(Markdown(text, code_theme="ansi_dark", hyperlinks=False))
    if kind == "tool":
        return Text(f"Tool call: {text.strip()}", style="cyan")
    return Text(text.rstrip("\n"), style="dim")


class Tail:
    """The end of something that grows, at the bottom of the screen; gone when the context ends."""

    def __init__(self, console: Any):
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="crop")
        self._next = 0.0  # time of the next drawing

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: Any) -> None:
        self.clear()

    def draw(self, renderable: Any) -> None:
        """Draw a renderable, or what a function makes. Too soon after the last time nothing is drawn."""
        since = time.monotonic()
        if renderable is None or since < self._next:
            return
        if not self._live.is_started:
            self._live.start()
        shown = renderable() if callable(renderable) else renderable
        self._live.update(_Lines(shown, max(1, self._console.height - 2)), refresh=True)
        now = time.monotonic()
        self._next = now + max(_INTERVAL, _SHARE * (now - since))

    def clear(self) -> None:
        """Take away what was drawn."""
        if self._live.is_started:
            self._live.update("", refresh=True)
            self._live.stop()


class _Lines:
    """A renderable without the blank lines around it: its last lines where ``most`` is given."""

    def __init__(self, renderable: Any, most: int = 0):
        self._renderable, self._most = renderable, most

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        lines = console.render_lines(self._renderable, options.update(height=None), pad=False)
        seen = [number for number, line in enumerate(lines) if "".join(part.text for part in line).strip()]
        for line in lines[seen[0] : seen[-1] + 1][-self._most :] if seen else []:
            yield from line
            yield Segment.line()
