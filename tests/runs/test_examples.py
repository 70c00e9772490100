"""The files in ``examples/`` work as they are."""

from __future__ import annotations

import runpy
from pathlib import Path

from click.testing import CliRunner

import mlx_lora
from mlx_lora.cli.train import train
from mlx_lora.tiny_base import PATH

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_fine_tune_runs_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "fine_tune.py"), run_name="__main__")
    losses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ValReport")]
    first, last = (float(line.split("val_loss=")[1].split(",")[0]) for line in (losses[0], losses[-1]))
    assert last < first / 2
    for name in ("adapters", "adapters-peft"):
        model, _ = mlx_lora.load(PATH, tmp_path / name)
        assert mlx_lora.extract(model).config.method == "dora"


def test_the_yaml_file_has_valid_options(tmp_path, monkeypatch):
    """``train`` accepts the file and then misses the data folder that it names."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(train, ["-c", str(EXAMPLES / "lora_config.yaml"), "--model", str(PATH)])
    assert "my_data" in str(done.exception)
