"""What people pass to the Python functions: it works where its meaning is obvious, else the error says what to pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, TrainConfig, runs
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.model.attach import adapters_on
from mlx_lora.tiny_base import PATH, skill

SMALL = {"adapter": {"rank": 2, "num_layers": 1}, "train": {"iters": 1, "batch_size": 1, "val_batches": 0}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, 4)))
    return str(folder)


@pytest.fixture(scope="module")
def loaded():
    return mlx_lora.load(PATH)


@pytest.fixture
def model():
    return mlx_lora.load(PATH)[0]


@pytest.fixture(scope="module")
def rows(loaded):
    return mlx_lora.tokenize(list(skill.rows("train", 4)), loaded[1], DataConfig())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "the model"}, "without its tokenizer"),
        ({"model": ("the model",)}, "without its tokenizer"),
        ({"model": ("the model", None)}, "without its tokenizer"),
        ({"model": ("the tokenizer", "the model")}, "pair"),
        ({"model": ("the model", "the tokenizer", 3)}, "pair"),
        ({"model": None}, "model must be"),
        ({"model": 3}, "model must be"),
        ({"data": None}, "data must be"),
        ({"data": [{"text": "raw"}]}, "not a list"),
        ({"data": ([{"text": "raw"}], None)}, "train set holds a dict, not tokenized"),
        ({"data": (["raw"], None)}, "train set holds a str, not tokenized"),
        ({"data": ("my_data", None)}, "train set holds a str, not tokenized"),
        ({"data": ()}, "data must be"),
        ({"data": {"folder": "x"}}, "DataConfig has no folder"),
        ({"adapter": {"r": 8}}, "AdapterConfig has no r"),
        ({"adapter": TrainConfig()}, "adapter must be AdapterConfig or a dict of its fields, not TrainConfig"),
        ({"train": 100}, "train must be TrainConfig"),
        ({"optimizer": "adamw"}, "optimizer must be OptimizerConfig"),
        ({"stop": True}, "stop must be a function"),
        ({"resume": "yes"}, "resume must be True or False"),
        ({"force": 1}, "force must be True or False"),
        ({"test_batches": True}, "test_batches must be"),
        ({"test_batches": "all"}, "test_batches must be"),
        ({"report_to": "fax"}, "fax is not known"),
    ],
    ids=str,
)
def test_mistakes_are_explained_at_once(options, said, data, loaded, tmp_path):
    if isinstance(options.get("model"), (tuple, str)) and options["model"]:
        named = {"the model": loaded[0], "the tokenizer": loaded[1]}
        given = options["model"]
        options = {"model": named[given] if isinstance(given, str) else tuple(named.get(x, x) for x in given)}
    folder = tmp_path / "a"
    if options.get("resume"):
        list(mlx_lora.run(folder, model=PATH, data=data, **SMALL))
    with pytest.raises(ConfigError, match=said) as caught:
        mlx_lora.run(folder, **{"model": PATH, "data": data, **options})
    assert caught.value.hint


@pytest.mark.parametrize("folder", [None, "", 3])
def test_a_folder_must_be_a_path(folder, data):
    with pytest.raises(ConfigError, match="must be a path"):
        mlx_lora.run(folder, model=PATH, data=data)


def test_dicts_paths_and_names_work(data, tmp_path):
    list(mlx_lora.run(str(tmp_path / "a"), model=str(PATH), data=data, **SMALL))
    list(mlx_lora.run(tmp_path / "b", model=PATH, data={"data": data}, **SMALL))
    configs = {
        "adapter": AdapterConfig(rank=2, num_layers=1),
        "train": TrainConfig(iters=1, batch_size=1, val_batches=0),
    }
    list(mlx_lora.run(tmp_path / "c", model=PATH, data=DataConfig(data=data), **configs))
    a, b, c = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in "abc")
    assert a == b == c


@pytest.mark.parametrize("form", ["data set", "tuple", "list of examples"])
def test_a_model_without_a_tokenizer_is_enough_for_tokenized_rows(form, model, rows, tmp_path):
    given = {"data set": rows, "tuple": (rows, None), "list of examples": (list(rows), None)}[form]
    reports = list(mlx_lora.run(tmp_path / "a", model=model, data=given, **SMALL))
    assert reports[-1].iteration == 1 and adapters_on(model)
    assert list(mlx_lora.run(tmp_path / "a", model=mlx_lora.load(PATH)[0], data=given, resume=True, train={"iters": 2}))


def test_reporters_may_be_one_name(data, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="wandb: not installed"):
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
        list(mlx_lora.run(tmp_path / "a", model=PATH, data=data, report_to="wandb"))


def test_measure_explains_the_same_mistakes(data, loaded):
    with pytest.raises(ConfigError, match="without its tokenizer"):
        runs.measure(loaded[0], data)
    with pytest.raises(ConfigError, match="data must be"):
        runs.measure(PATH, [{"text": "raw"}])


def test_attach_takes_a_dict_and_mount_a_path(model, tmp_path):
    mlx_lora.attach(model, {"rank": 2, "num_layers": 1})
    mlx_lora.save_adapter(mlx_lora.extract(model), tmp_path / "a")
    mlx_lora.unmount(model)
    for path in (tmp_path / "a", str(tmp_path / "a")):
        mlx_lora.mount(model, path)
        assert mlx_lora.extract(model).config.rank == 2
    mlx_lora.unmount(model)
    with pytest.raises(ConfigError, match="AdapterConfig has no r"):
        mlx_lora.attach(model, {"r": 2})
    with pytest.raises(ConfigError, match="config must be AdapterConfig"):
        mlx_lora.attach(model, "lora")
    with pytest.raises(AdapterError, match="mount takes an Adapter or a path, not dict"):
        mlx_lora.mount(model, {})
    assert not adapters_on(model) and Path(PATH).exists()


@pytest.mark.parametrize("call", [
    lambda: mlx_lora.mount("x", "a"), lambda: mlx_lora.unmount("x"), lambda: mlx_lora.extract(None),
    lambda: mlx_lora.attach(("model", "tokenizer"), mlx_lora.AdapterConfig()), lambda: mlx_lora.fuse("x"),
])  # fmt: skip
def test_what_is_no_model_is_refused_by_name(call):
    with pytest.raises(mlx_lora.MLXLoRAError, match="a model is needed, not"):
        call()


def test_load_takes_one_adapter(tmp_path):
    with pytest.raises(mlx_lora.MLXLoRAError, match="adapter_path must be one path, not a list"):
        mlx_lora.load(PATH, ["a", "b"])
