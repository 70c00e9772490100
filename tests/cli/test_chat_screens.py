"""How ``chat`` shows answers on a terminal: Markdown block by block, nothing twice, several side by side."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mlx_lora.cli.chat.rendered import Block, Rendered
from mlx_lora.cli.chat.screens import JSON, Plain, in_order, screen_for
from mlx_lora.serving.conversation import Event

MARKDOWN = """\
# Title

Some *text*, `code` and
more.

1. one

   still one

2. two

```python
x = 1

y = 2
```

| a | b |
|---|---|
| 1 | 2 |

Heading
-------

> quoted

- [a link](http://example.com)
"""


def blocks(text: str, size: int) -> list[str]:
    """The finished Markdown of an answer that comes in pieces of ``size``, and what grows at the end."""
    block, found = Block(), []
    for at in range(0, len(text), size):
        found += [part for part in block.add("text", text[at : at + size]) if part]
    found += [part for part in block.add("end", "") if part]
    assert block.growing is None
    return [part._renderable.markup for part in found]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_blocks_are_those_of_the_whole_text(size):
    from markdown_it import MarkdownIt

    parts = blocks(MARKDOWN, size)
    assert "".join(parts) == MARKDOWN, "nothing is lost or shown twice"
    whole, each = MarkdownIt().enable("table").render(MARKDOWN), ""
    for part in parts:
        each += MarkdownIt().enable("table").render(part)
    assert each == whole and (size == 1000 or len(parts) == 8)


def screen(width: int = 100, height: int = 10, **options) -> tuple[Rendered, io.StringIO]:
    out = io.StringIO()
    options = {"force_terminal": True, "legacy_windows": False, "color_system": "standard", **options}
    return Rendered(Console(file=out, width=width, height=height, highlight=False, **options)), out


def lasting(out: io.StringIO, width: int, height: int) -> str:
    """What a terminal shows in the end, with all that has scrolled away: it knows the codes that rich writes."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", out.getvalue()):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif code == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            up = int(code[2:-1] or 1)
            assert up < height, "lines that have scrolled away cannot be drawn again"
            row -= up
        elif code.endswith("K"):
            lines[row] = "" if code == "\x1b[2K" else lines[row][:column]
        else:
            assert code[-1] in "mhl", f"unexpected {code!r}"
    return "\n".join(line.rstrip() for line in lines)


def said(text: str, number: int = 0, size: int = 3) -> list[Event]:
    return [*(Event(number, "text", text[at : at + size]) for at in range(0, len(text), size)), Event(number, "end")]


@pytest.fixture(autouse=True)
def draw_always(monkeypatch):
    monkeypatch.setattr("mlx_lora.cli.chat.rendered._INTERVAL", 0)
    monkeypatch.setattr("mlx_lora.cli.chat.rendered._SHARE", 0)


@pytest.mark.parametrize("text", ["word " * 300, "\n".join(f"- item {n}" for n in range(40)), "a\n\n" * 30], ids=len)
def test_an_answer_longer_than_the_screen_is_shown_once(text):
    shown, out = screen(40, 10)
    shown.show(said(text, size=20), None, None)
    words = re.findall(r"\w+", lasting(out, 40, 10))
    assert words == re.findall(r"\w+", text)


@pytest.mark.parametrize("labels", [None, ["base", "pirate"]])
def test_what_grows_is_seen_at_its_end(labels):
    shown, out = screen(100, 10)

    def events():
        yield from said("```\n" + "".join(f"line {n}\n" for n in range(40)))[:-1]
        text = lasting(out, 100, 10)
        assert "line 38" in text and "line 20" not in text and len(text.strip().split("\n")) < 10

    shown.show(events(), None, labels)


def test_all_of_markdown_is_shown_once():
    shown, out = screen()
    shown.show(said(MARKDOWN), None, None)
    text = lasting(out, 100, 10)
    for word in ("Title", "still one", "y = 2", "Heading", "quoted", "a link (http://example.com)"):
        assert text.count(word) == 1, text
    assert "**" not in text and "```" not in text and "\n\n\n" not in text.strip()


def test_reasoning_is_dim_and_calls_are_named():
    shown, out = screen()
    events = [Event(0, "reasoning", "hm\nso"), Event(0, "text", "Yes"), Event(0, "tool", "f(1)"), Event(0, "tool", "")]
    shown.show([*events, Event(0, "tool", "g(2)"), Event(0, "end")], None, None)
    assert "\x1b[2mhm" in out.getvalue()
    assert lasting(out, 100, 10) == "hm\nso\n\nYes\n\nTool call: f(1)\n\nTool call: g(2)\n"


def test_a_stopped_answer_stays_on_the_screen():
    shown, out = screen()
    shown.show(said("half an")[:-1], None, None)
    assert lasting(out, 100, 10).strip() == "half an"


def test_a_model_cannot_send_codes_to_the_terminal():
    shown, out = screen()
    shown.show(said("a \x1b[2J\x1b]0;title\x07 b \x9b31m", size=100), None, None)
    assert "\x1b[2J" not in out.getvalue() and "\x1b]" not in out.getvalue() and "\x9b" not in out.getvalue()


@pytest.mark.parametrize("width, beside", [(120, True), (60, False)])
def test_answers_are_side_by_side_where_there_is_room(width, beside):
    shown, out = screen(width)
    events = [e for three in zip(*(said(f"Answer {n}", n) for n in range(3)), strict=True) for e in three]
    shown.show(events, None, ["base", "pirate", "lawyer"])
    text = lasting(out, width, 10)
    assert (re.search(r"Answer 0.*Answer 1.*Answer 2", text) is not None) == beside
    for word in ("base", "pirate", "lawyer", "Answer 0", "Answer 1", "Answer 2"):
        assert text.count(word) == 1, text


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown, out = screen()
    shown.show([*said("# A\n\n`code`"), Event(0, "tool", "f"), Event(0, "end")], None, None)
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-7]|4[0-7]|9[0-7]|10[0-7])\b[0-9;]*m", out.getvalue())


def test_which_screen(monkeypatch):
    assert type(screen_for(False)) is Plain and type(screen_for(True)) is JSON
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for term, kind in (("dumb", Plain), ("xterm", Rendered)):
        monkeypatch.setenv("TERM", term)
        assert type(screen_for(False)) is kind


def test_events_of_several_answers_in_order():
    events = [Event(1, "text", "b"), Event(0, "text", "a"), Event(1, "end"), Event(0, "end"), Event(2, "text", "c")]
    assert "".join(event.text or "." for event in in_order(events)) == "a.b.c"
    assert [e.text for e in in_order([Event(1, "text", "b"), Event(0, "text", "a")])] == ["a", "b"]
