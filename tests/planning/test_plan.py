"""Plans: what they say without a weight, verdicts, the written configuration, and what train makes of them."""

from __future__ import annotations

import json
import subprocess

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import device
from mlx_lora.base.names import BaseModel
from mlx_lora.cli.main import main
from mlx_lora.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_lora.errors import ConfigError, TrainingError
from mlx_lora.planning import speed
from mlx_lora.planning.bare import flops_per_token, quantization_of
from mlx_lora.planning.estimate import estimate
from mlx_lora.planning.machines import MACS, Variant, variants, working_set
from mlx_lora.runs import run
from mlx_lora.tiny_base import PATH, skill

QWEN3 = dict(
    model_type="qwen3", hidden_size=1024, num_hidden_layers=28, intermediate_size=3072, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, vocab_size=151936, max_position_embeddings=40960,
    rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 40), ("valid", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return folder


@pytest.fixture
def config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


def test_a_plan_needs_no_more_than_a_config_and_takes_no_memory(config_only):
    before = mx.get_active_memory()
    found = mlx_lora.plan(config_only, adapter={"rank": 8}, train={"batch_size": 1}, max_seq_length=256, machines=False)
    assert mx.get_active_memory() - before < 1e6
    assert found.trainable == 16 * 8 * (3072 + 2 * 2048 + 3072 + 3 * 4096)  # (in + out) of seven linears
    assert found.parameters - found.trainable == pytest.approx(596e6, rel=0.01) and found.epoch is None
    assert "256 tokens" in found.notes[0] and found.memory.peak > found.memory.weights > 2.3e9


def test_random_numbers_are_as_without_a_plan(config_only):
    mx.random.seed(3)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    estimate(BaseModel(PATH), OptimizerConfig(), Variant(AdapterConfig(), TrainConfig(), length=16), gpu=False)
    assert mx.random.normal((4,)).tolist() == expected


def test_the_verdicts_hold_when_planned_with_their_flags(config_only):
    found = mlx_lora.plan(config_only, adapter={"rank": 8}, train={"batch_size": 8})
    assert [v.machine for v in found.verdicts] == list(MACS) and working_set(16) < 12e9 < working_set(24)
    helped = next(v for v in found.verdicts if v.flags)
    assert not helped.fits and "--grad-checkpoint" in helped.flags
    options = variants(Variant(AdapterConfig(rank=8), TrainConfig(batch_size=8), length=2048), False, 28)
    variant = next(v for v in options if v.flags == helped.flags)
    again = estimate(BaseModel(config_only), OptimizerConfig(), variant, gpu=True)
    assert again.parts.peak == helped.peak <= helped.working_set
    assert all(v.peak <= v.working_set for v in found.verdicts if v.flags is not None)


def test_smaller_batches_keep_the_rows_of_a_step():
    asked = Variant(AdapterConfig(), TrainConfig(batch_size=8), length=512)
    for variant in variants(asked, True, 28):
        assert variant.train.batch_size * variant.train.grad_accumulation_steps == 8


def test_several_processes_divide_the_batch(config_only):
    def peak(processes, size):
        settings = {"train": {"batch_size": size}, "max_seq_length": 128, "machines": False}
        return mlx_lora.plan(config_only, processes=processes, **settings).memory.peak

    assert peak(2, 4) == peak(1, 2) < peak(1, 4)
    with pytest.raises(ConfigError, match="divided equally among 3"):
        peak(3, 4)


def test_quantization_is_read_from_any_config():
    assert quantization_of({}) is None and quantization_of({"quantization": {"bits": 4}}) == {"bits": 4}
    assert quantization_of({"quantization_config": {"quant_method": "bitsandbytes"}}) == "nf4"
    assert quantization_of({"quantization_config": {"quant_method": "mxfp4"}})["mode"] == "mxfp4"


def test_operations_of_a_token_are_two_for_each_weight(config_only):
    base = BaseModel(config_only)
    assert flops_per_token(base.model, base.config) == pytest.approx(2 * 596e6, rel=0.01)  # the tied head counts once


def test_the_command_says_everything(data, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--iters", "20", "--batch-size", "4"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("trainable", "weights", "adapter", "optimizer", "activations", "logits", "peak", "40 rows", "padding",
                 "10 batches", "20 iterations, 2 epochs", "not been measured", "512 GB", "estimated"):  # fmt: skip
        assert word in out, word


def test_the_command_prints_json(data, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(PATH), "--data", str(data), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["event"] == "Plan" and found["memory"]["peak"] > 0 and len(found["verdicts"]) == len(MACS)


def test_the_written_configuration_trains_as_it_is(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--write", "run.yaml"])
    assert end.value.code == 0, capsys.readouterr().err
    text = (tmp_path / "run.yaml").read_text()
    for line in (
        "learning_rate: 0.0002",
        'lr_schedule: "cosine_decay"',
        "mask_prompt: true",
        "num_layers: -1",
        "rank: 8",
    ):
        assert line in text
    assert "warmup: " in text and "steps_per_eval: " in text and "# 5 epochs" in text
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text(text.replace("\nsave_every", "\nsteps_per_report: 5\nsave_every"))
    with pytest.raises(SystemExit) as end:
        main(["train", "-c", "run.yaml"])
    err = capsys.readouterr().err
    assert end.value.code == 0 and (tmp_path / "adapters" / "adapters.safetensors").exists(), err
    assert "Plan: " in err and "hardly moves" not in err and "Warning" not in err
    assert speed.measured() > 0
    assert mlx_lora.plan(PATH, data, machines=False).seconds > 0


def test_write_refuses_a_file_that_is_there(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", str(PATH), "--data", str(data), "--write", "run.yaml"])
    assert end.value.code == 2 and "exists already" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"


def reports_of(folder, data, **options):
    options.setdefault("train", {"iters": 1, "val_batches": 0})
    return {type(r).__name__: r for r in run(folder, model=PATH, data=data, **options)}


def test_train_refuses_what_does_not_fit_unless_forced(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.planning.plan.memory_limit", lambda: 20_000_000)
    train = {"iters": 1, "val_batches": 0, "batch_size": 8}
    with pytest.raises(TrainingError, match="this run needs about") as caught:
        reports_of(tmp_path / "a", data, train=train)
    assert "--batch-size" in caught.value.hint and "--force" in caught.value.hint
    assert not (tmp_path / "a" / "adapters.safetensors").exists()
    found = reports_of(tmp_path / "b", data, train=train, force=True)
    assert found["Planned"].peak > 20_000_000 and found["Done"].iteration == 1


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.runs.planned.memory_limit", lambda: 1_000)
    with pytest.raises(TrainingError, match="its weights alone are"):
        reports_of(tmp_path / "a", data)


def test_a_plan_that_cannot_be_made_prevents_no_training(tmp_path, data, monkeypatch):
    monkeypatch.setattr("mlx_lora.runs.planned.make_plan", lambda *_: 1 / 0)
    found = reports_of(tmp_path / "a", data)
    assert found["Planned"].peak is None and "division by zero" in found["Planned"].reason
    assert found["Done"].iteration == 1


@pytest.mark.parametrize(
    ("optimizer", "adapter", "warned"),
    [
        (None, None, True),
        ({}, None, True),
        ({"optimizer": "adamw"}, {"method": "dora"}, True),
        ({"learning_rate": 1e-5}, None, False),
        (OptimizerConfig(learning_rate=1e-5), None, False),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-4, 10]}}, None, False),
        (None, {"method": "full", "num_layers": 1}, False),
    ],
)
def test_only_a_learning_rate_that_nobody_gave_is_warned_of(tmp_path, data, optimizer, adapter, warned):
    reports = run(tmp_path / "a", model=PATH, data=data, optimizer=optimizer, adapter=adapter)
    first = next(iter(reports))
    reports.close()
    assert (type(first).__name__ == "Warned" and "hardly moves" in first.text) == warned


def test_the_memory_limit_is_that_of_the_machine():
    total = int(subprocess.run(["getconf", "_PHYS_PAGES"], capture_output=True, text=True).stdout) * 4096
    if device.is_cpu():
        assert device.memory_limit() == pytest.approx(total, rel=0.01)
