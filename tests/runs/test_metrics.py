"""Metrics of generated answers: their values, how they are named, and that measuring them trains nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig, runs
from mlx_lora.errors import ConfigError, DataError
from mlx_lora.runs.metrics import METRICS, load_metrics, measured
from mlx_lora.runs.reports import Answer
from mlx_lora.tiny_base import PATH, skill
from ranks import WITHOUT_PAGE, Ranks

CODE = """
def length(given, expected):
    assert type(given) is list and all(type(text) is str for text in given + expected)
    return sum(map(len, given)) / len(expected)

def fails(given, expected):
    return given[0] / 2

def text(given, expected):
    return "a lot"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split, count in (("train", 30), ("valid", 6), ("test", 5)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return DataConfig(data=str(folder), mask_prompt=True, max_seq_length=256)


@pytest.fixture
def metric(tmp_path) -> str:
    (tmp_path / "metric.py").write_text(CODE)
    return f"{tmp_path / 'metric.py'}:length"


def run(folder: Path, data, adapter=None, **train) -> list:
    options = {"model": PATH, "data": data, "optimizer": OptimizerConfig(learning_rate=1e-3)}
    config = TrainConfig(**{"batch_size": 2, "val_batches": 1, "steps_per_eval": 2, "iters": 4, **train})
    adapter = adapter or AdapterConfig(rank=4, num_layers=2, dropout=0.2)
    return list(mlx_lora.run(folder, **options, adapter=adapter, train=config))


def of(reports: list, name: str) -> list:
    return [report for report in reports if type(report).__name__ == name]


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def values(given: str, expected: str) -> dict[str, float]:
    pairs = zip(given.split("|"), expected.split("|"), strict=True)
    return measured(load_metrics(list(METRICS)), [Answer("", b, a) for a, b in pairs])


def test_exact_match_and_rouge_l():
    found = values("the cat sat|no", "the cat sat|yes")
    assert found["exact_match"] == 0.5 and found["rouge_l"] == pytest.approx(0.5)
    # LCS "the dog bit man" has 4 words: precision 4/5, recall 4/6
    found = values("the dog bit a man", "the old dog bit the man")
    assert found["rouge_l"] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))


