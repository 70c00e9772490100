"""``resume`` continues the run that a checkpoint belongs to, takes from it what is left out, and refuses any other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.config.preference import PREFERENCE_OPTIONS
from mlx_lora.errors import ConfigError, FormatError, MLXLoRAWarning, TrainingError
from mlx_lora.runs.identity import FORCED, FREE
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import TrainingState

SETTINGS = {"rank": 4, "num_layers": 2, "keys": ("self_attn.q_proj",)}
ADAPTER = AdapterConfig(**SETTINGS)
TRAIN = TrainConfig(iters=2, batch_size=2, val_batches=1)


def write_rows(folder: Path, train: list, valid: list | None = None) -> DataConfig:
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("valid", valid or list(skill.rows("valid", 4)))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(data=str(folder), mask_prompt=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    return write_rows(tmp_path_factory.mktemp("rows") / "data", list(skill.rows("train", 16)))


def run(folder: Path, **options) -> list:
    options = {"model": PATH, "adapter": ADAPTER, "optimizer": OptimizerConfig(learning_rate=1e-3), **options}
    return list(mlx_lora.run(folder, **{"train": TRAIN, **options}))


@pytest.fixture(scope="module")
def two_steps(data, tmp_path_factory) -> Path:
    """The folder of a run that may be copied."""
    folder = tmp_path_factory.mktemp("run") / "a"
    run(folder, data=data)
    return folder


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "a"))


def refused(folder: Path, data, *said: str, error=TrainingError, **options) -> str:
    """Resuming is refused before training with a message that holds all of ``said``; the folder is unchanged."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    options.setdefault("train", dataclasses.replace(TRAIN, iters=3))
    with pytest.raises(error) as caught:
        run(folder, data=data, resume=True, **options)
    assert all(text in caught.value.message for text in said), caught.value.message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    return str(caught.value)


