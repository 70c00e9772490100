"""YAML files with options: mlx-lm's of today, of older versions, and of its forks."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from mlx_lora.cli.main import cli, main
from mlx_lora.cli.yaml_files import _two_readings, read_yaml
from mlx_lora.errors import ConfigError
from mlx_lora.tiny_base import PATH, skill

TRAIN = {param.name for param in cli.get_command(click.Context(cli), "train").params}


def read(tmp_path: Path, text: str) -> tuple[dict, str]:
    """(options, all warnings) of a file."""
    file = tmp_path / "run.yaml"
    file.write_text(text)
    options, warnings, readings = read_yaml(file, {*TRAIN, "hf_dataset"})
    if readings:
        warnings.append(_two_readings({"scale": options["scale"], "rank": options.get("rank", 8)}, *readings))
    return options, "\n".join(warnings)


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        # mlx-lm of today ignores alpha beside scale
        (
            "{rank: 8, alpha: 16, scale: 10.0}",
            {"rank": 8, "scale": 10.0},
            "multiplied by 10. PEFT's reading, alpha / rank",
        ),
        ("{rank: 16, alpha: 32, scale: 2.0}", {"rank": 16, "scale": 2.0}, ""),  # both readings agree
        ("{rank: 16, alpha: 32}", {"rank": 16, "alpha": 32}, ""),
        ("{r: 4, lora_alpha: 8, lora_dropout: 0.1}", {"rank": 4, "alpha": 8, "dropout": 0.1}, "r is read as rank: 4"),
        (
            "{rank: 4, use_dora: true, num_layers: 3}",
            {"rank": 4, "fine_tune_type": "dora", "num_layers": 3},
            "use_dora",
        ),
        ("{rank: 4, target_modules: [q_proj]}", {"rank": 4, "keys": ["q_proj"]}, "target_modules is read as keys"),
    ],
)
def test_lora_parameters(text, expected, said, tmp_path):
    options, warnings = read(tmp_path, f"lora_parameters: {text}")
    assert options == expected
    assert said in warnings and bool(said) == bool(warnings)


def test_an_old_file_names_the_third_reading(tmp_path):
    options, said = read(tmp_path, "lora_layers: 8\nlora_parameters: {rank: 8, alpha: 16, scale: 10.0}")
    assert options == {"num_layers": 8, "rank": 8, "scale": 10.0}
    assert (
        "would be 2" in said and "scale * alpha / rank, 20" in said and "lora_layers is read as num_layers: 8" in said
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_layers: 4", {"num_layers": 4}),
        ("use_dora: true", {"fine_tune_type": "dora"}),
        ("use_dora: false", {}),
        ("adapter_file: out/adapters.npz", {"adapter_path": "out"}),
        ("adapter_file: out/mine", {"adapter_path": "out/mine"}),
        ("training_mode: normal", {}),
        ("train_mode: sft\ntrain_type: dora\nalpha: [1e-5]", {"fine_tune_type": "dora"}),
        ("lora_rank: 8\nlora_alpha: 16\nlora_dropout: 0.05", {"rank": 8, "alpha": 16, "dropout": 0.05}),
        ("steps: 50\nlr: 1e-4", {"iters": 50, "learning_rate": 1e-4}),
        ("num_epochs: 2\nsave_total_limit: 3", {"epochs": 2, "keep": 3}),
        ("training_mode: orpo\nbeta: 0.2", {"loss": "orpo", "beta": 0.2}),
        ("train_mode: dpo\nbeta: 0.1\ndpo_cpo_loss_type: sigmoid\ndelta: 50", {"loss": "dpo", "beta": 0.1}),
        ("train_mode: dpo\ndpo_cpo_loss_type: ipo\nreference_model_path: null", {"loss": "ipo"}),
        ("train_mode: sft\nbeta: 0.1\ndpo_cpo_loss_type: hinge", {}),
        ("num_train_epochs: 2\nearly_stopping_patience: 3", {"epochs": 2, "patience": 3}),
        ("gradient_accumulation_steps: 4", {"grad_accumulation_steps": 4}),
        ("wandb: mine", {"report_to": "wandb", "project_name": "mine"}),
        ("wandb: null\nepochs: null\nload_in_4bits: false\nqat_enable: false", {}),
        ("beta: 0.1\ngroup_size: 4\njudge: null", {}),
        ("fuse: true", {}),
        ("config: null\nlora_parameters: null", {}),
        ("learning_rate: 1e-5", {"learning_rate": 1e-5}),  # YAML 1.1 reads this as text
    ],
)
def test_older_names_are_taken_for_what_they_mean(text, expected, tmp_path):
    options, said = read(tmp_path, text)
    assert options == expected
    silent = {*options, "train_mode", "alpha", "dpo_cpo_loss_type", "reference_model_path"}
    if expected:
        assert all(name in said for name in {line.partition(":")[0] for line in text.splitlines()} - silent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train_mode: grpo", "on preferences (dpo, ipo, orpo, kto, simpo, cpo)"),
        ("train_mode: dpo\ndpo_cpo_loss_type: hinge", "dpo_cpo_loss_type: 'hinge' is not an option"),
        ("train_mode: dpo\nreference_model_path: other", "its adapter off"),
        ("train_mode: cpo\nis_reference_free: true", "is_reference_free: True"),
        ("train_mode: dpo\nloss: ipo", "contradicts loss 'ipo'"),
        ("num_train_epochs: 2\niters: 100", "contradict each other"),
        ("load_in_4bits: true", "mlx-lora quantize"),
        ("weight_decay: 0.1", "optimizer_config"),
        ("use_dora: true\nfine_tune_type: lora", "contradicts fine_tune_type 'lora'"),
        ("lora_layers: 4\nnum_layers: 8", "contradicts num_layers 8"),
        ("rank: 4\nlora_parameters: {rank: 8}", "rank is 4, and 8 in lora_parameters"),
        ("learning_rat: 1e-4", "did you mean learning_rate?"),
        ("wibble: 1", "wibble is not an option\n"),
        ("training: {iters: 5}", "train --resume"),
        ("iters: 10.5", "iters must be a whole number, not 10.5"),
        ("iters: .inf", "iters must be a whole number, not inf"),
        ("iters: true", "iters must be a number, not true"),
        ("use_dora: false\nfine_tune_type: dora", "use_dora false contradicts"),
    ],
)
def test_what_means_nothing_is_refused_with_what_to_write(text, said, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["train", "-c", str(file), "--model", "absent"])
    _, err = capsys.readouterr()
    assert end.value.code == 2 and said in err, err


def test_no_nonsense_is_suggested(tmp_path):
    for key in ("lora_layerz", "colour", "use_fsdp", "mlx"):
        with pytest.raises(ConfigError) as error:
            read(tmp_path, f"{key}: 1")
        assert "did you mean" not in error.value.message


@pytest.fixture
def runs(monkeypatch):
    """The arguments with which the train and test commands call ``run`` and ``measure``."""
    import mlx_lora.runs

    seen = []
    for name in ("run", "measure"):
        monkeypatch.setattr(
            mlx_lora.runs, name, lambda *args, _name=name, **kwargs: seen.append((_name, args, kwargs)) or []
        )
    monkeypatch.setattr(
        "mlx_lora.cli.train.show_reports", lambda *args, **kwargs: {"Done": type("Done", (), {"stopped": False})}
    )
    return seen


def command(args: list, code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    assert end.value.code == code


@pytest.mark.parametrize(
    ("flags", "file", "called"),
    [
        ([], "", "run"),
        (["--test"], "", "measure"),
        (["--train", "--test"], "", "run"),
        (["--test"], "train: true", "run"),
        ([], "train: true\ntest: true", "run"),
        ([], "train: false\ntest: true", "measure"),
        ([], "test: true", "measure"),
        (["--no-train", "--test"], "train: true", "measure"),
    ],
)
def test_test_without_train_only_measures(flags, file, called, runs, tmp_path):
    (tmp_path / "run.yaml").write_text(file)
    command(["train", "-c", tmp_path / "run.yaml", "--adapter-path", "mine", *flags])
    name, args, kwargs = runs[0]
    assert name == called and str(args[0 if called == "run" else 2]) == "mine"
    assert kwargs["test_batches"] == (500 if called == "measure" or "--test" in flags or "test: true" in file else None)


def test_training_options_beside_test_alone_are_refused(runs, capsys):
    command(["train", "--test", "--iters", "5", "--rank", "4"], 2)
    assert "--rank, --iters: no effect" in capsys.readouterr().err and not runs
    command(["train", "--test", "--adapter-path", ""])
    assert runs[0][1][2] is None, "an empty path measures the base, as in mlx-lm"
    command(["train", "--test-batches", "5"], 2)
    command(["train", "--no-train"], 2)


def test_flags_replace_what_contradicts_them_in_the_file(runs, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "optimizer: adamw\noptimizer_config: {adam: {eps: 1e-6}, adamw: {weight_decay: 0.1}}\nlearning_rate: 1e-5\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-4, 100]}\nnum_layers: 4\n"
        "lora_parameters: {rank: 4, scale: 10.0}"
    )
    command(["train", "-c", tmp_path / "run.yaml", "--alpha", "8", "--layers-to-transform", "1"])
    kwargs, said = runs[0][2], capsys.readouterr().err
    assert kwargs["adapter"].alpha == 8 and kwargs["adapter"].scale is None and kwargs["adapter"].num_layers is None
    assert kwargs["optimizer"]["optimizer_config"] == {"adamw": {"weight_decay": 0.1}}
    assert "optimizer_config of adam" in said
    command(["train", "-c", tmp_path / "run.yaml", "--fine-tune-type", "full", "--num-layers", "2"])
    assert "not used from the file: rank, scale (full fine-tuning" in capsys.readouterr().err
    command(["train", "-c", tmp_path / "run.yaml", "--learning-rate", "1e-3"], 2)
    assert "learning_rate 0.001 has no effect" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("hf_dataset: {path: a/b}\ndata: mine")
    command(["train", "-c", tmp_path / "run.yaml"])
    assert runs[-1][2]["data"].hf_dataset and "not used from the file: data" in capsys.readouterr().err
    command(["train", "-c", tmp_path / "run.yaml", "--data", "other"])
    assert runs[-1][2]["data"].hf_dataset is None and runs[-1][2]["data"].data == "other"


def test_the_test_command_reads_a_training_file(tmp_path, capsys):
    """A whole file of mlx-lm's: what is for training is passed over, a misspelt key is not."""
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in skill.rows(split, 8))
        (tmp_path / f"{split}.jsonl").write_text(text)
    whole = (
        f"model: {PATH}\ndata: {tmp_path}\ntrain: true\nfine_tune_type: lora\noptimizer: adamw\nseed: 0\n"
        "num_layers: 16\nbatch_size: 2\niters: 10\nval_batches: 2\nlearning_rate: 1e-5\n"
        "test_batches: 1\nmax_seq_length: 512\n"
        "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 10]}\n"
    )
    (tmp_path / "run.yaml").write_text(whole)
    command(["test", "-c", tmp_path / "run.yaml", "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] > 0 and "Warning" not in err
    (tmp_path / "run.yaml").write_text(whole + "wibble: 1\n")
    command(["test", "-c", tmp_path / "run.yaml"], 2)
    assert "wibble is not an option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said", "silent"),
    [
        ([], "multiplied by 10. PEFT's reading, alpha / rank, would be 2", "rank 4"),
        (["--rank", "4"], "multiplied by 10. PEFT's reading, alpha / rank, would be 4", "would be 2"),
        (["--alpha", "8"], "", "alpha is not used"),
        (["--scale", "5"], "", "alpha is not used"),
    ],
)
def test_what_is_said_of_alpha_beside_scale_follows_the_flags(flags, said, silent, runs, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lora_parameters: {rank: 8, alpha: 16, scale: 10.0}")
    command(["train", "-c", tmp_path / "run.yaml", *flags])
    err = capsys.readouterr().err
    assert said in err and silent not in err


@pytest.mark.parametrize("name", ["rslora", "use_rslora"])
@pytest.mark.parametrize("alpha", ["alpha: 16, ", ""])
def test_rslora_beside_scale_means_what_it_means_to_mlx_lm(name, alpha, tmp_path):
    options, said = read(tmp_path, f"lora_parameters: {{rank: 8, {alpha}scale: 10.0, {name}: true}}")
    assert options["scale"] == 10.0 and "rslora" not in options and "alpha" not in options
    assert "rslora is not used" in said


def test_the_key_yes_is_the_option_yes(tmp_path):
    from mlx_lora.cli.yaml_files import read_yaml

    file = tmp_path / "run.yaml"
    file.write_text("yes: true\niters: 3\n")
    assert read_yaml(file, {"yes", "iters"})[0] == {"yes": True, "iters": 3}