def test_matthews_correlation_is_that_of_the_labels():
    import numpy as np

    random = np.random.RandomState(0)
    for classes in (2, 3, 4):
        true, said = random.randint(classes, size=(2, 40))
        said = np.where(random.rand(40) < 0.5, true, said)
        # The correlation of the indicator matrices, as a mean over classes of covariances.
        x, y = (np.eye(classes)[labels] - np.eye(classes)[labels].mean(0) for labels in (true, said))
        expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
        found = METRICS["matthews_correlation"]([str(i) for i in said], [str(i) for i in true])
        assert found == pytest.approx(expected)
    phi = METRICS["matthews_correlation"](list("11110000"), list("11100001"))
    assert phi == pytest.approx((3 * 3 - 1 * 1) / (4 * 4 * 4 * 4) ** 0.5)
    assert METRICS["matthews_correlation"](list("1111"), list("1100")) == 0
    assert METRICS["matthews_correlation"](["x", "1"], ["1", "0"]) < 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rouge", "'rouge' is not known"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("metric.py:g", "has no function 'g'"),
        ("metric.py:", "is not known"),
        ("broken.py:f", "NameError"),
    ],
)
def test_what_is_no_metric_is_refused_before_a_model_is_loaded(name, said, metric, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("nothing_here\n")
    with pytest.raises(ConfigError, match=said):
        mlx_lora.run(tmp_path / "a", model="nowhere", data=data, train={"metric": name})
    with pytest.raises(ConfigError, match=said):
        runs.measure("nowhere", data, metric=[name])


def test_a_missing_package_names_the_extra(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ConfigError, match="rouge-score is not installed") as caught:
        mlx_lora.run(tmp_path / "a", model="nowhere", data=data, train={"metric": "rouge_l"})
    assert caught.value.hint == "pip install rouge-score"


@pytest.mark.parametrize("function", ["fails", "text"])
def test_a_metric_that_fails_is_named(function, metric, data, tmp_path):
    with pytest.raises(ConfigError, match=f"metric {function} fails"):
        run(tmp_path / "a", data, metric=metric.replace("length", function), metric_rows=1, metric_max_tokens=2)


def test_metrics_need_answers_as_text(data, tmp_path):
    _, tokenizer = mlx_lora.load(PATH)
    sets = mlx_lora.load_dataset(data, tokenizer)
    with pytest.raises(ConfigError, match="metric needs the rows as text"):
        mlx_lora.run(tmp_path / "a", model=PATH, data=sets, train={"metric": "exact_match"})
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three four"}\n' * 40)
    with pytest.raises(DataError, match="has no answer to compare with"):
        run(tmp_path / "a", DataConfig(data=str(tmp_path / "texts.jsonl")), metric="exact_match")


def test_values_are_those_of_the_answers_and_choose_the_best(data, metric, tmp_path):
    train = {"metric": f"exact_match,{metric},rouge_l", "metric_rows": 3, "metric_max_tokens": 6, "best_by": "length"}
    reports = run(tmp_path / "a", data, **train)
    found = of(reports, "ValReport")
    assert [list(report.metrics) for report in found] == [["exact_match", "length", "rouge_l"]] * 3
    model, tokenizer = mlx_lora.load(PATH, tmp_path / "a", checkpoint="last")
    asked = mlx_lora.data.questions(data, tokenizer, "valid", 3)
    answered = list(runs.answers(model, tokenizer, asked, 6))
    assert found[-1].metrics == measured(load_metrics(["exact_match", metric, "rouge_l"]), answered)
    best = max(found[1:], key=lambda report: report.metrics["length"])  # the first one where they are equal
    assert of(reports, "NewBest")[-1].iteration == best.iteration
    assert of(reports, "NewBest")[-1].value == best.metrics["length"]


def test_held_out_rows_are_the_ones_asked(data, tmp_path):
    _, tokenizer = mlx_lora.load(PATH)
    config = DataConfig(data=f"{data.data}/train.jsonl", mask_prompt=True, valid_split=0.2)
    asked = mlx_lora.data.questions(config, tokenizer, "valid", -1)
    valid = mlx_lora.load_dataset(config, tokenizer).valid
    assert len(asked) == len(valid) == 6
    for question, row in zip(asked, valid, strict=True):
        assert row.tokens[: len(question.tokens)].tolist() == question.tokens


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (AdapterConfig(method="dora", rank=4, num_layers=2, dropout=0.2), {"grad_checkpoint": True}),
        (AdapterConfig(method="full", num_layers=1), {}),
        (None, {"pack": True, "grad_accumulation_steps": 3}),
        (AdapterConfig(method="vera", rank=8, num_layers=2), {}),
    ],
    ids=["grad_checkpoint", "full", "pack", "vera"],
)
def test_measuring_does_not_move_the_training_by_a_bit(adapter, train, data, tmp_path):
    measuring = {"metric": "exact_match,rouge_l", "metric_rows": 2, "metric_max_tokens": 4}
    plain = run(tmp_path / "a", data, adapter, **train)
    reports = run(tmp_path / "b", data, adapter, **train, **measuring)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert [r.val_loss for r in of(plain, "ValReport")] == [r.val_loss for r in of(reports, "ValReport")]
    run(tmp_path / "c", data, adapter, **{**train, **measuring, "iters": 3})
    resumed = list(mlx_lora.run(tmp_path / "c", train={"iters": 4}, resume=True))
    assert weights(tmp_path / "a") == weights(tmp_path / "c")
    assert of(resumed, "ValReport")[-1].metrics == of(reports, "ValReport")[-1].metrics
    assert mx.random.state is not None


def test_a_metric_that_draws_random_numbers_does_not_move_the_training(data, tmp_path):
    code = "import mlx.core as mx, numpy as np, random\ndef drawn(given, expected):\n    mx.random.seed(5)\n"
    code += "    np.random.seed(1)\n    random.seed(1)\n    return mx.random.normal(()).item()\n"
    (tmp_path / "drawn.py").write_text(code)
    run(tmp_path / "a", data)
    run(tmp_path / "b", data, metric=f"{tmp_path / 'drawn.py'}:drawn", metric_rows=2, metric_max_tokens=2)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_test_command_measures_them_too(data, metric, capsys):
    from mlx_lora.cli.main import main

    def test(*options: str) -> list[dict]:
        with pytest.raises(SystemExit) as ended:
            main(["test", "--model", str(PATH), "--data", data.data, "--mask-prompt", "--max-tokens", "4", *options])
        assert ended.value.code == 0
        return capsys.readouterr().out

    lines = [json.loads(line) for line in test("--metric", f"exact_match,{metric}", "--json").splitlines()]
    assert lines[-1]["metrics"].keys() == {"exact_match", "length"} and lines[-1]["answered"] == 0
    lines = [json.loads(line) for line in test("--metric", metric, "--metric-rows", "2", "--json").splitlines()]
    assert lines[-1]["metrics"]["length"] > 0
    out = test("--metric", "rouge_l", "--exact-match", "3")
    assert "Exact match 0 of 3 (0 %)\nrouge_l 0." in out


