"""Epochs, early stopping, the best checkpoint and how many are kept; each exact over a resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError
from mlx_lora.formats.checkpoints import checkpoints
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import loop

ADAPTER = AdapterConfig(rank=4, num_layers=2, keys=("self_attn.q_proj",), dropout=0.1)
ROWS = 13


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split, count in (("train", ROWS), ("valid", 4), ("test", 4)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return DataConfig(data=str(folder), mask_prompt=True, max_seq_length=128)


def run(folder: Path, data, *, resume: bool = False, rate: float = 1e-3, **train) -> list:
    config = {"batch_size": 2, "val_batches": 1, **train}
    options = {"model": PATH, "data": data, "adapter": ADAPTER, "optimizer": OptimizerConfig(learning_rate=rate)}
    return list(mlx_lora.run(folder, **options, train=config if resume else TrainConfig(**config), resume=resume))


def of(reports: list, name: str) -> list:
    return [report for report in reports if type(report).__name__ == name]


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    """The files of the adapter and of the best one; not the training state, which counts seconds."""
    found = [*folder.glob("*adapter*"), *folder.glob("best/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def losses(monkeypatch):
    """A function that sets the losses of the next validations, the one before the first step included."""

    def script(*values: float) -> None:
        left = iter(values)
        found = mlx_lora.training.Evaluation(0.0, 1, 1.0, 0.0)
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: dataclasses.replace(found, loss=next(left)))

    return script


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("epochs", [1, 3, 0.5, 2.25])
def test_the_run_ends_with_the_epoch(pack, epochs, data, tmp_path):
    reports = run(tmp_path / "a", data, epochs=epochs, pack=pack, val_batches=0)
    started, done, loaded = of(reports, "Started")[0], reports[-1], of(reports, "DataLoaded")[0]
    assert started.iters == done.iteration
    tokens = done.trained_tokens / loaded.learned_tokens
    assert tokens == epochs if epochs in (1, 3) else abs(tokens - epochs) < 0.4
    run(tmp_path / "b", data, iters=started.iters, pack=pack, val_batches=0)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["training"]
    assert (saved["epochs"], saved["iters"]) == (epochs, started.iters)


def test_a_packed_run_of_several_epochs_has_every_row_in_each(data):
    """The epochs differ in their number of batches, so that no constant would do."""
    rows = [mlx_lora.data.Example(tokens, tokens > 0) for tokens in _lengths(200, seed=3)]
    found = mlx_lora.data.Dataset(rows)
    found.summary = dataclasses.replace(found.summary, limit=100)
    counts = [mlx_lora.data.packing.packed_batches_per_epoch(found, 1, 0, epoch) for epoch in range(8)]
    assert len(set(counts)) > 1, "no test without it"
    iters = mlx_lora.data.iterations(TrainConfig(epochs=8, pack=True, batch_size=1), found)
    batches = mlx_lora.data.packed_batches(found, 1, seed=0)
    tokens = sum(int((next(batches).segments > 0).sum()) for _ in range(iters))
    assert iters == sum(counts) and tokens == 8 * found.lengths.sum()


def _lengths(count: int, seed: int) -> list:
    import numpy as np

    random = np.random.RandomState(seed)
    return [np.ones(int(length), np.int32) for length in random.randint(20, 70, count)]


def test_a_part_of_an_epoch_is_taken_as_written():
    rows = mlx_lora.data.Dataset([mlx_lora.data.Example(tokens, tokens > 0) for tokens in _lengths(30, seed=0)])
    for epochs, iters in ((0.1, 3), (0.3, 9), (0.7, 21), (1e-9, 1), (2.0, 60), (1.01, 31)):
        assert mlx_lora.data.iterations(TrainConfig(epochs=epochs, batch_size=1), rows) == iters


def test_a_schedule_spans_the_epochs(data, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-3, lr_schedule="linear_schedule")
    options = {"model": PATH, "data": data, "adapter": ADAPTER, "optimizer": optimizer}
    train = {"batch_size": 2, "val_batches": 0, "steps_per_report": 1, "grad_accumulation_steps": 2}
    reports = list(mlx_lora.run(tmp_path / "a", **options, train={**train, "epochs": 2}))
    rates = [report.learning_rate for report in of(reports, "TrainReport")]
    assert of(reports, "Started")[0].iters == 14 and rates[-1] == pytest.approx(1e-3 / 7, rel=1e-3)


@pytest.mark.parametrize("pack", [False, True])
def test_more_epochs_continue_exactly(pack, data, tmp_path):
    run(tmp_path / "one", data, epochs=3, pack=pack)
    run(tmp_path / "two", data, epochs=1, pack=pack)
    with pytest.raises(ConfigError, match=r"iterations; 1 epochs are"):
        list(mlx_lora.run(tmp_path / "two", model="nowhere", resume=True))
    with pytest.raises(ConfigError, match="Raise --epochs"):
        list(mlx_lora.run(tmp_path / "two", train={"epochs": 0.5}, resume=True))
    reports = list(mlx_lora.run(tmp_path / "two", train={"epochs": 3}, resume=True))
    assert of(reports, "Started")[0].iters == reports[-1].iteration
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    list(mlx_lora.run(tmp_path / "two", train={"iters": reports[-1].iteration + 1}, resume=True))


def test_iters_and_epochs_together_are_refused_and_a_flag_replaces_the_file(data, tmp_path, capsys):
    for both in ({"iters": 1000, "epochs": 2}, {"iters": 3, "epochs": 0.5}):
        with pytest.raises(ConfigError, match="contradict each other"):
            TrainConfig(**both)
    assert TrainConfig().iters == 1000 and TrainConfig(epochs=2).iters is None
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"data: {data.data}\niters: 1000\nbatch_size: 4\nval_batches: 0\nmodel: {PATH}\n")
    command = ["train", "-c", str(yaml), "--adapter-path", str(tmp_path / "a")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--epochs", "1"])
    assert ended.value.code == 0 and "0000004_adapters.safetensors" in capsys.readouterr().err
    yaml.write_text(yaml.read_text() + "epochs: 2\n")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2 and "iters (1000) and epochs (2.0) contradict" in capsys.readouterr().err


# --- early stopping --------------------------------------------------------------------------------------------------


def test_patience_ends_the_run_as_complete(data, tmp_path, losses, capsys):
    losses(1.0, 5.0, 4.0, 4.0, 6.0, float("nan"))
    options = {"iters": 20, "steps_per_eval": 1, "patience": 3, "save_every": 100, "grad_accumulation_steps": 3}
    reports = run(tmp_path / "a", data, **options)
    done = reports[-1]
    assert (done.iteration, done.reason, done.stopped) == (5, "patience", False)
    assert [(r.iteration, r.value) for r in of(reports, "NewBest")] == [(1, 5.0), (2, 4.0)]
    assert [r.iteration for r in of(reports, "Checkpoint")] == [1, 2, 5] and of(reports, "TrainReport")
    with pytest.raises(ConfigError, match=r"ended early at iteration 5: none of 3 valid.*iteration 2 \(val_loss 4\)"):
        list(mlx_lora.run(tmp_path / "a", model="nowhere", resume=True))
    losses(9.0, 9.0)
    again = list(mlx_lora.run(tmp_path / "a", train={"patience": 4}, resume=True))
    assert (again[-1].iteration, again[-1].reason) == (6, "patience")
    losses(*[1.0, 5.0, 4.0, 4.0, 6.0, 7.0, 9.0])
    run(tmp_path / "b", data, **{**options, "patience": 4})
    found = files(tmp_path / "a")
    assert found.pop("0000005_adapters.safetensors") and found == files(tmp_path / "b")


def test_patience_survives_a_stop(data, tmp_path, losses):
    asked = []
    losses(9.0, 5.0, 6.0)
    train = {"batch_size": 2, "val_batches": 1, "iters": 20, "steps_per_eval": 1, "patience": 3}
    stop = lambda: asked.append(1) or len(asked) == 2  # noqa: E731
    list(mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=ADAPTER, train=train, stop=stop))
    losses(7.0, 8.0)
    done = list(mlx_lora.run(tmp_path / "a", resume=True))[-1]
    assert (done.iteration, done.reason) == (4, "patience")


def test_a_patience_that_cannot_act_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"patience 3 cannot end this run early: it has 3 validations"):
        run(tmp_path / "a", data, iters=8, steps_per_eval=2, patience=3)
    with pytest.raises(ConfigError, match="patience 3 cannot end"):
        run(tmp_path / "a", data, epochs=1, steps_per_eval=2, patience=3)
    with pytest.raises(ConfigError, match="patience: there is no validation set"):
        run(tmp_path / "a", dataclasses.replace(data, data=f"{data.data}/train.jsonl", valid_split=0), patience=1)
    assert not (tmp_path / "a").exists()


# --- the best checkpoint ---------------------------------------------------------------------------------------------


def test_best_is_the_adapter_of_the_best_validation(data, tmp_path, losses):
    losses(0.1, 3.0, 2.0, 2.5)  # before the first step is no candidate
    reports = run(tmp_path / "a", data, iters=5, steps_per_eval=2)
    assert [r.iteration for r in of(reports, "NewBest")] == [2, 4]
    best = tmp_path / "a" / "best"
    assert weights(best) == (tmp_path / "a" / "0000004_adapters.safetensors").read_bytes() != weights(tmp_path / "a")
    assert json.loads((best / "adapter_config.json").read_text())["checkpoint"]["val_loss"] == 2.0
    mlx_lora.load(PATH, best)


def test_full_weights_have_a_best_checkpoint(data, tmp_path, losses):
    losses(9.0, 1.0, 2.0)
    config = {"iters": 2, "steps_per_eval": 1, "batch_size": 2}
    list(mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=AdapterConfig(method="full", num_layers=1),
                      optimizer=OptimizerConfig(learning_rate=1e-2), train=config))  # fmt: skip
    found = {name: mlx_lora.load(PATH, tmp_path / "a", checkpoint=name)[0] for name in (None, "best", 1, "last")}
    norms = {name: model.layers[-1].mlp.up_proj.weight.sum().item() for name, model in found.items()}
    assert norms[None] == norms["best"] == norms[1] != norms["last"]


def test_a_later_best_of_a_run_that_was_killed_is_taken_back(data, tmp_path, losses):
    folder = tmp_path / "a"
    losses(9.0, 1.0, 2.0)
    run(folder, data, iters=3, steps_per_eval=2)
    right, config = weights(folder / "best"), (folder / "best" / "adapter_config.json").read_text()
    (folder / "best" / "adapters.safetensors").write_bytes(weights(folder))  # as if iteration 3 had been the best
    (folder / "best" / "adapter_config.json").write_text(config.replace('"iteration": 2', '"iteration": 3'))
    losses(3.0, 3.0)
    run(folder, data, iters=5, steps_per_eval=2, resume=True)
    assert weights(folder / "best") == right
    losses(9.0, 1.0, 3.0, 3.0)
    run(tmp_path / "b", data, iters=5, steps_per_eval=2)
    assert files(folder).keys() - files(tmp_path / "b").keys() == {"0000003_adapters.safetensors"}
    assert all(files(folder)[name] == content for name, content in files(tmp_path / "b").items())


def test_the_best_of_the_rows_before_a_stop_is_known_afterwards(data, tmp_path, losses):
    losses(9.0, 1.0)
    run(tmp_path / "a", data, iters=2, steps_per_eval=2)
    losses(2.0)
    reports = run(tmp_path / "a", data, iters=4, steps_per_eval=2, resume=True)
    assert not of(reports, "NewBest") and checkpoints(tmp_path / "a").keys() == {"last", "best", "2", "4"}


def test_another_measure_makes_the_next_validation_the_best(data, tmp_path, losses):
    losses(9.0, 1.0)
    run(tmp_path / "a", data, iters=2, steps_per_eval=2)
    losses(2.0)
    with pytest.warns(mlx_lora.errors.MLXLoRAWarning, match="val_loss of 2 batches instead of val_loss of 1 batches"):
        reports = run(tmp_path / "a", data, iters=4, steps_per_eval=2, val_batches=2, resume=True)
    assert [r.iteration for r in of(reports, "NewBest")] == [4]


def test_a_part_without_validation_keeps_the_best(data, tmp_path, losses, recwarn):
    losses(9.0, 1.0)
    run(tmp_path / "a", data, iters=2)
    run(tmp_path / "a", data, iters=3, val_batches=0, resume=True)
    losses(2.0)
    assert not of(run(tmp_path / "a", data, iters=4, resume=True), "NewBest")
    assert not [w for w in recwarn if issubclass(w.category, mlx_lora.errors.MLXLoRAWarning)]


def test_a_run_without_validation_has_no_best(data, tmp_path):
    run(tmp_path / "a", data, iters=2, val_batches=0)
    assert "best" not in checkpoints(tmp_path / "a")


def test_the_test_set_after_training_says_that_it_is_the_last_adapter(data, tmp_path, losses):
    losses(9.0, 1.0, 2.0)
    train = TrainConfig(iters=4, steps_per_eval=2, batch_size=2)
    reports = list(mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=ADAPTER, train=train, test_batches=1))
    assert "last adapter (iteration 4); mlx-lora test measures the best one (iteration 2)" in reports[-2].text


# --- keep ------------------------------------------------------------------------------------------------------------


def test_keep_removes_old_checkpoints_but_never_the_best(data, tmp_path, losses):
    losses(9.0, 4.0, 5.0, 5.0, 6.0)
    run(tmp_path / "a", data, iters=7, steps_per_eval=2, save_every=1, keep=2)
    assert checkpoints(tmp_path / "a").keys() == {"last", "best", "2", "6", "7"}
    losses(*[3.0] * 3)
    run(tmp_path / "a", data, iters=9, steps_per_eval=2, save_every=1, keep=1, resume=True)
    assert checkpoints(tmp_path / "a").keys() == {"last", "best", "8", "9"}


# --- resuming from another folder ------------------------------------------------------------------------------------


def test_a_relative_path_of_the_record_is_explained(data, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("small").symlink_to(PATH)
    Path("rows").symlink_to(data.data)
    config = {"iters": 2, "batch_size": 2, "val_batches": 0}
    list(mlx_lora.run("a", model="small", data="rows", adapter=ADAPTER, train=config))
    monkeypatch.chdir(tmp_path)
    for given, name, flag in (
        ({"data": data.data}, "model 'small'", "--model"),
        ({"model": PATH}, "data 'rows'", "--data"),
        ({"model": PATH, "data": {"mask_prompt": False}}, "data 'rows'", "--data"),
    ):
        with pytest.raises(mlx_lora.MLXLoRAError) as caught:
            list(mlx_lora.run("here/a", **given, train={"iters": 3}, resume=True))
        assert f"{name} comes from the record of the run in here/a" in caught.value.message
        assert flag in caught.value.hint
    (tmp_path / "here" / "m.py").write_text("def f(given, expected):\n    return 1.0\n")
    with pytest.raises(mlx_lora.MLXLoRAError) as caught:
        list(mlx_lora.run("here/a", model="gone", data=data.data, train={"iters": 3}, resume=True))
    assert "record" not in str(caught.value)
    here = {"model": "here/small", "data": "here/rows", "resume": True}
    measuring = {"iters": 3, "val_batches": 1, "metric_rows": 1, "metric_max_tokens": 1}
    list(mlx_lora.run("here/a", **here, train={**measuring, "metric": "here/m.py:f"}))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"metric 'here/m.py:f' comes from the record of the run in a"):
        mlx_lora.run("a", model="small", data="rows", train={"iters": 4}, resume=True)
    list(mlx_lora.run("a", model="small", data="rows", train={"iters": 4, "metric": "m.py:f"}, resume=True))


# --- the rhythm of epochs, and options beside those of the record ----------------------------------------------------


@pytest.mark.parametrize(("iters", "epochs", "found"), [(27, 3, (2, 9)), (204, 3, (17, 68)), (9999, 3, (200, 100))])
def test_epochs_decide_how_often_a_run_validates_and_saves(iters, epochs, found):
    assert tuple(TrainConfig(epochs=epochs).rhythm_of(iters).values()) == found
    assert tuple(TrainConfig(epochs=epochs, steps_per_eval=5).rhythm_of(iters).values()) == (5, found[1])
    assert (TrainConfig().steps_per_eval, TrainConfig().save_every) == (200, 100)


def test_patience_works_with_epochs_alone_and_a_resumed_run_keeps_the_rhythm(data, tmp_path, losses):
    losses(9.0, *range(8, -50, -1))
    first = run(tmp_path / "a", data, epochs=1, patience=1)
    assert of(first, "Started")[0].steps_per_eval == 2 and [r.iteration for r in of(first, "ValReport")] == [
        0,
        2,
        4,
        6,
        7,
    ]
    again = list(mlx_lora.run(tmp_path / "a", train={"epochs": 4}, resume=True))
    assert of(again, "Started")[0].steps_per_eval == 2


def test_no_validation_drops_what_the_record_says_of_it(data, tmp_path, losses):
    losses(9.0, 8.0, 7.0, 6.0, 5.0)
    run(tmp_path / "a", data, iters=4, steps_per_eval=1, patience=2, val_batches=2)
    with pytest.warns(mlx_lora.errors.MLXLoRAWarning, match="steps_per_eval, patience: not taken from the record"):
        mlx_lora.run(tmp_path / "a", train={"val_batches": 0, "iters": 6}, resume=True).close()
    with pytest.raises(ConfigError, match="patience has no effect"):
        mlx_lora.run(tmp_path / "a", train={"val_batches": 0, "patience": 3}, resume=True)


def test_a_run_that_only_gets_worse_says_so(data, tmp_path, losses):
    losses(1.0, 3.0, 2.0)
    texts = [r.text for r in of(run(tmp_path / "a", data, iters=4, steps_per_eval=2), "Warned")]
    assert any("training made the model worse: the validation loss was 1.000" in text for text in texts)
    losses(1.0, 3.0, 0.5)
    assert not of(run(tmp_path / "b", data, iters=4, steps_per_eval=2), "Warned")


def test_another_number_of_processes_is_named_at_once(data, tmp_path, monkeypatch):
    run(tmp_path / "a", data, iters=1, val_batches=0)
    monkeypatch.setattr(
        "mlx_lora.runs.fine_tune.group", lambda: type("Two", (), {"size": lambda self: 2, "rank": lambda self: 0})()
    )
    with pytest.raises(mlx_lora.MLXLoRAError, match="processes: 1 in the checkpoint, 2 here") as caught:
        mlx_lora.run(tmp_path / "a", train={"iters": 2}, resume=True)
    assert caught.value.hint.startswith("Resume it without mlx.launch")


def test_flags_of_a_resumed_run_are_checked_with_its_record(tmp_path, data, capsys):
    row = '{"prompt": "a b", "chosen": "c", "rejected": "d e"}\n'
    for split, count in (("train", 4), ("valid", 2)):
        (tmp_path / f"{split}.jsonl").write_text(row * count)
    config = TrainConfig(loss="dpo", iters=1, batch_size=2, val_batches=1, report_prompts=0)
    list(mlx_lora.run(tmp_path / "a", model=PATH, data=str(tmp_path), adapter=ADAPTER, train=config))
    base = ["train", "--adapter-path", str(tmp_path / "a"), "--resume", "--iters", "2"]
    for flags, code, said in (
        (["--beta", "0.2"], 1, "beta: 0.1 in the checkpoint, 0.2 here"),
        (["--best-by", "rewards/margins"], 0, ""),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*base, *flags])
        err = capsys.readouterr().err
        assert bool(ended.value.code) == bool(code) and said in err, err
