"""Runs with losses of preferences: the reference, resuming after SIGKILL, measuring, several processes, the example."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_lora
from conftest import killed_at
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.cli.main import main
from mlx_lora.config import preference_of
from mlx_lora.errors import ConfigError, TrainingError
from mlx_lora.runs import measure, reports
from mlx_lora.runs.report import read_histories
from mlx_lora.tiny_base import PATH
from mlx_lora.training import NewBest, Progress, TrainReport, ValReport
from ranks import WITHOUT_PAGE, Ranks

ROOT = Path(__file__).resolve().parents[2]


def row(rng, loss: str) -> dict:
    colour, item = rng.choice(["red", "blue", "green"]), rng.choice(["kite", "ball", "cup", "hat"])
    prompt = f"What colour is the {colour} {item}?"
    if loss == "kto":
        good = rng.random() < 0.5
        return {"prompt": prompt, "completion": colour if good else f"The {item} is {colour}.", "label": good}
    return {"prompt": prompt, "chosen": colour, "rejected": f"The {item} is {colour}."}


def write(folder: Path, loss: str) -> DataConfig:
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 24), ("valid", 8), ("test", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(rng, loss)) + "\n" for _ in range(count)))
    return DataConfig(data=str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return write(tmp_path_factory.mktemp("pairs"), "dpo")


def fine_tune(folder: Path, *args, **options) -> list:
    return list(start(folder, *args, **options))


def start(folder: Path, data, loss="dpo", iters=4, train=None, **options) -> Iterator:
    settings = {"iters": iters, "batch_size": 4, "val_batches": -1, "steps_per_report": 2, "save_every": 2}
    options = {"adapter": AdapterConfig(rank=4, num_layers=2), "model": PATH, **options}
    config = TrainConfig(loss=loss, **{**settings, **(train or {})})
    return mlx_lora.run(folder, data=data, optimizer=OptimizerConfig(learning_rate=1e-3), train=config, **options)


def of(reports, *kinds) -> list:
    return [report for report in reports if isinstance(report, kinds)]


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_a_trained_adapter_is_the_reference_of_the_run_that_starts_from_it(data, tmp_path):
    """The loss begins at log 2. After a resume, too, the reference is that start, not the base or the last step."""
    fine_tune(tmp_path / "first", data, loss="cpo")
    start = {"resume_adapter_file": tmp_path / "first" / "adapters.safetensors"}
    whole = fine_tune(tmp_path / "whole", data, iters=6, **start)
    assert of(whole, ValReport)[0].val_loss == pytest.approx(0.693147, abs=1e-4)
    fine_tune(tmp_path / "parts", data, **start)
    resumed = fine_tune(tmp_path / "parts", data, iters=6, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert of(whole, ValReport)[-1].metrics == of(resumed, ValReport)[-1].metrics
    assert "reference" not in [getattr(report, "what", "") for report in resumed]


@pytest.mark.parametrize("adapter", [{"init": "pissa"}, {"method": "dora"}])
def test_any_start_is_the_reference_also_when_resumed(adapter, data, tmp_path):
    settings = {"adapter": AdapterConfig(rank=4, num_layers=2, **adapter)}
    whole = fine_tune(tmp_path / "whole", data, **settings)
    assert of(whole, ValReport)[0].val_loss == pytest.approx(0.693147, abs=1e-4)
    fine_tune(tmp_path / "parts", data, iters=2, **settings)
    fine_tune(tmp_path / "parts", data, resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_killed_run_resumes_to_the_bit(loss, tmp_path):
    data = write(tmp_path / "data", loss)
    whole = fine_tune(tmp_path / "whole", data, loss, iters=6)
    fifth = lambda report: isinstance(report, Progress) and report.iteration == 5  # noqa: E731
    killed_at(start(tmp_path / "run", data, loss, iters=6), fifth, tmp_path / "run", tmp_path / "killed")
    resumed = fine_tune(tmp_path / "killed", data, loss, iters=6, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    for kind in (ValReport, TrainReport):
        assert of(whole, kind)[-1].metrics == of(resumed, kind)[-1].metrics


def test_the_test_set_has_the_reference_of_the_run(data, tmp_path):
    found = fine_tune(tmp_path / "a", data, test_batches=-1)
    (here,) = of(found, reports.TestReport)
    assert here.perplexity is None and {"rewards/accuracies", "rewards/margins"} <= set(here.metrics)
    *_, measured = measure(PATH, data, tmp_path / "a", loss="dpo", exact_match=2, max_tokens=4)
    assert measured.loss == pytest.approx(here.loss, abs=1e-5) and measured.answered == 2
    assert measured.metrics == pytest.approx(here.metrics, abs=1e-4)
    *_, base = measure(PATH, data, loss="dpo")
    assert base.loss == pytest.approx(0.693147, abs=1e-5)
    *_, other = measure(PATH, data, tmp_path / "a", loss="dpo", options={"beta": 1.0})
    assert other.metrics["rewards/margins"] == pytest.approx(10 * measured.metrics["rewards/margins"], rel=1e-3)


def test_a_resumed_run_cannot_test_what_it_has_no_reference_for(data, tmp_path):
    fine_tune(tmp_path / "a", data, iters=2)
    with pytest.raises(TrainingError, match="did not store its results for the test set"):
        fine_tune(tmp_path / "a", data, iters=4, resume=True, test_batches=-1)
    fine_tune(tmp_path / "b", data, iters=2, test_batches=-1, train={"val_batches": 0})  # free to change
    (report,) = of(fine_tune(tmp_path / "b", data, resume=True, test_batches=-1), reports.TestReport)
    whole = fine_tune(tmp_path / "c", data, test_batches=-1)
    assert report.metrics == of(whole, reports.TestReport)[0].metrics


def test_other_options_of_the_loss_are_another_run(data, tmp_path):
    fine_tune(tmp_path / "a", data, iters=2)
    with pytest.raises(mlx_lora.MLXLoRAError, match=r"beta: 0.1 in the checkpoint, 0.3 here"):
        fine_tune(tmp_path / "a", data, resume=True, train={"beta": 0.3})


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert not end.value.code


def test_the_command_line(data, tmp_path, capsys):
    start = ["--model", str(PATH), "--data", data.data, "--loss", "dpo", "--adapter-path", str(tmp_path / "a")]
    options = ["--beta", "0.3", "--iters", "4", "--batch-size", "4", "--num-layers", "2", "--learning-rate", "1e-3"]
    command("train", *start, *options, "--steps-per-report", "2")
    said = capsys.readouterr().err
    assert said.count("Computing the log-probabilities of the reference: 24 train, 8 valid rows\n") == 1
    assert "rewards/accuracies" in said and "rewards/margins" in said and "perplexity" not in said
    command("test", *start, "--beta", "0.3", "--json")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["perplexity"] is None and report["metrics"]["rewards/accuracies"] >= 0
    command("test", *start)
    assert "rewards/margins" in capsys.readouterr().out


def test_accuracy_of_rewards_chooses_the_best_and_ends_the_run(data, tmp_path):
    train = {"steps_per_eval": 1, "val_batches": 1, "best_by": "rewards/accuracies", "patience": 2, "save_every": 9}
    train |= {"metric": ("exact_match",), "metric_rows": 2, "metric_max_tokens": 3, "report_prompts": 1}
    found = fine_tune(tmp_path / "a", data, iters=9, train=train)
    values = {r.iteration: r.metrics["rewards/accuracies"] for r in of(found, ValReport) if r.iteration}
    last = max(values)
    best = max(values, key=lambda at: (values[at], -at))
    news, done = of(found, NewBest), found[-1]
    assert (news[-1].iteration, news[-1].name, news[-1].value) == (best, "rewards/accuracies", values[best])
    assert done.reason == "patience" and last == best + 2 < 9
    assert all("exact_match" in r.metrics for r in of(found, ValReport))
    history = read_histories([tmp_path / "a"])[0]
    assert history.best == (best, "rewards/accuracies", values[best]) and history.ended_early == last
    assert history.expected == "chosen"
    measured = {}
    for checkpoint in (None, "best", best, "last", last):
        options = {"loss": "dpo", "checkpoint": checkpoint}
        *_, measured[checkpoint] = measure(PATH, data, tmp_path / "a", **options)
    loss = {checkpoint: report.loss for checkpoint, report in measured.items()}
    assert loss[None] == loss["best"] == loss[best] != loss["last"] == loss[last]
    with pytest.raises(ConfigError, match="has no checkpoint '7'"):
        measure(PATH, data, tmp_path / "a", loss="dpo", checkpoint=7)
    with pytest.raises(ConfigError, match="checkpoint has no effect without adapter_path"):
        measure(PATH, data, loss="dpo", checkpoint="last")


def test_metrics_of_labelled_rows_are_those_of_the_good_answers(tmp_path):
    data = write(tmp_path / "data", "kto")
    code = (
        "def answers(given, expected):\n    assert set(expected) <= {'red', 'blue', 'green'}\n    return len(given)\n"
    )
    (tmp_path / "metric.py").write_text(code)
    train = {"metric": f"{tmp_path}/metric.py:answers", "metric_rows": -1, "metric_max_tokens": 2}
    found = fine_tune(tmp_path / "a", data, "kto", iters=2, train=train)
    rows = [json.loads(line) for line in (tmp_path / "data" / "valid.jsonl").read_text().splitlines()]
    assert 0 < sum(row["label"] for row in rows) < len(rows)
    assert [r.metrics["answers"] for r in of(found, ValReport)] == 2 * [sum(row["label"] for row in rows)]


def test_settings_that_do_not_go_together(data, tmp_path):
    with pytest.raises(ConfigError, match="mask_prompt has no effect with loss 'dpo'"):
        fine_tune(tmp_path / "a", DataConfig(data=data.data, mask_prompt=True))
    with pytest.raises(ConfigError, match="lora_ga"):
        fine_tune(tmp_path / "a", data, adapter=AdapterConfig(rank=4, num_layers=2, init="lora_ga"))
    with pytest.raises(ConfigError, match="pack: the loss 'dpo' does not take packed rows"):
        fine_tune(tmp_path / "a", data, train={"pack": True})


def test_unbalanced_labels_are_warned_of(tmp_path):
    def said(good: int, bad: int, **weights) -> list[str]:
        rows = [{"prompt": "a", "completion": f"b{k}", "label": k < good} for k in range(good + bad)]
        model, tokenizer = mlx_lora.load(PATH)
        sets = (mlx_lora.tokenize(rows, tokenizer, DataConfig(), kind="labels"), None)
        found = fine_tune(tmp_path / "a", sets, "kto", 1, weights, model=(model, tokenizer))
        return [report.text for report in found if isinstance(report, reports.Warned)]

    assert said(4, 4) == said(4, 2, undesirable_weight=2.0) == said(2, 4, desirable_weight=2.5) == []
    (text,) = said(6, 2)
    assert "6 good and 2 bad answers" in text and "desirable_weight of 0.33 to 0.44" in text
    assert "data with both" in said(4, 0)[0]


def test_eva_reads_the_answers(data, tmp_path):
    adapter = AdapterConfig(rank=2, num_layers=1, init="eva", init_batches=1)
    assert of(fine_tune(tmp_path / "a", data, adapter=adapter, iters=1), TrainReport)


PROCESS = (
    WITHOUT_PAGE
    + """