def weights(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_other_rows_or_another_order_are_refused(folder, tmp_path):
    rows = list(skill.rows("train", 16))
    swapped = [rows[1], rows[0], *rows[2:]]
    for number, other in enumerate((list(skill.rows("train", 17))[1:], swapped)):
        text = refused(
            folder, write_rows(tmp_path / f"data{number}", other), "training data: other rows or another order"
        )
        assert "validation data" not in text
    refused(folder, write_rows(tmp_path / "fewer", rows[:-1]), "rows of training data: 16 in the checkpoint, 15 here")
    other = write_rows(tmp_path / "valid", rows, list(skill.rows("valid", 5))[1:])
    assert "training data" not in refused(folder, other, "validation data: other rows")


def test_the_same_rows_in_another_folder_are_accepted(folder, tmp_path, data):
    copied = write_rows(tmp_path / "copy", list(skill.rows("train", 16)))
    run(folder, data=copied, resume=True, train=dataclasses.replace(TRAIN, iters=3))


def changed_base(tmp_path: Path, change=lambda weights: None, config: dict | None = None) -> Path:
    target = Path(shutil.copytree(PATH, tmp_path / f"base{len(list(tmp_path.iterdir()))}"))
    weights = mx.load(str(target / "model.safetensors"))
    change(weights)
    mx.eval(weights)
    (target / "model.safetensors").unlink()
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    return target


def test_a_base_with_other_weights_or_another_config_is_refused(folder, data, tmp_path):
    def shift(weights: dict) -> None:
        name = next(n for n in weights if "layers.0.mlp.up_proj.weight" in n)
        weights[name] = weights[name] * 1.01

    refused(folder, data, "base model: other weights", model=changed_base(tmp_path, shift))
    base = changed_base(tmp_path, config={"rms_norm_eps": 1e-3})
    refused(folder, data, "base model: rms_norm_eps: ", "0.001 here", model=base)


def test_a_copy_of_the_base_is_accepted_whatever_its_path_files_and_dtype(folder, data, tmp_path):
    copy = changed_base(tmp_path)
    file = copy / "model.safetensors"
    arrays = sorted(mx.load(str(file)).items())
    mx.save_safetensors(str(copy / "model-00001-of-00002.safetensors"), dict(arrays[:5]), {"format": "mlx"})
    mx.save_safetensors(str(copy / "model-00002-of-00002.safetensors"), dict(arrays[5:]), {"format": "mlx"})
    file.unlink()
    link = tmp_path / "link"
    link.symlink_to(copy)
    run(folder, data=data, model=link, resume=True, train=dataclasses.replace(TRAIN, iters=3))
    model, tokenizer = mlx_lora.load(PATH)
    run(folder, data=data, model=(model, tokenizer), resume=True, train=dataclasses.replace(TRAIN, iters=4))


@pytest.mark.parametrize("mode", ["affine", "nf4"])
def test_a_quantized_base_is_recognised(mode, data, tmp_path):
    def grow(weights: dict) -> None:
        weights.update({name: 1.02 * array for name, array in weights.items()})

    for name, source in (("q", PATH), ("other", changed_base(tmp_path, grow))):
        model, _ = mlx_lora.load(source)
        mlx_lora.quantize(model, mode=mode)
        mlx_lora.save_model(model, tmp_path / name)
    run(tmp_path / "a", data=data, model=tmp_path / "q")
    refused(tmp_path / "a", data, "base model: other weights", model=tmp_path / "other")
    refused(tmp_path / "a", data, "base model: other weights", model=PATH)
    run(tmp_path / "a", data=data, model=tmp_path / "q", resume=True, train=dataclasses.replace(TRAIN, iters=3))


def test_every_difference_is_named_at_once(folder, data):
    text = refused(
        folder,
        dataclasses.replace(data, mask_prompt=False, max_seq_length=20),
        "mask_prompt: True in the checkpoint, False here",
        "max_seq_length: 2048 in the checkpoint, 20 here",
        "training data: other rows",
        "rank: 4 in the checkpoint, 8 here",
        "scale: 20.0 in the checkpoint, 1.0 here",
        "dropout: 0.0 in the checkpoint, 0.1 here",
        "seed: 0 in the checkpoint, 3 here",
        "batch_size: 2 in the checkpoint, 4 here",
        "learning_rate: 0.001 in the checkpoint, 1e-05 here",
        adapter=AdapterConfig(rank=8, scale=1.0, dropout=0.1, num_layers=2, keys=ADAPTER.keys),
        optimizer=OptimizerConfig(),
        train=TrainConfig(iters=3, seed=3, batch_size=4, val_batches=1),
    )
    assert "num_layers" not in text and "iters" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"method": "dora"},
        {"keys": ("self_attn.v_proj",)},
        {"num_layers": 1},
        {"init": "gaussian"},
        {"rank_pattern": {"layers.2.self_attn.q_proj": 2}},
        {"alpha": 16.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_adapter_is_refused(change, folder, data):
    name = next(iter(change))
    refused(folder, data, "scale" if name == "alpha" else name, adapter=AdapterConfig(**{**SETTINGS, **change}))


def test_an_alpha_of_the_same_scale_is_the_same_adapter(folder, data):
    adapter = AdapterConfig(**SETTINGS, alpha=80.0)
    run(folder, data=data, adapter=adapter, resume=True, train=dataclasses.replace(TRAIN, iters=3))


def test_every_setting_is_free_forced_or_compared():
    """A new field of a config is compared unless it is listed, and the lists name no field that is gone."""
    fields = {f.name for kind in (OptimizerConfig, TrainConfig) for f in dataclasses.fields(kind)}
    assert set(FREE) | set(FORCED) <= fields
    assert fields - set(FREE) - set(FORCED) == {
        "optimizer",
        "batch_size",
        "pack",
        "loss",
        "grad_accumulation_steps",
        "seed",
        *PREFERENCE_OPTIONS,
    }


def test_train_help_lists_what_may_change():
    from click.testing import CliRunner

    from mlx_lora.cli.train import train

    text = " ".join(CliRunner().invoke(train, ["--help"], terminal_width=200).output.split())
    for name in FREE:
        assert "--" + name.replace("_", "-") in text.partition("may change:")[2]


@pytest.mark.parametrize(
    ("optimizer", "train"),
    [
        (OptimizerConfig(learning_rate=1e-4), {}),
        (OptimizerConfig(learning_rate=1e-3, lr_schedule="cosine_decay"), {}),
        (OptimizerConfig(learning_rate=1e-3, warmup=2), {}),
        (OptimizerConfig(learning_rate=1e-3, optimizer_config={"adam": {"betas": [0.5, 0.9]}}), {}),
        (OptimizerConfig(learning_rate=1e-3), {"max_grad_norm": 0.5}),
    ],
    ids=["rate", "schedule", "warmup", "betas", "norm"],
)
def test_other_settings_of_the_optimizer_need_force_and_are_said(optimizer, train, folder, data):
    config = dataclasses.replace(TRAIN, iters=3, **train)
    text = refused(folder, data, "in the checkpoint", optimizer=optimizer, train=config)
    assert "--force" in text
    with pytest.warns(MLXLoRAWarning, match="continues with another setting"):
        reports = run(folder, data=data, optimizer=optimizer, train=config, resume=True, force=True)
    assert reports[-1].iteration == 3


def test_force_does_not_allow_another_run(folder, data):
    refused(folder, data, "seed", "learning_rate", optimizer=OptimizerConfig(), force=True,
            train=dataclasses.replace(TRAIN, iters=3, seed=1))  # fmt: skip
    refused(folder, data, "optimizer: adam", optimizer=OptimizerConfig(optimizer="adamw", learning_rate=1e-3))


def test_a_schedule_that_more_iterations_stretch_is_said(data, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-3, lr_schedule="cosine_decay")
    run(tmp_path / "a", data=data, optimizer=optimizer)
    longer = dataclasses.replace(TRAIN, iters=4)
    with pytest.warns(MLXLoRAWarning, match="cosine_decay now spans 4 iterations instead of 2"):
        run(tmp_path / "a", data=data, optimizer=optimizer, train=longer, resume=True)


def test_free_settings_may_change(folder, data):
    config = TrainConfig(
        iters=4, batch_size=2, val_batches=2, steps_per_report=3, steps_per_eval=3, save_every=1,
        grad_checkpoint=True, clear_cache_threshold=10**9, max_skipped_steps=3,
    )  # fmt: skip
    with pytest.warns(MLXLoRAWarning, match="chosen by val_loss of 2 batches instead of val_loss of 1 batches") as said:
        assert run(folder, data=data, train=config, resume=True)[-1].iteration == 4
    assert len(said) == 1


def test_what_is_left_out_is_taken_from_the_run(data, tmp_path):
    """A run that is resumed with nothing but more iterations equals the run that was not interrupted."""
    adapter = AdapterConfig(
        rank=4, alpha=16, dropout=0.1, num_layers=2, keys=("q_proj",), rank_pattern={"layers.2.self_attn.q_proj": 2}
    )
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=1, optimizer_config={"adam": {"betas": [0.8, 0.9]}})
    train = TrainConfig(iters=4, batch_size=2, val_batches=1, seed=3)
    options = {"data": data, "adapter": adapter, "optimizer": optimizer}
    run(tmp_path / "one", **options, train=train)
    run(tmp_path / "two", **options, train=dataclasses.replace(train, iters=2))
    list(mlx_lora.run(tmp_path / "two", resume=True, train={"iters": 4}))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    with pytest.raises(TrainingError, match=r"rank: 4 in the checkpoint, 6 here"):
        list(mlx_lora.run(tmp_path / "two", resume=True, train={"iters": 5}, adapter={"rank": 6}))
    with pytest.raises(TrainingError, match=r"scale: 4\.0 in the checkpoint, 1.0 here"):
        list(mlx_lora.run(tmp_path / "two", resume=True, train={"iters": 5}, adapter={"scale": 1.0}))


