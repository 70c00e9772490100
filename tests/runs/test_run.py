"""``mlx_lora.run`` on the built-in tiny model: reports, checkpoints, earlier runs, resuming, stopping."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig, runs
from mlx_lora.data import Splits
from mlx_lora.errors import AdapterError, ConfigError, FormatError, TrainingError
from mlx_lora.model.attach import adapters_on
from mlx_lora.tiny_base import PATH, skill

ADAPTER = AdapterConfig(rank=4, num_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 32), ("valid", 4), ("test", 8)):
        text = "".join(json.dumps(row) + "\n" for row in skill.rows(split, count))
        (folder / f"{split}.jsonl").write_text(text)
    return DataConfig(data=str(folder), mask_prompt=True)


def fine_tune(folder: Path, data, iters: int = 2, adapter=ADAPTER, train: dict | None = None, **options) -> list:
    """All reports of a short run."""
    config = TrainConfig(iters=iters, **{"batch_size": 2, "val_batches": 1, "steps_per_report": 1, **(train or {})})
    options = {"model": PATH, "optimizer": OptimizerConfig(learning_rate=1e-3), **options}
    return list(mlx_lora.run(folder, data=data, adapter=adapter, train=config, **options))


def names(reports: list) -> list[str]:
    return [type(report).__name__ for report in reports if type(report).__name__ != "Progress"]


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_reports_and_files(data, tmp_path):
    reports = fine_tune(tmp_path / "a", data, 4, train={"save_every": 2})
    assert names(reports) == [
        *("Loading", "Loading", "DataLoaded", "Planned", "Started", "ValReport"),
        *("TrainReport", "TrainReport", "Checkpoint"),
        *("TrainReport", "TrainReport", "ValReport", "Checkpoint", "NewBest", "Done"),
    ]
    loading, loaded, started = reports[:2], reports[2], reports[4]
    assert [(r.what, r.name) for r in loading] == [("model", str(PATH)), ("data", data.data)]
    assert loaded.rows == {"train": 32, "valid": 4} and loaded.learned_tokens > 100 and loaded.warnings == ()
    assert (started.iteration, started.iters) == (0, 4) and 0 < started.trainable < started.parameters / 10
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        *("adapters.safetensors", "adapter_config.json", "training_state.safetensors"),
        *("0000002_adapters.safetensors", "0000004_adapters.safetensors", "best", "log.jsonl"),
    }
    assert reports[-3].path == tmp_path / "a" / "0000004_adapters.safetensors"
    assert reports[-3].path.read_bytes() == weights(tmp_path / "a") == weights(tmp_path / "a" / "best")
    assert reports[3].trainable == started.trainable and reports[3].peak > 1e6, reports[3].reason
    training = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["training"]
    assert training["iters"] == 4 and training["learning_rate"] == 1e-3 and training["data"] == data.data


def test_a_loaded_model_and_loaded_data(data, tmp_path):
    model, tokenizer = mlx_lora.load(PATH)
    sets = mlx_lora.load_dataset(data, tokenizer)
    reports = fine_tune(tmp_path / "a", sets, model=(model, tokenizer))
    assert "Loading" not in names(reports) and len(adapters_on(model)) > 0
    pair = fine_tune(tmp_path / "b", (sets.train, None))
    assert "ValReport" not in names(pair)
    fine_tune(tmp_path / "c", data)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")


def test_an_earlier_run_is_moved(data, tmp_path):
    folder = tmp_path / "a"
    fine_tune(folder, data)
    first = weights(folder)
    reports = fine_tune(folder, data, 3)
    kinds = names(reports)
    assert kinds.index("EarlierRunMoved") == kinds.index("Checkpoint") - 1 and kinds.count("EarlierRunMoved") == 1
    moved = next(r for r in reports if isinstance(r, runs.EarlierRunMoved))
    assert moved.path == folder / "earlier-1" and weights(moved.path) == first
    assert (moved.path / "training_state.safetensors").exists()
    assert not (folder / "0000002_adapters.safetensors").exists()
    fine_tune(folder, data)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"earlier-1", "earlier-2", "best"}
    assert weights(folder / "earlier-1" / "best") == first


def test_an_earlier_run_stays_until_the_first_checkpoint(data, tmp_path):
    folder = tmp_path / "a"
    fine_tune(folder, data)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(AdapterError):
        fine_tune(folder, data, adapter=AdapterConfig(rank=100000))
    reports = mlx_lora.run(folder, model=PATH, data=data, train=TrainConfig(iters=5))
    for report in reports:
        if isinstance(report, mlx_lora.Progress):
            reports.close()
            break
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("adapter", "train"),
    [
        (AdapterConfig(rank=4, num_layers=2, dropout=0.1), {"grad_accumulation_steps": 2}),
        (AdapterConfig(method="dora", rank=4, num_layers=2), {}),
        (AdapterConfig(method="vera", rank=4, num_layers=2), {}),
        (AdapterConfig(method="full", num_layers=1), {}),
        (AdapterConfig(rank=4, num_layers=2, init="pissa"), {}),
        (AdapterConfig(rank=4, num_layers=2, init="eva", init_batches=2), {}),
        (AdapterConfig(rank=4, num_layers=2, init="lora_ga", init_batches=2), {}),
    ],
    ids=["lora", "dora", "vera", "full", "pissa", "eva", "lora_ga"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(adapter, train, data, tmp_path):
    fine_tune(tmp_path / "one", data, 5, adapter, train)
    fine_tune(tmp_path / "two", data, 3, adapter, train)
    reports = fine_tune(tmp_path / "two", data, 5, adapter, train, resume=True)
    assert next(r for r in reports if isinstance(r, runs.Started)).iteration == 3
    assert "EarlierRunMoved" not in names(reports)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_stop_saves_and_resume_continues(data, tmp_path):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    reports = fine_tune(tmp_path / "a", data, 5, stop=stop, test_batches=1)
    assert names(reports)[-2:] == ["Checkpoint", "Done"] and reports[-1].stopped and reports[-1].iteration == 2
    fine_tune(tmp_path / "a", data, 5, resume=True)
    fine_tune(tmp_path / "b", data, 5)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_starting_from_the_weights_in_a_file(data, tmp_path):
    fine_tune(tmp_path / "a", data, 3)
    file = tmp_path / "a" / "adapters.safetensors"
    reports = fine_tune(tmp_path / "b", data, 1, resume_adapter_file=file, train={"val_batches": -1})
    first = next(r for r in reports if isinstance(r, mlx_lora.training.ValReport))
    model, tokenizer = mlx_lora.load(PATH, tmp_path / "a")
    valid = mlx_lora.load_dataset(data, tokenizer).valid
    assert first.val_loss == pytest.approx(mlx_lora.evaluate(model, valid, 2).loss, abs=1e-6)


def test_a_file_of_other_modules_leaves_the_model_without_an_adapter(data, tmp_path):
    fine_tune(tmp_path / "a", data)
    model, tokenizer = mlx_lora.load(PATH)
    file = tmp_path / "a" / "adapters.safetensors"
    with pytest.raises(AdapterError, match="in this run"):
        fine_tune(
            tmp_path / "b", data, model=(model, tokenizer), adapter=AdapterConfig(rank=8), resume_adapter_file=file
        )
    assert not adapters_on(model)
    mlx_lora.attach(model, ADAPTER)


def test_the_test_set_is_measured_after_training(data, tmp_path):
    reports = fine_tune(tmp_path / "a", data, test_batches=-1)
    assert names(reports)[-2:] == ["Done", "TestReport"] and reports[2].rows["test"] == 8
    measured = list(runs.measure(PATH, data, tmp_path / "a", batch_size=2))[-1]
    assert reports[-1].loss == pytest.approx(measured.loss, abs=1e-6)
    assert measured.exact_match is None and measured.answered == 0


def test_the_test_set_is_measured_with_the_loss_of_the_run(data, tmp_path, monkeypatch):
    def constant(model, tokens, mask):
        total, count = mlx_lora.training.losses.cross_entropy.loss(model, tokens, mask)
        return 0 * total + 2 * count, count

    monkeypatch.setitem(mlx_lora.training.LOSSES, "constant", constant)
    reports = fine_tune(tmp_path / "a", data, train={"loss": "constant"}, test_batches=-1)
    assert reports[-1].loss == pytest.approx(2)
    assert list(runs.measure(PATH, data, loss="constant"))[-1].loss == pytest.approx(2)


def test_answers_and_exact_match(data):
    reports = list(runs.measure(PATH, data, batch_size=4, exact_match=3, max_tokens=4))
    given = [r for r in reports if isinstance(r, runs.Answer)]
    assert len(given) == 3 and all(a.question and a.expected for a in given)
    assert reports[-1].answered == 3 and reports[-1].exact_match == sum(a.correct for a in given) / 3
    model, tokenizer = mlx_lora.load(PATH)
    questions = mlx_lora.data.questions(data, tokenizer, "test", 3)
    alone = [next(runs.answers(model, tokenizer, [question], 4)) for question in questions]
    assert alone == given


def test_measure_refuses_what_it_cannot_use(data):
    for options in ({"exact_match": -1}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            runs.measure(PATH, data, **options)
    with pytest.raises(ConfigError, match="no loss 'x'"):
        runs.measure(PATH, data, loss="x")
    with pytest.raises(ConfigError, match="adapter_path"):
        runs.measure(("model", "tokenizer"), data, "adapters")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resume": True}, "holds no training_state.safetensors"),
        ({"resume": True, "resume_adapter_file": "x"}, "contradict"),
        ({"resume_adapter_file": "x"}, "no such file"),
        ({"resume_adapter_file": __file__, "adapter": AdapterConfig(init="pissa")}, "contradict"),
        ({"report_to": ["fax"]}, "fax"),
        ({"project_name": "x"}, "report_to"),
        ({"data": ["rows"]}, "not a list"),
        ({"data": Splits(), "test_batches": 1}, "test set"),
    ],
)
def test_contradictions_are_refused_at_once(options, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        mlx_lora.run(tmp_path / "a", **{"model": "nowhere", "data": data, **options})
    assert not (tmp_path / "a").exists()


def test_a_folder_with_another_formats_adapter_is_refused_at_once(data, tmp_path):
    """Training would end in an error at its first checkpoint, with the other adapter's config moved away."""
    model, _ = mlx_lora.load(PATH)
    mlx_lora.attach(model, ADAPTER)
    mlx_lora.save_adapter(mlx_lora.extract(model), tmp_path / "a", "peft")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="holds an adapter of format peft"):
        mlx_lora.run(tmp_path / "a", model=PATH, data=data)
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        mlx_lora.run(tmp_path / "file", model=PATH, data=data)


