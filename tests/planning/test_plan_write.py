"""``plan --write``: the configuration it chooses for each loss, and what it keeps of the options that are given."""

from __future__ import annotations

import json

import pytest
import yaml

from mlx_lora.base.writing import write_new_text
from mlx_lora.cli.main import main
from mlx_lora.config import PREFERENCES
from mlx_lora.errors import FormatError
from mlx_lora.tiny_base import PATH

LOSSES = ("cross_entropy", *PREFERENCES)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, answers in (("pairs", ("chosen", "rejected")), ("answers", ("completion",))):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{k}+2=", **dict.fromkeys(answers, f" {k + 2}")} for k in range(8)]
        rows = [{**row, **({"rejected": " no idea"} if "rejected" in row else {})} for row in rows]
        for split in ("train", "valid"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


def written(file: str) -> dict:
    return yaml.safe_load(open(file, encoding="utf-8"))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_configuration_for_each_loss_trains_as_it_is(loss, folder, capsys):
    data = "answers" if loss == "cross_entropy" else "pairs"
    asked = () if loss == "cross_entropy" else ("--loss", loss)
    assert not command("plan", "--model", str(PATH), "--data", data, *asked, "--write", "run.yaml"), capsys.readouterr()
    found = written("run.yaml")
    assert found.get("loss", "cross_entropy") == loss
    if loss != "cross_entropy":
        assert 1e-6 < found["learning_rate"] < 1e-4 and found["beta"] == 0.1 and "mask_prompt" not in found
        assert set(PREFERENCES[loss].options) <= found.keys()
    capsys.readouterr()
    text = (folder / "run.yaml").read_text().replace("epochs:", "report_prompts: 0\nepochs:")
    (folder / "run.yaml").write_text(text)
    assert not command("train", "-c", "run.yaml"), capsys.readouterr().err
    assert (folder / "adapters" / "adapters.safetensors").exists()


def test_a_written_file_is_planned_and_written_again(capsys):
    assert not command("plan", "--model", str(PATH), "--data", "pairs", "--loss", "dpo", "--write", "run.yaml")
    assert not command("plan", "-c", "run.yaml"), capsys.readouterr().err
    assert not command("plan", "-c", "run.yaml", "--write", "again.yaml"), capsys.readouterr().err
    assert written("again.yaml") == written("run.yaml")


def test_options_that_are_given_stay_and_replace_what_they_exclude(folder, capsys):
    given = {
        "model": str(PATH), "data": "answers", "train": True, "fine_tune_type": "dora", "num_layers": 1, "iters": 7,
        "batch_size": 3, "learning_rate": 3e-4, "adapter_path": "mine", "report_to": "tensorboard",
        "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
        "rank_pattern": {"q_proj": 2}, "mask_prompt": False,
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(given))
    assert not command("plan", "-c", "mine.yaml", "--seed", "5", "--write", "run.yaml"), capsys.readouterr().err
    found = written("run.yaml")
    for name, value in {**given, **given["lora_parameters"], "seed": 5}.items():
        assert name == "lora_parameters" or found[name] == value, name
    assert not {"epochs", "alpha"} & found.keys() and found["lr_schedule"] == "cosine_decay"


def test_a_flag_replaces_what_the_file_says_in_its_place(folder, capsys):
    (folder / "mine.yaml").write_text(f"model: {PATH}\ndata: answers\niters: 7\n")
    assert not command("plan", "-c", "mine.yaml", "--epochs", "2", "--write", "run.yaml"), capsys.readouterr().err
    found = written("run.yaml")
    assert found["epochs"] == 2 and "iters" not in found


@pytest.mark.parametrize("method", ["full", "vera", "ia3"])
def test_other_methods_are_given_no_setting_that_they_refuse(method, capsys):
    options = ("--model", str(PATH), "--data", "answers", "--fine-tune-type", method, "--write", "run.yaml")
    assert not command("plan", *options), capsys.readouterr().err
    found = written("run.yaml")
    assert found["fine_tune_type"] == method and not {"rank", "alpha"} & found.keys()
    assert not command("plan", "-c", "run.yaml"), capsys.readouterr().err


def test_a_file_that_appears_while_the_plan_is_made_is_not_replaced(folder, monkeypatch, capsys):
    from mlx_lora.planning import recommend

    own = recommend.recommend

    def meanwhile(*arguments, **named):
        (folder / "run.yaml").write_text("mine")
        return own(*arguments, **named)

    monkeypatch.setattr(recommend, "recommend", meanwhile)
    assert command("plan", "--model", str(PATH), "--data", "answers", "--write", "run.yaml") == 1
    assert "there is a file of this name" in capsys.readouterr().err
    assert (folder / "run.yaml").read_text() == "mine"


def test_a_new_text_is_never_written_over_another(folder):
    write_new_text(folder / "a" / "new.txt", "one")
    with pytest.raises(FormatError, match="there is a file of this name"):
        write_new_text(folder / "a" / "new.txt", "two")
    assert (folder / "a" / "new.txt").read_text() == "one"