def test_the_command_line_takes_what_is_left_out_from_the_run(data, tmp_path, capsys):
    from mlx_lora.cli.main import main

    def train(folder: str, *options: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--adapter-path", str(tmp_path / folder), *options])
        assert ended.value.code == code
        return capsys.readouterr().err

    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"data: {data.data}\nmask_prompt: true\nlora_parameters: {{rank: 4, scale: 5.0}}\n")
    common = ("--model", str(PATH), "-c", str(yaml), "--learning-rate", "1e-3", "--batch-size", "2")
    train("one", *common, "--iters", "4")
    train("two", *common, "--iters", "2")
    assert str(PATH) in train("two", "--resume", "--iters", "4")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    err = train("two", "--resume", "--iters", "6", "--scale", "1", "--no-mask-prompt", code=1)
    assert "scale: 5.0 in the checkpoint, 1.0 here" in err and "mask_prompt: True" in err
    assert "learning_rate" not in err
    err = train("two", "--resume", "--iters", "6", "--learning-rate", "1e-4", "--force")
    assert "Warning: The run continues with another setting: learning_rate: 0.001" in err


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_warning(folder, data):
    file = folder / "training_state.safetensors"
    state = dataclasses.replace(TrainingState.load(file), run={})
    state.fingerprint.pop("training data")
    state.save(file)
    with pytest.warns(MLXLoRAWarning, match="older version"):
        run(folder, data=data, resume=True, train=dataclasses.replace(TRAIN, iters=3))


