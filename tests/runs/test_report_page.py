"""``report.html``: one well-formed file without network or scripts, right curves, hostile text, several runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_lora.errors import ConfigError
from mlx_lora.runs.log import LOG
from mlx_lora.runs.report import read_histories, summary, write_report
from mlx_lora.runs.report.charts import Line, draw, smoothed, thinned
from mlx_lora.runs.report.history import TRAIN, VALID, Curve
from mlx_lora.runs.report.text import compact, duration, shown

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text' "
    "\x00\x1b[31m \u202e\ud83d {{ 7*7 }}"
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


def header(**changes) -> dict:
    settings = {"model": "base", "adapter": {"method": "lora", "rank": 8}, "optimizer": {"learning_rate": 1e-4}}
    data = {"train": {"rows": 1200, "kept": 1200, "tokens": 51234, "learned_tokens": 30000, "longest": 80}}
    fixed = {"kind": "Run", "time": 1000.0, "iteration": 0, "settings": settings, "data": data}
    return {**fixed, "base": {"model_type": "llama"}, "machine": {"chip": "M4"}, "versions": {"mlx": "1"}, **changes}


def report(iteration: int, loss: float | None, **metrics) -> dict:
    fields = {"learning_rate": 1e-4, "tokens_per_second": 512.0, "peak_memory": 3.25, "grad_norm": 1.5}
    fields |= {"kind": "TrainReport", "time": 1000.0 + iteration, "iteration": iteration, "train_loss": loss}
    return {**fields, "trained_tokens": 100 * iteration, "metrics": metrics}


def validation(iteration: int, loss: float | None, **metrics) -> dict:
    return {
        "kind": "ValReport",
        "time": 1000.0 + iteration,
        "iteration": iteration,
        "val_loss": loss,
        "metrics": metrics,
    }


def answered(of: str, iteration: int, *answers: tuple[str, str, str]) -> dict:
    given = [dict(zip(("question", "expected", "given"), answer, strict=True)) for answer in answers]
    return {"kind": "Answers", "time": 1000.0, "of": of, "iteration": iteration, "why": "", "answers": given}


PLAIN = [
    header(),
    {"kind": "Started", "time": 1000.0, "iteration": 0, "iters": 40, "trainable": 10, "parameters": 1000, "modules": 2},
    answered("base", 0, ("What is lost?", "the red lamp", "nothing")),
    validation(0, 4.0),
    *(report(i, 4.0 / i) for i in range(1, 41)),
    *(validation(i, loss) for i, loss in ((10, 2.0), (20, 1.25), (30, 1.5), (40, 1.75))),
    answered("first", 20, ("What is lost?", "the red lamp", "the blue lamp")),
    answered("best", 40, ("What is lost?", "the red lamp", "the red lamp")),
    {"kind": "Done", "time": 1065.0, "iteration": 40, "stopped": False, "peak_memory": 3.25},
]


def written(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class Page(HTMLParser):
    """A page's text, tags and attributes; fails where a tag is closed that is not open."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page_of(tmp_path: Path, *runs: list[dict]) -> tuple[str, Page]:
    folders = [written(tmp_path / f"run-{i}", records) for i, records in enumerate(runs)]
    write_report(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    return text, Page(text)


def checked(text: str, page: Page) -> None:
    """One file: no scripts, no handlers, no address, unique ids, charts that a screen reader can name."""
    assert not {"script", "link", "img", "iframe", "object", "use-external"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    outside = [a for a in page.attributes if a[1] in ("href", "src", "xlink:href") and not a[2].startswith("#")]
    assert not outside and "url(" not in re.sub(r"url\(#[\w.-]+\)", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|data:", text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([\w.-]+)\)", text) + [v[1:] for _, n, v in page.attributes if n == "href"]
    assert set(used) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.find("title").text and root.find("desc").text
        assert set(root.get("aria-labelledby").split()) <= set(ids)
        assert not re.search(r"#0[a-d]0[a-d]", svg) and "font-family" not in svg


def test_a_page(tmp_path):
    text, page = page_of(tmp_path, PLAIN)
    checked(text, page)
    said = " ".join(" ".join(page.text).split())
    for part in (
        *("run-0", "base · lora · rank 8", "Finished 40 iterations in 1 min 05 s", "Best validation loss 1.25"),
        *("at iteration 20", "Last validation loss 1.75", "Peak memory 3.25 GB", "51,234", "learning_rate 1e-4"),
        *("Gradient norm", "Learning rate", "Speed", "What is lost?", "base: 0 of 1 equal", "M4"),
        *("first and best · 20", "last · 40 ✓"),
    ):
        assert part in said, part
    assert "<mark>blue</mark>" in text and "<mark>nothing" not in text  # nothing in common: no words are marked
    assert page.tags.count("svg") == 6 and "prefers-color-scheme: dark" in text and "currentColor" not in page.tags


def test_the_best_is_what_the_run_says(tmp_path):
    records = [*PLAIN[:-1], {"kind": "NewBest", "iteration": 30, "name": "exact_match", "value": 0.9}]
    records += [validation(30, 1.5, exact_match=0.9), answered("best", 30, ("q", "e", "g")), PLAIN[-1]]
    run = read_histories([written(tmp_path / "a", records)])[0]
    assert run.best == (30, "exact_match", 0.9) and run.curves["exact_match"][VALID].values == [0.9]
    assert summary(run)["best_name"] == "exact_match"
    _, page = page_of(tmp_path, records)
    said = " ".join(" ".join(page.text).split())
    assert "Best validation 0.9 exact_match, at iteration 30" in said and "best · 30" in said


def test_metrics_have_charts(tmp_path):
    records = [header(), *(report(i, 1.0, **{"rewards/margins": i / 10}) for i in range(1, 5))]
    records += [validation(4, 1.0, **{"rewards/margins": 0.3, "<b>bold</b>": 1.0})]
    text, page = page_of(tmp_path, records)
    checked(text, page)
    assert "rewards/margins" in "".join(page.text) and "<b>" not in text
    assert "training: 4 points over iterations 1 to 4, from 0.1 to 0.4" in text


def preference_run(rate: float = 1e-4) -> list[dict]:
    settings = {"model": "base", "train": {"loss": "dpo", "patience": 2}, "optimizer": {"learning_rate": rate}}
    sides = {f"{of}/{side}": 0.5 for of in ("rewards", "logps") for side in ("chosen", "rejected")}
    plan = {"kind": "Planned", "peak": 2_500_000_000, "limit": 16_000_000_000, "seconds": None, "padding": 0.125}
    prefix = {"kind": "PrefixCache", "layers": 20, "of": 28, "bytes": 1_500_000_000, "free": 1, "place": "memory"}
    values = ((0, 0.0), (2, 0.75), (4, 0.5), (6, 0.25))
    return [
        *(header(settings=settings), plan, prefix, {"kind": "Started", "iters": 40}),
        answered("base", 0, ("What is lost?", "the red lamp", "nothing"), (f"Only {rate}?", "yes", "no")),
        *(report(i, 0.7, **sides, **{"rewards/accuracies": 0.5}) for i in (2, 4, 6)),
        *(validation(i, 0.7, **sides, **{"rewards/accuracies": value}) for i, value in values),
        {"kind": "NewBest", "iteration": 2, "name": "rewards/accuracies", "value": 0.75},
        answered("best", 2, ("What is lost?", "the red lamp", f"lamp {rate}")),
        {"kind": "Done", "time": 1010.0, "iteration": 6, "stopped": False, "reason": "patience"},
        {"kind": "TestReport", "loss": 0.6, "perplexity": None, "metrics": {"rewards/accuracies": rate, **sides}},
    ]


def test_a_preference_run_that_ended_early(tmp_path):
    text, page = page_of(tmp_path, preference_run())
    checked(text, page)
    said = " ".join(" ".join(page.text).split())
    for part in (
        *("Ended early after 6 of 40 iterations in 10 s: 2 validations in a row brought no improvement",),
        *("Best validation 0.75 rewards/accuracies, at iteration 2", "Test loss 0.6 Test 1e-4 rewards/accuracies"),
        *("Peak memory 3.25 GB planned 2.50 GB", "peak memory, planned 2.50 GB peak memory, measured 3.25 GB"),
        *(
            "time, planned not known time, measured 10 s",
            "padding 12.5 %",
            "size 1.50 GB kept in memory",
        ),
        *("rewards chosen, training chosen, validation rejected, training rejected, validation rewards chosen",),
        *("rewards/accuracies training validation best ended early", "chosen the red lamp"),
    ):
        assert part in said, part
    assert "nats per token" not in said and "perplexity" not in said and "chosen answer are marked" in said
    assert said.count("ended early") == 1 and page.tags.count("svg") == 9


def test_answers_to_the_same_prompts_are_side_by_side(tmp_path):
    text, page = page_of(tmp_path, preference_run(), preference_run(2e-4))
    checked(text, page)
    said = " ".join(" ".join(page.text).split())
    assert "What is lost? chosen the red lamp base nothing run-0 lamp 0.0001 run-1 lamp 0.0002" in said
    assert "Only" not in said and "run-0: 0 of 1 equal, run-1: 0 of 1 equal." in said
    assert "Test rewards/accuracies 1e-4 2e-4" in said and '<td class="lowest">2e-4</td>' in text
    assert "rewards run-0, chosen, validation run-0, rejected, validation run-1, chosen" in said
    other = [{**r, "answers": []} if r["kind"] == "Answers" else r for r in preference_run()]
    _, page = page_of(tmp_path, preference_run(), other)
    assert "No answers: the runs were not asked the same prompts." in " ".join(page.text)


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    settings = {"model": HOSTILE, "adapter": {HOSTILE: HOSTILE, "nested": {"a": [HOSTILE]}}}
    long = "word " * 50_000
    records = [
        header(settings=settings, machine={"chip": HOSTILE}, data={HOSTILE: {"rows": 1}}),
        {"kind": "Warned", "text": HOSTILE},
        {"kind": "DataLoaded", "warnings": [HOSTILE]},
        report(1, 1.0, **{HOSTILE: 1.0}),
        answered("base", 0, (HOSTILE, HOSTILE, HOSTILE), ("", "", ""), (long, long, long + "x"), ("a\nb", "\t", "  ")),
        answered(HOSTILE, 1, (HOSTILE, "", "")),
    ]
    text, page = page_of(tmp_path, records)
    checked(text, page)
    assert "alert(1)" in "".join(page.text) and "{{ 7*7 }}" in "".join(page.text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text) and "(empty)" in text
    assert "250,000 characters in all" in text and len(text) < 400_000


@pytest.mark.parametrize(
    "records",
    [
        [header()],
        [report(1, None)],
        [header(settings=None, data=[1], base="x", machine=None, versions=3), report(1, 1.0)],
        [header(), validation(0, None), {"kind": "Done"}, {"kind": "NewBest"}, {"kind": "Answers", "answers": [3]}],
        [
            header(),
            report(1, 1e30),
            report(2, -1.0),
            report(3, 0.0),
            {**report(4, 1.0), "iteration": "x", "train_loss": "y"},
            report(5, True),
        ],
        [header(time="noon"), report(1, 1.0), {"kind": "TrainReport", "iteration": 2, "metrics": [1]}],
        [header(), *(report(i, 5.0) for i in range(1, 4))],
    ],
)
def test_odd_logs(tmp_path, records):
    text, page = page_of(tmp_path, records)
    checked(text, page)


def test_why_a_run_has_no_answers(tmp_path):
    no = {"kind": "Answers", "of": "base", "iteration": 0, "why": "the run has no validation rows", "answers": []}
    assert "No answers: the run has no validation rows." in page_of(tmp_path, [header(), no])[0]


def test_a_run_that_is_not_finished(tmp_path):
    records = [*PLAIN[:20], PLAIN[-1], header(time=5000.0), PLAIN[1], report(4, 1.0) | {"time": 5030.0}]
    said = page_of(tmp_path, records)[0]
    assert "Not finished: 40 of 40 iterations, 1 min 35 s" in said


def test_unreadable_lines_are_mentioned(tmp_path):
    folder = written(tmp_path / "a", PLAIN)
    with open(folder / LOG, "a") as file:
        file.write('{"kind": "Tra')
    write_report([folder], tmp_path / "page.html")
    assert "1 line of the log could not be read" in (tmp_path / "page.html").read_text()


def test_a_comparison(tmp_path):
    other = [{**record} for record in PLAIN]
    other[0] = header(settings={"model": "base", "adapter": {"method": "lora", "rank": 16}, "train": {"seed": 0}})
    other = [{**r, "val_loss": r["val_loss"] / 2} if r["kind"] == "ValReport" else r for r in other]
    text, page = page_of(tmp_path, PLAIN, other, [report(1, 2.0)])
    checked(text, page)
    said = " ".join(" ".join(page.text).split())
    assert "3 runs compared" in said and "Best validation loss 1.25 0.625 –" in said
    assert "adapter.rank 8 16 –" in said and "adapter.method" not in said
    assert '<td class="lowest">0.625</td>' in text
    assert "run-0, training: 40 points" in text and "run-1, validation: 5 points" in text


def test_all_bad_folders_are_named_at_once(tmp_path):
    good, empty = written(tmp_path / "good", PLAIN), tmp_path / "empty"
    empty.mkdir()
    written(tmp_path / "other", [{"kind": "Warned", "text": "x"}])
    (tmp_path / "file").touch()
    names = ("none", "empty", "good", "other", "file", "good/../good")
    with pytest.raises(ConfigError) as caught:
        write_report([tmp_path / name for name in names], tmp_path / "page.html")
    said = caught.value.message
    for part in ("none: does not exist", f"empty: holds no {LOG}", "file: is not a folder", "holds no line of a run"):
        assert part in said
    assert said.count("\n") == 4 and "named twice" in said and not (tmp_path / "page.html").exists()
    assert [run.name for run in read_histories([good, written(tmp_path / "b" / "good", PLAIN)])] != ["good", "good"]


def test_thinning_keeps_the_mean_and_passes_over_nan():
    curve = Curve(list(range(1000)), [float(i) if i % 10 else None for i in range(1000)])
    x, y = thinned(curve, 100)
    assert len(x) == len(y) == 100 and x[0] == 4.5 and y[0] == 5.0
    assert list(smoothed(thinned(Curve([1, 2, 3], [1.0, None, 3.0]))[1])) == [1.0, 2.0, 3.0]
    assert draw("a", "none", [Line("x", Curve([1, 2], [None, None]))], (4, 2)).startswith("<svg")


def test_long_runs_give_small_pages(tmp_path):
    text, page = page_of(tmp_path, [header(), *(report(i, 1.0 + i % 7, m=float(i)) for i in range(1, 20_001))])
    assert len(text) < 500_000 and page.tags.count("tr") < 250


def test_drawing_changes_no_setting_of_matplotlib():
    code = (
        "import sys, matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "from mlx_lora.runs.report.charts import Line, draw\n"
        "from mlx_lora.runs.report.history import Curve\n"
        "one = draw('a', 't', [Line('x', Curve([1, 2], [1.0, 2.0]))], (4, 2))\n"
        "assert one == draw('a', 't', [Line('x', Curve([1, 2], [1.0, 2.0]))], (4, 2))\n"
        "assert before == matplotlib.rcParams.copy() and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_matplotlib_waits_for_the_first_chart():
    code = "import sys, mlx_lora.runs, mlx_lora.runs.report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numbers_for_readers():
    values = [None, True, 3, 12345, 0.00012345, 0.5, 1.0, 1234.5, 1e7, float("inf"), [1, 2], {"a": 0.5}]
    said = ["–", "yes", "3", "12,345", "1.23e-4", "0.5", "1", "1,234", "1e7", "inf", "1, 2", "a: 0.5"]
    assert [shown(value) for value in values] == said
    assert [compact(n) for n in (999, 9999, 12345, 1234567, 2e9, None)] == [
        *("999", "9,999", "12.3 k", "1.23 M", "2 B", "–"),
    ]
    assert [duration(s) for s in (5, 65, 7500)] == ["5 s", "1 min 05 s", "2 h 05 min"]
    assert TRAIN != VALID
