"""``checkpoint`` chooses among the checkpoints of a run's folder, and is refused for anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora.errors import AdapterError, ConfigError, FormatError
from mlx_lora.formats import describe, detect_format
from mlx_lora.formats.checkpoints import checkpoints, choose, said_of
from mlx_lora.formats.files import file_digest
from mlx_lora.tiny_base import PATH


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """Adapter folders of different weights: a, b, c."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for number, name in enumerate("abc"):
        model, _ = mlx_lora.load(PATH)
        mx.random.seed(number)
        mlx_lora.attach(model, mlx_lora.AdapterConfig(rank=2, keys=["q_proj"]))
        found[name] = mlx_lora.save_adapter(mlx_lora.extract(model), root / name)
    return found


@pytest.fixture
def folder(adapters, tmp_path) -> Path:
    """A run's folder: iteration 2 has the weights a, 4 (the best) b, and 6 (the last) c."""
    root = Path(shutil.copytree(adapters["c"], tmp_path / "run"))
    shutil.copytree(adapters["b"], root / "best")
    for iteration, name in ((2, "a"), (4, "b"), (6, "c")):
        shutil.copy(adapters[name] / "adapters.safetensors", root / f"{iteration:07d}_adapters.safetensors")
    _note(root, iteration=6)
    _note(root / "best", iteration=4, val_loss=1.5)
    return root


def _note(folder: Path, **facts) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["checkpoint"] = {**facts, "weights": file_digest(folder / "adapters.safetensors")}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def which(adapter: mlx_lora.Adapter, adapters: dict[str, Path]) -> str:
    """The name of the folder that holds these weights."""
    name = next(iter(adapter.weights))
    return next(
        known
        for known, path in adapters.items()
        if (mlx_lora.load_adapter(path).weights[name] == adapter.weights[name]).all()
    )


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [(None, "b"), ("best", "b"), ("last", "c"), (2, "a"), ("2", "a"), ("0000002", "a"), (6, "c")],
)
def test_a_checkpoint_is_chosen(checkpoint, name, folder, adapters):
    assert which(mlx_lora.load_adapter(folder, checkpoint=checkpoint), adapters) == name
    model, _ = mlx_lora.load(PATH, folder, checkpoint=checkpoint)
    assert which(mlx_lora.extract(model), adapters) == name
    said = said_of(folder, checkpoint, choose(folder, checkpoint))
    assert bool(said) == (checkpoint is None)


def test_what_is_said_of_the_default(folder):
    text = said_of(folder, None, choose(folder))
    assert text == (
        f"Using the best checkpoint in {folder}: iteration 4, val_loss 1.5. --checkpoint last is iteration 6"
    )


def test_a_checkpoint_that_is_not_there_lists_those_that_are(folder):
    for checkpoint in (5, "5", "first", -1, ""):
        with pytest.raises(ConfigError, match="has no checkpoint") as caught:
            mlx_lora.load_adapter(folder, checkpoint=checkpoint)
        assert caught.value.hint == "It has: last, best, 2, 4, 6."
    shutil.rmtree(folder / "best")
    with pytest.raises(ConfigError, match="'best'"):
        mlx_lora.load_adapter(folder, checkpoint="best")


@pytest.mark.parametrize("checkpoint", ["last", "best", 2])
def test_what_is_no_runs_folder_has_no_checkpoints(checkpoint, adapters, folder, tmp_path):
    mlx_lora.save_adapter(mlx_lora.load_adapter(adapters["a"]), tmp_path / "peft", "peft")
    for path in (adapters["a"], folder / "best", folder / "0000002_adapters.safetensors", tmp_path / "peft"):
        assert checkpoints(path) == {}
        with pytest.raises(ConfigError, match="is not the folder of a run"):
            mlx_lora.load_adapter(path, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="no effect without adapter_path"):
        mlx_lora.load(PATH, checkpoint=checkpoint)


def test_without_a_best_checkpoint_the_last_one_is_used(folder, adapters):
    shutil.rmtree(folder / "best")
    assert which(mlx_lora.load_adapter(folder), adapters) == "c"
    assert said_of(folder, None, choose(folder)) == ""
    assert which(mlx_lora.load_adapter(folder, checkpoint="last"), adapters) == "c"


def test_an_adapter_that_replaced_the_runs_own_is_used(folder, adapters):
    """By a copy of a numbered file, as one does with mlx-lm, and by an adapter saved over it."""
    shutil.copy(folder / "0000002_adapters.safetensors", folder / "adapters.safetensors")
    assert which(mlx_lora.load_adapter(folder), adapters) == "a"
    assert "is not used" in said_of(folder, None, choose(folder))
    assert which(mlx_lora.load_adapter(folder, checkpoint="best"), adapters) == "b"
    mlx_lora.save_adapter(mlx_lora.load_adapter(adapters["a"]), folder, overwrite=True)
    assert which(mlx_lora.load_adapter(folder), adapters) == "a"


def test_a_copy_of_a_checkpoint_does_not_pass_for_a_runs(folder, tmp_path):
    mlx_lora.save_adapter(mlx_lora.load_adapter(folder, checkpoint="best"), tmp_path / "copy")
    assert "checkpoint" not in json.loads((tmp_path / "copy" / "adapter_config.json").read_text())


def test_a_numbered_file_is_an_adapter(folder, adapters):
    file = folder / "0000002_adapters.safetensors"
    assert detect_format(file) == "mlx-lm" and which(mlx_lora.load_adapter(file), adapters) == "a"
    assert describe(file)["rank"] == [2]
    shutil.copy(file, folder.parent / file.name)
    with pytest.raises((AdapterError, FormatError)):  # nothing says its scale
        mlx_lora.load_adapter(folder.parent / file.name)


def test_mlx_lms_own_runs_have_numbered_checkpoints(folder, adapters):
    shutil.rmtree(folder / "best")
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("checkpoint")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert which(mlx_lora.load_adapter(folder), adapters) == "c"
    assert which(mlx_lora.load_adapter(folder, checkpoint=4), adapters) == "b"


def test_nothing_is_said_where_the_best_checkpoint_is_the_last(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["checkpoint"]["iteration"] = 4
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert said_of(folder, None, choose(folder)) == ""