import json, sys
import mlx_lora
from mlx_lora import *
from mlx_lora.tiny_base import PATH
folder, *rows = sys.argv[1:]
for loss, data in zip(("kto", "orpo"), rows):
    train = TrainConfig(loss=loss, iters=4, batch_size=4, val_batches=-1, steps_per_report=2, grad_accumulation_steps=2,
                        report_prompts=0)
    options = dict(adapter=AdapterConfig(rank=4, num_layers=2), optimizer=OptimizerConfig(learning_rate=1e-3))
    for report in mlx_lora.run(f"{folder}/{loss}", model=PATH, data=DataConfig(data=data), train=train, **options):
        if type(report).__name__ in ("TrainReport", "ValReport"):
            print(json.dumps([getattr(report, "train_loss", None) or report.val_loss, report.metrics]))
"""
)


def test_two_processes_compute_what_one_does(tmp_path):
    """The losses whose sums over processes are part of the loss."""
    data = [write(tmp_path / loss, loss).data for loss in ("kto", "orpo")]
    found = {}
    for size in (1, 2):
        (place := tmp_path / f"of{size}").mkdir()
        with Ranks(place, size, "-c", PROCESS, place, *data, MLX_LORA_FAST="on") as ranks:
            assert ranks.end() == [0] * size, ranks.output
            found[size] = [json.loads(line) for line in ranks.output.splitlines() if line.startswith("[")]
    both = [found[2][:8], found[2][8:]]
    for (value, metrics), *others in zip(found[1], *both, strict=True):
        for other, measured in others:
            assert other == pytest.approx(value, rel=1e-4, abs=1e-5)
            assert measured == pytest.approx(metrics, rel=1e-3, abs=1e-4)


def test_the_example_learns_a_preference(tmp_path):
    """A small version: rewards of nearly all held-out pairs are the right way round."""
    spec = importlib.util.spec_from_file_location("preference_example", ROOT / "examples" / "preference.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rewards = example.main(str(tmp_path / "a"), train=96, held_out=24, iters=20)
    assert rewards["rewards/accuracies"] > 0.95


def test_test_compares_with_the_adapter_that_the_run_began_from(data, tmp_path, monkeypatch):
    """The loss of a run's start is log 2; where that adapter has changed, a warning names the base as reference."""
    fine_tune(tmp_path / "first", data, loss="cpo")
    start = tmp_path / "first" / "adapters.safetensors"
    assert not [r for r in measure(PATH, data, tmp_path / "first", loss="dpo") if type(r).__name__ == "Warned"]
    reports = fine_tune(tmp_path / "a", data, iters=1, resume_adapter_file=start, test_batches=-1)
    *_, measured = measure(PATH, data, tmp_path / "a", loss="dpo", checkpoint="last")
    assert measured.loss == pytest.approx(reports[-1].loss, abs=1e-5)
    fine_tune(tmp_path / "a", data, iters=2, resume=True)
    assert not [r for r in measure(PATH, data, tmp_path / "a", loss="dpo") if type(r).__name__ == "Warned"]
    monkeypatch.setattr("mlx_lora.runs.evaluation.read_run", lambda _: {})  # as in the state of an older version
    said = [r.text for r in measure(PATH, data, tmp_path / "a", loss="dpo") if type(r).__name__ == "Warned"]
    assert len(said) == 1 and "does not say whether its training began from another adapter" in said[0]
    monkeypatch.undo()
    start.unlink()
    said = [r.text for r in measure(PATH, data, tmp_path / "a", loss="dpo") if type(r).__name__ == "Warned"]
    assert len(said) == 1 and "the reference here is the base model" in said[0]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto", "simpo", "cpo"])
def test_the_names_that_a_loss_measures_are_those_it_reports(loss, tmp_path):
    reports = fine_tune(tmp_path / "a", write(tmp_path / "rows", loss), loss, iters=1, train={"report_prompts": 0})
    names = set(of(reports, ValReport)[0].metrics)
    assert names | {"nll_loss"} == {*preference_of(loss).measures, "nll_loss"}
    with pytest.raises(ConfigError, match="best_by must be val_loss or rewards/chosen"):
        TrainConfig(loss=loss, best_by="accuracy")
