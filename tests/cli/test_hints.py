"""Hints and last lines fit what happened: what to write instead, what to do next, how to use what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora.cli.main import main
from mlx_lora.cli.train import _next_steps
from mlx_lora.errors import ConfigError
from mlx_lora.merge.combine import check_settings
from mlx_lora.tiny_base import PATH, skill

BASE = Path(__file__).resolve().parents[1] / "fixtures/peft/llama/base"


def run(*args, capsys, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    return out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``lora`` and ``full``: adapters of the tiny model, and ``dense``, one that trains a norm besides."""
    root = tmp_path_factory.mktemp("hints")
    for name, config in {
        "lora": dict(rank=2, keys=["q_proj"]),
        "full": dict(method="full", num_layers=1),
        "dense": dict(rank=2, keys=["q_proj"], modules_to_save=["model.norm"]),
    }.items():
        model, _ = mlx_lora.load(PATH)
        mlx_lora.attach(model, mlx_lora.AdapterConfig(**config))
        mlx_lora.save_adapter(mlx_lora.extract(model), root / name)
    return root


@pytest.mark.parametrize(
    ("args", "new"),
    [
        (["train", "--lora-layers", "4"], "Write --num-layers instead."),
        (["train", "--use-dora"], "Write --fine-tune-type dora instead."),
        (["train", "--adapter-file", "x.npz"], "Write --adapter-path FOLDER instead."),
        (["train", "--lora-rank", "4"], "Write --rank instead."),
        (["train", "--num-train-epochs", "4"], "Write --epochs instead."),
        (["fuse", "--de-quantize"], "Write --dequantize instead."),
        (["fuse", "--export-gguf"], "Write mlx-lora convert ADAPTER model.gguf --to merged"),
        (["quantize", "--q-bits", "4"], "Write --bits instead."),
    ],
)
def test_flags_of_other_versions_are_named_as_they_are_here(args, new, capsys):
    _, err = run(*args, capsys=capsys, code=2)
    assert new in err and "did you mean" not in err.lower(), err


def test_a_misspelt_flag_is_suggested_only_where_it_is_near(capsys):
    _, err = run("train", "--lerning-rate", "1", capsys=capsys, code=2)
    assert "No such option '--lerning-rate'; did you mean --learning-rate?\n" in err
    _, err = run("train", "--wibble", capsys=capsys, code=2)
    assert "No such option '--wibble'.\n" in err


def test_fuse_says_what_a_full_adapter_replaced(folder, tmp_path, capsys):
    args = ["fuse", "--model", PATH, "--adapter-path"]
    out, err = run(*args, folder / "full", "--save-path", tmp_path / "a", capsys=capsys)
    assert not out and "9 parameters trained in full replace those of the model." in err
    out, err = run(*args, folder / "dense", "--save-path", tmp_path / "b", capsys=capsys)
    assert "q_proj" in out and "1 parameters trained in full" in err
    out, err = run(*args, folder / "lora", "--save-path", tmp_path / "c", "--dequantize", capsys=capsys)
    assert "in full" not in err and "--dequantize has no effect: the base is not quantized" in err


@pytest.mark.parametrize(("method", "offered"), [("lora", True), ("vera", True), ("full", False)])
def test_converting_is_offered_where_it_works(method, offered, capsys):
    _next_steps("some/model", Path("mine"), method)
    assert ("--to peft" in capsys.readouterr().err) == offered


@pytest.mark.parametrize(
    ("to", "name", "use"),
    [
        ("peft", "p", 'PeftModel.from_pretrained(base_model, "'),
        ("mlx-lm", "m", "mlx-lora chat --model "),
        ("gguf", "a.gguf", "llama-cli -m base.gguf --lora "),
        ("merged", "merged", 'AutoModelForCausalLM.from_pretrained("'),
    ],
)
def test_the_last_line_of_convert_fits_what_was_written(to, name, use, folder, tmp_path, capsys):
    _, err = run("convert", folder / "lora", tmp_path / name, "--to", to, "--model", PATH, capsys=capsys)
    assert f"Use it: {use}" in err and str(tmp_path / name) in err


def test_convert_refuses_another_base(folder, tmp_path, capsys):
    _, err = run("convert", folder / "lora", tmp_path / "x", "--to", "peft", "--model", BASE, capsys=capsys, code=1)
    assert "do not fit this layer" in err and "trained on" in err
    assert not (tmp_path / "x").exists()
    _, err = run("convert", folder / "lora", tmp_path / "x", "--to", "peft", "--model", "some/model", capsys=capsys)
    assert "was not checked against it" in err


def test_every_fault_of_a_merge_has_its_own_hint():
    with pytest.raises(ConfigError) as error:
        check_settings(2, [1.0], "cat", density=2.0, rank=0)
    assert error.value.message.splitlines() == [
        "1 weights for 2 adapters",
        "density must be above 0 and at most 1, not 2.0",
        "rank must be at least 1, not 0",
        "density is for ties, dare and magnitude_prune, not for cat",
        "rank is for svd methods, not for cat",
    ]
    assert "Give one weight per adapter" in error.value.hint and "Leave rank out." in error.value.hint


def test_the_scale_is_questioned_on_the_command_line(tmp_path, capsys):
    rows = "".join(json.dumps(row) + "\n" for row in skill.rows("train", 8))
    (tmp_path / "train.jsonl").write_text(rows)
    args = ["train", "--model", PATH, "--data", tmp_path, "--adapter-path", tmp_path / "a", "--iters", "1"]
    _, err = run(*args, "--num-layers", "1", "--rank", "64", "--scale", "64", "--batch-size", "2", capsys=capsys)
    assert "Warning: scale 64 is a multiplier" in err and err.index("--alpha 64 (scale 1)") < err.index("Loading")
