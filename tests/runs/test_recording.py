"""The log, the answers to held-out prompts and the trackers of a run: exact after a kill, and without effect on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from conftest import killed_at
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.data import Dataset, Example, Splits
from mlx_lora.errors import ConfigError, MLXLoRAWarning
from mlx_lora.runs import adapters, held_out, recorder
from mlx_lora.runs.log import LOG, RunLog, read_log
from mlx_lora.runs.tracking import values_of
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import TrainReport, ValReport

ADAPTER = AdapterConfig(rank=4, num_layers=2, dropout=0.1)
TIMES = ("time", "iterations_per_second", "tokens_per_second", "peak_memory", "val_time", "seconds", "path")


def write_rows(folder: Path, valid: list | None = None) -> DataConfig:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", list(skill.rows("train", 32))), ("valid", valid or list(skill.rows("valid", 12)))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(data=str(folder), mask_prompt="text" not in (valid or [{}])[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


def run(folder: Path, *args, **options) -> list:
    return list(start(folder, *args, **options))


def start(folder: Path, data, iters: int = 4, adapter=ADAPTER, train: dict | None = None, **options) -> Iterator:
    settings = {"batch_size": 2, "val_batches": 1, "steps_per_report": 1, "steps_per_eval": 2, "save_every": 2}
    options = {"model": PATH, "optimizer": OptimizerConfig(learning_rate=1e-3), **options}
    config = TrainConfig(iters=iters, **{**settings, **(train or {})})
    return mlx_lora.run(folder, data=data, adapter=adapter, train=config, **options)


def lines(folder: Path, *kinds: str) -> list[dict]:
    """The records of these kinds, or of all, without what differs from run to run."""
    found = [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder).records]
    return [record for record in found if not kinds or record["kind"] in kinds]


def answers(folder: Path) -> dict[str, tuple[int, list[str]]]:
    return {r["of"]: (r["iteration"], [a["given"] for a in r["answers"]]) for r in lines(folder, "Answers")}


def test_every_report_is_a_line(data, tmp_path):
    reports = run(tmp_path / "a", data)
    records = read_log(tmp_path / "a").records
    said = [type(r).__name__ for r in reports if type(r).__name__ not in ("Progress", "Loading")]
    assert [r["kind"] for r in records if r["kind"] not in ("Run", "Answers")] == said
    header = records[0]
    assert header["kind"] == "Run" and header["settings"]["train"]["iters"] == 4
    assert header["settings"]["adapter"]["rank"] == 4 and header["settings"]["model"] == str(PATH)
    assert header["data"]["valid"]["rows"] == 12 and header["data"]["train"]["learned_tokens"] > 100
    assert header["base"]["model_type"] and {"mlx-lora", "mlx", "mlx-lm"} <= set(header["versions"])
    assert header["machine"]["processes"] == 1 and header["machine"]["chip"]
    assert all(isinstance(record["time"], float) for record in records)
    first = next(r for r in reports if isinstance(r, mlx_lora.training.TrainReport))
    assert next(r for r in records if r["kind"] == "TrainReport")["train_loss"] == first.train_loss
    assert (tmp_path / "a" / "report.html").exists()


def test_the_log_is_there_while_the_run_goes_on(data, tmp_path):
    for report in mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=ADAPTER, train=TrainConfig(iters=2)):
        if type(report).__name__ in ("TrainReport", "ValReport", "Done"):
            assert lines(tmp_path / "a")[-1]["kind"] in (type(report).__name__, "Answers")


def test_values_that_json_does_not_know(tmp_path):
    log = RunLog(tmp_path)
    log.add("TrainReport", {"train_loss": float("nan"), "metrics": {"a": float("inf"), "b": [float("-inf"), 1.5]}})
    log.add("Warned", {"text": "half \ud83d, whole 🙂", "path": Path("x")})
    for line in (tmp_path / LOG).read_bytes().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    first, second = read_log(tmp_path).records
    assert first["train_loss"] is None and first["metrics"] == {"a": None, "b": [None, 1.5]}
    assert second["text"] == "half \ud83d, whole 🙂" and second["path"] == "x"


@pytest.mark.parametrize("tail", [b'{"kind": "TrainRep', b"\xff\xfe", b"[1]", b"nonsense\n", b'{"kind": 3}\n\n'])
def test_a_torn_line_is_passed_over(tmp_path, tail):
    RunLog(tmp_path).add("Warned", {"text": "whole"})
    with open(tmp_path / LOG, "ab") as file:
        file.write(tail)
    records, unreadable = read_log(tmp_path)
    assert [record["text"] for record in records] == ["whole"] and unreadable == 1


def test_the_log_of_a_run_that_was_killed_equals_that_of_an_uninterrupted_one(data, tmp_path):
    run(tmp_path / "one", data, 6)
    moments = [("Checkpoint", 2), ("TrainReport", 3), ("ValReport", 4)]
    for number, moment in enumerate(moments):
        reports = start(tmp_path / str(number), data, 6, resume=number > 0)
        left = tmp_path / str(number + 1)
        then = lambda r, moment=moment: (type(r).__name__, getattr(r, "iteration", 0)) == moment  # noqa: E731
        killed_at(reports, then, tmp_path / str(number), left)
        with open(left / LOG, "ab") as file:
            file.write(b'{"kind": "TrainReport", "itera')
    run(left, data, 6, resume=True)
    kinds = ("TrainReport", "ValReport", "Checkpoint", "Answers")
    two, one = (lines(folder, *kinds) for folder in (left, tmp_path / "one"))
    norms = [[r.pop("grad_norm") for r in records if "grad_norm" in r] for records in (two, one)]
    assert two == one and norms[0] == pytest.approx(norms[1], rel=1e-6)  # a norm may be summed in another order
    assert [r["iteration"] for r in lines(left, "Run")] == [0, 2, 2, 2]
    assert read_log(left).unreadable == 0
    assert set(answers(left)) == {"base", "first", "best"}


def test_an_earlier_run_keeps_its_log(data, tmp_path):
    run(tmp_path / "a", data, 2)
    before = (tmp_path / "a" / LOG).read_bytes()
    reports = mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=ADAPTER, train=TrainConfig(iters=3))
    for report in reports:
        if isinstance(report, mlx_lora.Progress):
            reports.close()
    assert (tmp_path / "a" / LOG).read_bytes() == before
    run(tmp_path / "a", data, 3)
    assert (tmp_path / "a" / "earlier-1" / LOG).read_bytes() == before
    assert (tmp_path / "a" / "earlier-1" / "report.html").exists()
    assert [r["iteration"] for r in lines(tmp_path / "a", "TrainReport")] == [1, 2, 3]
    assert lines(tmp_path / "a")[0]["kind"] == "Run"


def test_a_run_that_is_refused_or_fails_to_start_writes_no_log(data, tmp_path):
    with pytest.raises(mlx_lora.MLXLoRAError):
        run(tmp_path / "a", data, adapter=AdapterConfig(rank=100000))
    assert not (tmp_path / "a").exists()


def test_a_log_that_cannot_be_written_is_a_warning(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lora.runs.log.LOG", "no/such/folder")
    with pytest.warns(MLXLoRAWarning, match="goes on without a log"):
        reports = run(tmp_path / "a", data, 1)
    assert type(reports[-1]).__name__ == "Done" and not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (ADAPTER, {"grad_accumulation_steps": 3, "grad_checkpoint": True}),
        (AdapterConfig(method="dora", rank=4, num_layers=2), {}),
        (AdapterConfig(method="full", num_layers=1), {"grad_accumulation_steps": 3}),
        (AdapterConfig(rank=4, num_layers=2, init="pissa"), {}),
    ],
    ids=["lora", "dora", "full", "pissa"],
)
def test_answers_do_not_move_the_training_by_a_bit(adapter, train, data, tmp_path):
    for name, shown in (("with", 10), ("without", 0)):
        mx.random.seed(7)
        run(tmp_path / name, data, 5, adapter, {**train, "report_prompts": shown})
    with_answers, without = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("with", "without"))
    assert with_answers == without
    assert len(answers(tmp_path / "with")["base"][1]) == 10 and answers(tmp_path / "without") == {"base": (0, [])}


def test_whose_answers(data, tmp_path):
    run(tmp_path / "a", data)
    found = answers(tmp_path / "a")
    assert {of: at for of, (at, _) in found.items()} == {"base": 0, "first": 2, "best": 4}
    questions = mlx_lora.data.questions(data, mlx_lora.load(PATH)[1], "valid", 10)
    for of, file in (("base", None), ("first", "0000002"), ("best", "0000004")):
        adapter = None
        if file:
            adapter = tmp_path / of
            adapter.mkdir()
            (adapter / "adapters.safetensors").write_bytes(
                (tmp_path / "a" / f"{file}_adapters.safetensors").read_bytes()
            )
            (adapter / "adapter_config.json").write_bytes((tmp_path / "a" / "adapter_config.json").read_bytes())
        model, tokenizer = mlx_lora.load(PATH, adapter)
        expected = list(mlx_lora.runs.answers(model, tokenizer, questions, held_out.MAX_TOKENS))
        assert found[of][1] == [answer.given for answer in expected], of


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_weights_of_a_checkpoint_are_put_on_and_taken_off_again(init, data, tmp_path):
    model, tokenizer = mlx_lora.load(PATH)
    run(tmp_path / "a", data, 4, AdapterConfig(rank=4, num_layers=2, init=init), model=(model, tokenizer))
    tokens = mx.array([[5, 6, 7, 8]])
    last = model(tokens)
    first = tmp_path / "a" / "0000002_adapters.safetensors"
    with adapters.weights_of(model, first):
        then = model(tokens)
    assert mx.array_equal(model(tokens), last) and not mx.array_equal(then, last)
    (tmp_path / "a" / "adapters.safetensors").write_bytes(first.read_bytes())
    alone, _ = mlx_lora.load(PATH, tmp_path / "a")
    assert mx.allclose(alone(tokens), then, atol=1e-4)
    with pytest.raises(ValueError, match="does not hold"), adapters.weights_of(model, tmp_path / "none"):
        pass


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"train": {"report_prompts": 0}}, "report_prompts is 0"),
        ({"sets": lambda s: Splits(s.train)}, "no validation rows"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"broken": True}, "cannot generate: no cache for you"),
    ],
)
def test_why_there_are_no_answers(change, why, data, tmp_path, monkeypatch):
    model, tokenizer = mlx_lora.load(PATH)
    sets = change.get("sets", lambda s: s)(mlx_lora.load_dataset(data, tokenizer))
    if change.get("broken"):

        def refuse(*args, **options):
            raise RuntimeError("no cache for you")

        monkeypatch.setattr(held_out, "answers", refuse)
    run(tmp_path / "a", sets, 1, model=(model, change.get("tokenizer", tokenizer)), train=change.get("train"))
    (line,) = lines(tmp_path / "a", "Answers")
    assert line["answers"] == [] and why in line["why"]
    assert f"No answers: {line['why']}" in (tmp_path / "a" / "report.html").read_text()


def test_prompts_of_text_rows_and_of_loaded_sets(data, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "MAX_TOKENS", 64)
    text = write_rows(tmp_path / "text", [{"text": "Once upon a time there was a small house. " * 3}] * 3)
    (tmp_path / "text" / "train.jsonl").write_text('{"text": "One and two and three."}\n' * 4)
    model, tokenizer = mlx_lora.load(PATH)
    found = held_out.HeldOut(text, mlx_lora.load_dataset(text, tokenizer), tokenizer, 10, 2)
    assert not found.why and len(found.asked) == 3
    assert found.asked[0].text.startswith("Once upon") and len(found.asked[0].tokens) <= 48
    assert found.asked[0].answer and len(found.answer(model)) == 3
    sets = mlx_lora.load_dataset(data, tokenizer)
    by_tokens = held_out.HeldOut(sets, sets, tokenizer, 10, 2).asked
    by_files = held_out.HeldOut(data, sets, tokenizer, 10, 2).asked
    assert [q.tokens for q in by_tokens] == [q.tokens for q in by_files] and len(by_files) == 10
    assert [q.answer.strip() for q in by_tokens] == [q.answer for q in by_files]
    one = Dataset([Example(sets.valid[0].tokens[:2], sets.valid[0].mask[:2] | True)])
    assert len(held_out.HeldOut(Splits(one, one), Splits(one, one), tokenizer, 10, 2).asked) == 1


def test_loaded_preferences_are_asked_for_their_good_answers():
    _, tokenizer = mlx_lora.load(PATH)
    pair = {"prompt": "Say yes.", "chosen": "yes", "rejected": "no"}
    labelled = [{"prompt": "Say it.", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(6)]
    for kind, rows, count in (("pairs", [pair], 1), ("labels", labelled, 3)):
        valid = mlx_lora.tokenize(rows, tokenizer, DataConfig(), kind=kind)
        found = held_out.HeldOut(Splits(valid, valid, None), Splits(valid, valid, None), tokenizer, 5, 2)
        assert [question.answer.strip() for question in found.asked] == ["yes"] * count and not found.why


def test_report_prompts_may_change_on_resume_and_is_checked(data, tmp_path):
    run(tmp_path / "a", data, 2, train={"report_prompts": 3})
    run(tmp_path / "a", data, 4, train={"report_prompts": 5}, resume=True)
    for value in (-1, 1.5, True, "many"):
        with pytest.raises(ConfigError, match="report_prompts must be"):
            TrainConfig(report_prompts=value)


def test_a_page_that_cannot_be_made_is_a_warning(data, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no ink")

    monkeypatch.setattr("mlx_lora.runs.report.write_report", fail)
    with pytest.warns(MLXLoRAWarning, match=r"report\.html was not written: no ink"):
        assert type(run(tmp_path / "a", data, 1)[-1]).__name__ == "Done"


def test_the_page_is_written_at_checkpoints_of_a_long_run(data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(recorder, "BETWEEN_PAGES", 0.0)
    monkeypatch.setattr("mlx_lora.runs.report.write_report", lambda folders, output: written.append(output))
    run(tmp_path / "a", data)
    assert written == [tmp_path / "a" / "report.html"] * 3


def fake(calls: list, broken: bool = False) -> types.SimpleNamespace:
    """A tracker with the functions of wandb."""

    def log(values, step):
        if broken:
            raise OSError("no network")
        calls.append((step, values))

    print_and_init = lambda **given: (print("welcome"), calls.append(given))  # noqa: E731
    return types.SimpleNamespace(init=print_and_init, log=log, finish=lambda: calls.append("finish"))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_services_with_the_functions_of_wandb(name, data, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setitem(sys.modules, name, fake(calls))
    run(tmp_path / "a", data, 2, report_to=[name], project_name="p")
    assert calls[0]["project"] == "p" and calls[0]["config"]["iters"] == 2 and calls[0]["config"]["rank"] == 4
    assert [step for step, _ in calls[1:-1]] == [0, 1, 2, 2] and calls[-1] == "finish"
    assert "val_loss" in calls[1][1] and "train_loss" in calls[2][1] and "iteration" not in calls[2][1]
    assert "welcome" not in capsys.readouterr().out


def test_a_service_that_fails_does_not_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake([], broken=True))
    with pytest.warns(MLXLoRAWarning, match="wandb no longer receives reports: no network"):
        assert type(run(tmp_path / "a", data, 2, report_to=["wandb"])[-1]).__name__ == "Done"
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(ConfigError, match="wandb: cannot start"):
        run(tmp_path / "b", data, 2, report_to=["wandb"])
    assert not (tmp_path / "b").exists()


def test_all_missing_packages_are_named_at_once(data, tmp_path, monkeypatch):
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="wandb, swanlab: not installed") as caught:
        run(tmp_path / "a", data, report_to="wandb,swanlab")
    assert "pip install wandb swanlab" in caught.value.hint
    with pytest.raises(ConfigError, match="project_name needs"):
        run(tmp_path / "a", data, report_to="tensorboard", project_name="p")


def test_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"metric": "exact_match", "metric_rows": 1, "metric_max_tokens": 2, "report_prompts": 0}
    run(tmp_path / "a", data, 4, train=train, report_to=["tensorboard"])
    run(tmp_path / "a", data, 6, train=train, report_to=["tensorboard"], resume=True)
    (folder,) = (tmp_path / "a" / "tensorboard").iterdir()
    board = EventAccumulator(str(folder)).Reload()
    losses = {r["iteration"]: r["train_loss"] for r in lines(tmp_path / "a", "TrainReport")}
    found = {event.step: event.value for event in board.Scalars("train_loss")}
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert all(value == pytest.approx(losses[step], rel=1e-6) for step, value in found.items())
    validations = lines(tmp_path / "a", "ValReport")
    found = [(event.step, event.value) for event in board.Scalars("val/exact_match")]
    assert found == [(r["iteration"], r["metrics"]["exact_match"]) for r in validations]
    assert {"val_loss", "learning_rate", "grad_norm", "peak_memory"} <= set(board.Tags()["scalars"])


def test_metrics_have_names_of_the_set_they_are_measured_on():
    fields = dict(learning_rate=1e-4, iterations_per_second=1.0, tokens_per_second=1.0, trained_tokens=1)
    train = TrainReport(2, 0.5, **fields, peak_memory=1.0, grad_norm=None, metrics={"rewards/margins": 0.2})
    assert {"train_loss": 0.5, "train/rewards/margins": 0.2}.items() <= values_of(train).items()
    assert values_of(ValReport(2, 0.5, 1.0, 3, {"rouge_l": 0.1}))["val/rouge_l"] == 0.1
    assert not {"metrics", "iteration", "grad_norm"} & values_of(train).keys()


def test_trackio(data, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    code = (
        "import json, sys, mlx_lora\n"
        "from mlx_lora import *\n"
        "from mlx_lora.tiny_base import PATH\n"
        "for _ in mlx_lora.run(sys.argv[1], model=PATH, data=DataConfig(data=sys.argv[2]), report_to='trackio',\n"
        "    train=TrainConfig(iters=2, batch_size=2, steps_per_report=1, report_prompts=0), project_name='p'): pass\n"
        "print(json.dumps('only data on stdout'))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "a"), data.data]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "only data on stdout"
    assert list((tmp_path / "trackio").rglob("p*")), "trackio wrote no project"


def test_no_warning_in_a_plain_run(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MLXLoRAWarning)
        run(tmp_path / "a", data, 2)


@pytest.fixture(scope="module")
def complete(data, tmp_path_factory) -> Path:
    """The folder of a complete run whose last validation is its best."""
    folder = tmp_path_factory.mktemp("complete") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_lora.runs.report.panels.draw", lambda *_: "<svg></svg>")
        patch.setattr("mlx_lora.runs.held_out.MAX_TOKENS", 6)
        run(folder, data, 4, train={"steps_per_eval": 4, "save_every": 4})
    assert [r["iteration"] for r in lines(folder, "NewBest")] == [4]
    return folder


def cut(folder: Path, kind: str) -> None:
    """Remove from the log the first line of this kind and all after it, as if the process had been killed before."""
    whole = (folder / LOG).read_text("utf-8").splitlines(keepends=True)
    at = next(number for number, line in enumerate(whole) if json.loads(line)["kind"] == kind)
    (folder / LOG).write_text("".join(whole[:at]) + '{"kind": "Che', "utf-8")


@pytest.mark.parametrize("kind", ["Checkpoint", "NewBest"])
def test_a_kill_before_the_lines_of_a_checkpoint_loses_none_of_them(kind, complete, data, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(complete, folder)
    cut(folder, kind)
    rhythm = {"steps_per_eval": 4, "save_every": 4, "patience": 0}
    with pytest.MonkeyPatch.context() as patch:  # the later validations are not better
        patch.setattr("mlx_lora.training.loop.is_best", lambda *_: False)
        run(folder, data, 6, train=rhythm, resume=True)
    found = lines(folder, "Checkpoint", "NewBest")
    assert [(r["kind"], r["iteration"]) for r in found] == [("Checkpoint", 4), ("NewBest", 4), ("Checkpoint", 6)]
    assert found[1] == lines(complete, "NewBest")[0]
    assert answers(folder)["first"][0] == 4 and "best" not in answers(folder)  # the best is the first one


@pytest.mark.parametrize("kind", ["Checkpoint", "NewBest", "Done", None])
def test_resume_writes_what_a_killed_complete_run_lacks(kind, complete, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(complete, folder)
    (folder / "frozen_prefix.states").write_bytes(b"states")
    (folder / "report.html").write_text("stale")
    os.utime(folder / "report.html", ns=(1, 1))
    if kind:
        cut(folder, kind)
    said = r"written all files; now frozen_prefix\.states was deleted, and " + (
        r"the last lines of log\.jsonl were written, and " * bool(kind) + r"report\.html was written"
    )
    with pytest.raises(ConfigError, match=r"has done 4 iterations(.|\n)*" + said):
        list(mlx_lora.run(folder, resume=True))
    assert not (folder / "frozen_prefix.states").exists()
    assert "stale" not in (folder / "report.html").read_text("utf-8")
    kinds = ("Checkpoint", "NewBest", "Done")
    assert lines(folder, *kinds) == lines(complete, *kinds)
    before = (folder / LOG).read_bytes()
    with pytest.raises(ConfigError) as error:
        list(mlx_lora.run(folder, resume=True))
    assert "killed" not in error.value.message and (folder / LOG).read_bytes() == before


def test_resuming_with_fewer_iterations_does_not_end_a_run(data, tmp_path):
    reports = start(tmp_path / "a", data, 6)
    killed_at(reports, lambda r: type(r).__name__ == "TrainReport" and r.iteration == 3, tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "b" / LOG).read_bytes()
    with pytest.raises(ConfigError, match="has done 2 iterations") as error:
        run(tmp_path / "b", data, 2, resume=True)
    assert "killed" not in error.value.message and (tmp_path / "b" / LOG).read_bytes() == before
