"""Whole runs of two processes: killed, interrupted, resumed, and equal to a run of one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from conftest import assert_close
from mlx_lora.cli.main import main
from mlx_lora.runs import peers
from mlx_lora.runs.log import read_log
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import TrainingState
from ranks import Ranks

# `mlx-lora`, once for each list of words. Answers and charts are short, as in ``conftest``.
MAIN = """
import json, os, sys
rank = os.environ["MLX_RANK"]
from mlx_lora.cli import main as commands
commands._LAUNCHER = 0  # seconds in which mlx.launch would end this process
from mlx_lora.runs import held_out
from mlx_lora.runs.report import panels
held_out.MAX_TOKENS, panels.draw = 6, lambda *_: "<svg></svg>"
for words in json.loads(sys.argv[1]):
    try:
        commands.main([word.replace("RANK", rank) for word in words])
    except SystemExit as end:
        if end.code:
            raise
"""
METRIC = "def same(given, expected):\n    return 1.0\n"
CLOSED = "ended unexpectedly: its connection was closed"


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows to train on, and two folders whose rows differ."""
    for name, left_out in (("rows", 0), ("rows-0", 0), ("rows-1", 1)):
        (tmp_path / name).mkdir()
        for split, count in (("train", 32), ("valid", 8)):
            lines = [json.dumps(row) + "\n" for row in skill.rows(split, count)][left_out:]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "metric.py").write_text(METRIC)
    return tmp_path / "rows"


def flags(folder: Path, rows: Path, iters: int, *more: object) -> list[str]:
    options = {"model": PATH, "data": rows, "adapter-path": folder, "iters": iters, "batch-size": 4}
    options |= {"steps-per-eval": 4, "save-every": 3, "val-batches": 1, "rank": 2, "peer-timeout": 120}
    options |= {"report-prompts": 1}
    return ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value)), *map(str, more)]


def train(folder: Path, *runs: list[str]) -> Ranks:
    return Ranks(folder, 2, "-c", MAIN, json.dumps(runs))


def done(folder: Path) -> int:
    return TrainingState.load(folder / "training_state.safetensors").iteration


def test_a_run_is_killed_resumed_interrupted_and_resumed_again(rows, tmp_path):
    out = tmp_path / "out"
    with train(tmp_path, flags(out, rows, 10**4)) as ranks:
        ranks.wait_for("out/0000003_adapters.safetensors")
        ranks.signal(signal.SIGKILL, 1)
        assert ranks.end() == [1, -signal.SIGKILL]
    assert ranks.output.count(f"Error: rank 1 (127.0.0.1) {CLOSED}") == 1
    first = done(out)
    assert first >= 3

    with train(tmp_path, flags(out, rows, 10**4, "--resume")) as ranks:
        ranks.wait_for(f"out/{first // 3 * 3 + 3:07d}_adapters.safetensors")
        ranks.signal(signal.SIGINT, 0, 1)
        assert ranks.end() == [130, 130] and "\nError: " not in ranks.output
    second = done(out)
    assert second > first

    # In the same processes: the rest of the run, then one with other rows in each process, which is refused.
    other = flags(tmp_path / "other", tmp_path / "rows-RANK", 3)
    with train(tmp_path, flags(out, rows, second + 2, "--resume"), other) as ranks:
        ranks.end()
    output = ranks.output
    assert f"Iteration {second + 2:>5}: saved" in output and output.count("Next") == 1
    assert not list(out.glob(".[a-z]*"))  # no lock and no temporary folder
    for said in ranks.outputs:
        assert said.count("would not train the same") == 1 and "data.train: [" in said
    assert not list((tmp_path / "other").glob("*.safetensors"))


def test_two_processes_train_and_record_as_one(rows, tmp_path):
    steering = ["--metric", f"{tmp_path / 'metric.py'}:same", "--metric-rows", 2, "--metric-max-tokens", 4]
    steering += ["--best-by", "same", "--patience", 2, "--keep", 2, "--save-every", 1, "--steps-per-eval", 2]
    common = ["--learning-rate", 1e-3]
    runs = {"padded": [40, *common, *steering], "packed": [6, *common, "--pack", "--max-seq-length", 128]}
    both = {name: [flags(tmp_path / count / name, rows, *words) for count in "12"] for name, words in runs.items()}
    with train(tmp_path, *(two for _, two in both.values())) as ranks:
        assert ranks.end() == [0, 0] and ranks.output.count("Next") == 2, ranks.output
    for one, _ in both.values():
        with pytest.raises(SystemExit) as end:
            main(one)
        assert not end.value.code
    for name in runs:
        one, two = (tmp_path / count / name for count in "12")
        expected, found = (mx.load(str(folder / "adapters.safetensors")) for folder in (one, two))
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            assert_close(found[path], array, 1e-3, path)  # Adam divides by the root of small squares
        names, here = ({p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (one, two))
        assert here == names and "report.html" in here
        records, here = (read_log(folder).records for folder in (one, two))
        assert [(r["kind"], r.get("iteration"), r.get("of")) for r in here] == [
            (r["kind"], r.get("iteration"), r.get("of")) for r in records
        ]
        base, base_here = (next(r["answers"] for r in all if r["kind"] == "Answers") for all in (records, here))
        assert base_here == base and here[0]["machine"]["processes"] == 2
    assert {p.name for p in (tmp_path / "2" / "padded").glob("0*")} == {
        f"{iteration:07d}_adapters.safetensors"
        for iteration in (2, 5, 6)  # the best one, and the last two
    }
    assert done(tmp_path / "2" / "padded") == 6  # ended by its patience


def test_answers_metrics_and_pages_are_work_that_is_waited_for(rows, tmp_path, monkeypatch):
    notes: list[bool] = []
    monkeypatch.setattr(peers, "_watch", SimpleNamespace(note=notes.append))
    metric = ["--metric", f"{tmp_path / 'metric.py'}:same", "--metric-rows", 2, "--metric-max-tokens", 2]
    with pytest.raises(SystemExit):
        main(flags(tmp_path / "out", rows, 2, *metric))
    # Before and after the training: answers for the metric, the metric, and the report's answers. Then the page.
    assert notes == [True, False] * 7
