"""Keys of YAML files: those that YAML 1.1 reads as booleans, and those that are options of other commands."""

from __future__ import annotations

import pytest

from mlx_lora.cli.main import main
from mlx_lora.cli.yaml_files import read_yaml
from mlx_lora.errors import ConfigError


def refused(tmp_path, capsys, text: str, command: str = "train") -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        main([command, "-c", str(file), "--model", "absent"])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("key", ["no", "on", "off", "No", "ON", "y", "null", "1"])
def test_a_key_is_named_as_it_is_written(key, tmp_path, capsys):
    assert f"run.yaml: {key} is not an option" in refused(tmp_path, capsys, f"{key}: 3\niters: 5")
    nested = f"lora_parameters: {{rank: 4, {key}: 3}}"
    assert f"run.yaml: lora_parameters.{key} is not an option" in refused(tmp_path, capsys, nested)


def test_only_the_key_yes_is_the_option_yes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("yes: on\niters: 3\n")
    assert read_yaml(file, {"yes", "iters"})[0] == {"yes": True, "iters": 3}
    file.write_text("on: true\n")
    with pytest.raises(ConfigError, match="on is not an option"):
        read_yaml(file, {"yes", "iters"})


def test_merge_keys_work(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_parameters: &base {rank: 4}\nrank_pattern:\n  <<: {a: 2}\n  'no': 3\n")
    options, _, _ = read_yaml(file, {"rank", "rank_pattern"})
    assert options == {"rank": 4, "rank_pattern": [("a", 2), ("no", 3)]}


def test_an_option_of_other_commands_says_whose_it_is(tmp_path, capsys):
    err = refused(tmp_path, capsys, "checkpoint: best")
    named = err.partition("checkpoint is not an option here, but of mlx-lora ")[2].partition(";")[0].split(", ")
    assert {"test", "generate", "fuse", "convert"} <= set(named) and "train" not in named
    assert "save_path is not an option here, but of mlx-lora fuse" in refused(tmp_path, capsys, "save_path: x")
    assert "wibble is not an option\n" in refused(tmp_path, capsys, "wibble: 1")