def test_more_layers_than_the_model_has(data, tmp_path):
    with pytest.raises(ConfigError, match="num_layers is 99"):
        fine_tune(tmp_path / "a", data, adapter=AdapterConfig(num_layers=99))
    fine_tune(tmp_path / "a", data, 1, adapter=AdapterConfig())  # the default means all layers of a smaller model


def test_resuming_a_complete_run_or_another_one(data, tmp_path):
    folder = tmp_path / "a"
    fine_tune(folder, data, 2)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="has done 2 iterations"):
        fine_tune(folder, data, 2, resume=True, model="nowhere")
    with pytest.raises(TrainingError, match="another run"):
        fine_tune(folder, data, 4, AdapterConfig(rank=8, num_layers=2), resume=True)
    (folder / "training_state.safetensors").write_bytes(b"cut")
    with pytest.raises(FormatError):
        fine_tune(folder, data, 4, resume=True)
    (folder / "training_state.safetensors").write_bytes(before[folder / "training_state.safetensors"])
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after.pop(folder / "report.html")  # the runs of these tests make no page, so resuming makes the missing one
    assert after == before


def test_a_failed_write_leaves_the_last_checkpoint(data, tmp_path, monkeypatch):
    """A disk that is full at the second checkpoint."""
    folder, save = tmp_path / "a", mx.save_safetensors

    def full(path, arrays, **options):
        if (folder / "0000001_adapters.safetensors").exists() and "training_state" in str(path):
            raise RuntimeError("No space left on device")
        save(path, arrays, **options)

    fine_tune(folder, data, 1)
    state = (folder / "training_state.safetensors").read_bytes()
    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(FormatError, match="No space"):
        fine_tune(folder, data, 3, resume=True)
    monkeypatch.undo()
    assert (folder / "training_state.safetensors").read_bytes() == state
    fine_tune(folder, data, 3, resume=True)
    fine_tune(tmp_path / "b", data, 3)
    assert weights(folder) == weights(tmp_path / "b")


def test_a_run_that_cannot_start_changes_nothing(tmp_path):
    """Unknown names and folders that cannot be written are refused before a model is loaded."""
    with pytest.raises(ConfigError, match="no loss 'foo'"):
        mlx_lora.run(tmp_path, model="absent", data=DataConfig(data="absent"), train=TrainConfig(loss="foo"))
    for batches in (0, -3):
        with pytest.raises(ConfigError, match="test_batches must be"):
            mlx_lora.run(tmp_path, model="absent", data=DataConfig(data="absent"), test_batches=batches)
    with pytest.raises(ConfigError, match="cannot be written"):
        mlx_lora.run("/proc/run", model="absent", data=DataConfig(data="absent"))


def test_a_loaded_model_stays_bare_if_there_is_nothing_to_train_on(tmp_path):
    model, tokenizer = mlx_lora.load(PATH)
    with pytest.raises(mlx_lora.MLXLoRAError, match="empty"):
        list(mlx_lora.run(tmp_path, model=(model, tokenizer), data=([], None)))
    mlx_lora.attach(model, mlx_lora.AdapterConfig())
