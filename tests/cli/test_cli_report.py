"""``mlx-lora report``, and the bar: the small curve, its width, and terminals without block characters."""

from __future__ import annotations

import io
import json
import os
import re
from types import SimpleNamespace

import pytest

from mlx_lora.cli import console
from mlx_lora.cli.main import main
from mlx_lora.cli.reports import Display
from mlx_lora.cli.sparkline import ASCII, BLOCKS, sparkline, status

RUN = [
    {"kind": "Run", "time": 1.0, "iteration": 0, "settings": {"model": "m"}},
    {"kind": "TrainReport", "time": 2.0, "iteration": 1, "train_loss": 2.0, "peak_memory": 1.0},
    {"kind": "ValReport", "time": 3.0, "iteration": 1, "val_loss": 1.5},
    {"kind": "Done", "time": 4.0, "iteration": 1, "stopped": False},
]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RUN))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["report", *args])
    return end.value.code


def test_one_run(runs, capsys):
    assert call("one") == 0
    assert capsys.readouterr().out == "one/report.html\n" and (runs / "one" / "report.html").exists()


def test_several_runs(runs, capsys):
    assert call("one", "two") == 0 and (runs / "comparison.html").exists()
    assert call("one", "two", "--output", "deep/er/page.html", "--json") == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first)["folder"] == "one" and json.loads(second)["best_value"] == 1.5
    assert json.loads(second)["page"] == "deep/er/page.html" and (runs / "deep" / "er" / "page.html").exists()


def test_open(runs, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    assert call("one", "--open") == 0
    assert opened == [(runs / "one" / "report.html").as_uri()]


def test_bad_folders_and_outputs(runs, capsys):
    assert call("one", "none", "nowhere") == 2
    err = capsys.readouterr().err
    assert "none: does not exist" in err and "nowhere: does not exist" in err and "Hint: " in err
    (runs / "dir").mkdir()
    assert call("one", "--output", "dir") == 2
    assert "dir: is a folder" in capsys.readouterr().err and list((runs / "dir").iterdir()) == []
    assert not [path for path in runs.iterdir() if path.name.startswith(".")]


def test_a_torn_line_is_mentioned(runs, capsys):
    with open(runs / "one" / "log.jsonl", "a") as file:
        file.write('{"kind"')
    assert call("one") == 0
    assert "1 line of the log" in capsys.readouterr().err


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([7, 6, 5, 4, 3, 2, 1, 0], 8) == BLOCKS[::-1]
    assert sparkline([1, 1, 9, 9], 2, ASCII) == "_#"
    assert sparkline([3.0, 3.0], 5) == "▁▁"
    assert sparkline([None, float("nan"), 1, float("inf"), 2], 9) == "▁█"
    assert sparkline([], 5) == "" and sparkline([1, 2], 0) == ""


@pytest.mark.parametrize("width", [0, 3, 12, 25, 35, 42, 80, 200])
def test_the_status_fits_its_width(width):
    losses = [8.0 / (i + 1) for i in range(100)]
    text = status(width, losses, 12345.6, 3.21, BLOCKS)
    assert len(text) <= width
    assert all(len(curve) <= 20 for curve in re.findall(f"[{BLOCKS}]+", text))
    if width >= 42:
        assert text.startswith(" loss 0.080 █") and text.endswith(" 12,346 tok/s 3.21 GB")
    assert status(width, [None], None, None, BLOCKS) == ""


class Terminal(io.TextIOWrapper):
    """A terminal of 80 columns."""

    def __init__(self, encoding: str):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        text = self.buffer.getvalue().decode(self.encoding)
        return [line for line in re.split(r"[\r\n]|\x1b\[A", text) if line.strip()]


def bar_on(terminal, monkeypatch, term: str = "xterm-256color", hidden: bool = False) -> list[str]:
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (80, 24))
    display = Display(as_json=hidden)
    report = dict(iteration=500, train_loss=1.0, learning_rate=1e-4, iterations_per_second=2.0, trained_tokens=5)
    report["metrics"] = {}
    rhythm = {"steps_per_eval": 200, "save_every": 100}
    display.show("Started", SimpleNamespace(iters=1000, iteration=499, trainable=1, parameters=10, modules=1, **rhythm))
    display.bar._bar.mininterval = 0
    for i in range(30):
        display.show("Progress", SimpleNamespace(iteration=500 + i, loss=8.0 / (i + 1)))
        if i == 10 and not hidden:
            display.show("TrainReport", SimpleNamespace(**report, tokens_per_second=1234.5, peak_memory=3.21))
    display.bar.close()
    return terminal.shown()


def test_the_bar_in_80_columns(monkeypatch):
    shown = [line for line in bar_on(Terminal("utf-8"), monkeypatch) if "tok/s" in line and "|" in line]
    assert shown and max(map(len, shown)) <= 80
    text = rf"53%\|.+\| 52\d/1000 loss 0\.2\d\d [{BLOCKS}]{{8,}} 1,234 tok/s 3\.21 GB \d\d:\d\d left"
    assert re.search(text, shown[-1])


@pytest.mark.parametrize(("encoding", "term"), [("ascii", "xterm"), ("latin-1", "xterm"), ("utf-8", "dumb")])
def test_terminals_without_block_characters(encoding, term, monkeypatch):
    shown = bar_on(Terminal(encoding), monkeypatch, term)
    assert any("tok/s" in line and re.search(r"loss 0\.\d+ [_.,\-=+*#]{5,} ", line) for line in shown)
    assert all(line.isascii() for line in shown)


def test_no_bar_in_a_file_and_with_json(monkeypatch, capsys):
    file = Terminal("utf-8")
    monkeypatch.setattr(file, "isatty", lambda: False, raising=False)
    assert all("|" not in line for line in bar_on(file, monkeypatch))
    assert all("|" not in line for line in bar_on(Terminal("utf-8"), monkeypatch, hidden=True))


def test_events_hold_no_nan(capsys):
    console.event("X", {"a": float("nan"), "metrics": {"b": float("inf"), "c": 1}, "path": os.curdir})
    assert json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name)) == {
        "event": "X",
        "a": None,
        "metrics": {"b": None, "c": 1},
        "path": ".",
    }


def test_only_a_report_is_replaced(tmp_path, capsys):
    from mlx_lora.cli.main import main

    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"kind": "Run", "time": 1}\n')
    (run / "mine.html").write_text("<!doctype html>my page")
    before = (run / "log.jsonl").read_bytes()
    for output, text in (
        (run / "log.jsonl", "does not end in .html"),
        (run / "adapters.safetensors", "does not end in .html"),
        (run, "is a folder"),
        (run / "mine.html", "is not a report"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), "--output", str(output)])
        assert end.value.code in (1, 2) and text in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before and (run / "mine.html").read_text() == "<!doctype html>my page"
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), "--output", str(run / "page.html")])
        assert end.value.code == 0