PROCESS = (
    WITHOUT_PAGE
    + """
import sys
import mlx_lora, mlx_lora.tiny_base
from mlx_lora import *
folder, data, metric = sys.argv[1:4]
train = TrainConfig(epochs=0.5, batch_size=2, val_batches=1, steps_per_eval=2, patience=2, metric=metric,
                    report_prompts=0,
                    metric_rows=2, metric_max_tokens=3, best_by="rank")
for report in mlx_lora.run(folder, model=mlx_lora.tiny_base.PATH, data=DataConfig(data=data, mask_prompt=True),
                           adapter=AdapterConfig(rank=4, num_layers=2), train=train):
    if type(report).__name__ in ("Planned", "ValReport", "NewBest", "Done", "Started"):
        names = ("metrics", "reason", "peak", "iteration")
        print(type(report).__name__, next((getattr(report, name) for name in names if getattr(report, name, None)), 0))
"""
)


def test_every_process_plans_measures_and_stops_alike(data, tmp_path):
    """The metric returns the number of the process: all must see that of the first one."""
    (tmp_path / "rank.py").write_text(
        "import mlx.core as mx\ndef rank(given, expected):\n    return 5.0 + mx.distributed.init().rank()\n"
    )
    with Ranks(tmp_path, 2, "-c", PROCESS, tmp_path / "a", data.data, f"{tmp_path / 'rank.py'}:rank") as ranks:
        assert ranks.end() == [0, 0], ranks.output
        one, two = ranks.outputs
    assert one == two
    said = one.splitlines()
    assert said[0].startswith("Planned") and said[-1] == "Done patience"
    assert said.count("ValReport {'rank': 5.0}") == 4
    assert (tmp_path / "a" / "best" / "adapters.safetensors").exists()


def test_names_that_a_loss_measures_are_no_metrics():
    for name in ("val_loss", "kl", "nll_loss"):
        with pytest.raises(ConfigError, match=f"metric {name}: a loss measures something of this name"):
            TrainConfig(metric=f"m.py:{name}")


@pytest.mark.parametrize("error", ["ValueError('late')", "SystemExit(3)"])
def test_a_metric_that_fails_late_ends_a_saved_run_and_is_tried_before_it_goes_on(error, data, tmp_path):
    file = tmp_path / "late.py"
    file.write_text(f"calls = []\ndef late(given, expected):\n    calls.append(1)\n    if len(calls) > 1:\n"
                    f"        raise {error}\n    return 1.0\n")  # fmt: skip
    measuring = {"metric": f"{file}:late", "metric_rows": 1, "metric_max_tokens": 1}
    with pytest.raises(ConfigError, match="metric late fails"):
        run(tmp_path / "a", data, iters=6, save_every=50, **measuring)
    assert (tmp_path / "a" / "0000002_adapters.safetensors").exists()
    found = []
    with pytest.raises(ConfigError, match="metric late fails"):
        found += mlx_lora.run(tmp_path / "a", resume=True)
    assert not (tmp_path / "a" / "0000004_adapters.safetensors").exists()


def test_test_takes_the_answer_length_of_a_recipe(data, metric, tmp_path, monkeypatch):
    from mlx_lora.cli.main import main

    asked = []
    monkeypatch.setattr(runs, "measure", lambda *_, max_tokens, **__: asked.append(max_tokens) or iter(()))
    (tmp_path / "run.yaml").write_text("metric_max_tokens: 7\niters: 5\n")
    base = ["test", "--model", str(PATH), "--data", data.data, "--metric", "exact_match"]
    for more in ([], ["-c", str(tmp_path / "run.yaml")], ["-c", str(tmp_path / "run.yaml"), "--max-tokens", "9"]):
        with pytest.raises(SystemExit):
            main([*base, *more])
    assert asked == [128, 7, 9]