def test_a_training_state_beside_another_adapter_is_not_resumed(folder, data, tmp_path):
    """``merge --force``, ``convert --force`` and a copy by hand all replace the adapter of a run."""
    kept = weights(folder)
    merged = mlx_lora.merge_adapters([mlx_lora.load_adapter(folder)], [0.5])
    mlx_lora.save_adapter(merged, folder, overwrite=True)
    text = refused(folder, data, "is not the adapter that the run saved at iteration 2", error=ConfigError)
    assert "copy 0000002_adapters.safetensors over it" in text
    shutil.copy(folder / "0000002_adapters.safetensors", folder / "adapters.safetensors")
    assert weights(folder) == kept
    run(folder, data=data, resume=True, train=dataclasses.replace(TRAIN, iters=3))


FIRST_OF_SECOND = 4  # files that the first checkpoint renames


@pytest.fixture(scope="module")
def saving(data, tmp_path_factory) -> Path:
    """A complete run of four iterations, ``whole``. Beside it what SIGKILL leaves before the Nth renaming of a file."""
    place = tmp_path_factory.mktemp("killed")
    replace, number = os.replace, itertools.count()

    def noted(source, target):
        shutil.copytree(place / "whole", place / str(next(number)))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", noted)
        run(place / "whole", data=data, train=dataclasses.replace(TRAIN, iters=4, save_every=2))
    return place


@pytest.mark.parametrize("point", range(FIRST_OF_SECOND, FIRST_OF_SECOND + 6))
def test_a_run_killed_while_it_saves_resumes_exactly(point, saving, data):
    """The second checkpoint renames six files; the run is killed before each of them."""
    folder, whole = saving / str(point), saving / "whole"
    assert any(p.name.startswith(".writing-") for p in folder.iterdir())
    reports = run(folder, data=data, train=dataclasses.replace(TRAIN, iters=4), resume=True)
    assert next(r for r in reports if type(r).__name__ == "Started").iteration == 2
    assert weights(folder) == weights(whole)
    assert weights(folder / "best") == weights(whole / "best") == weights(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    names -= {"log.jsonl", "report.html"}
    assert names == {
        *("best/adapters.safetensors", "best/adapter_config.json"),
        *("adapters.safetensors", "adapter_config.json", "training_state.safetensors"),
        *("0000002_adapters.safetensors", "0000004_adapters.safetensors"),
    }


def test_a_state_that_cannot_be_read_says_so(folder, data):
    (folder / "training_state.safetensors").write_bytes(b"cut")
    refused(folder, data, "cannot be read", error=FormatError)
