"""``--checkpoint`` means the same in every command that takes an adapter, and the default is said on stderr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig
from mlx_lora.cli.main import main
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import loop


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with ``data`` and the run ``a``: iteration 1 is the best one, 2 the last."""
    root = tmp_path_factory.mktemp("checkpoint")
    (root / "data").mkdir()
    for split in ("train", "valid", "test"):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in skill.rows(split, 4)))
    with pytest.MonkeyPatch.context() as patch:
        losses = iter((9.0, 1.0, 2.0))
        patch.setattr(loop, "evaluate", lambda *_, **__: mlx_lora.training.Evaluation(next(losses), 1, 1.0, 0.0))
        train = {"iters": 2, "batch_size": 2, "steps_per_eval": 1}
        optimizer = OptimizerConfig(learning_rate=1e-2)
        adapter = AdapterConfig(rank=4, num_layers=2)
        data = DataConfig(data=str(root / "data"))
        list(mlx_lora.run(root / "a", model=PATH, data=data, adapter=adapter, optimizer=optimizer, train=train))
    return root


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "w"))
    return Path("a")


def run(line: str, capsys, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(PATH) if word == "BASE" else word for word in line.split()])
    out, err = capsys.readouterr()
    assert end.value.code == code, err
    return out, err


def arrays(file: str) -> dict[str, mx.array]:
    return mx.load(file)


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


BEST, LAST = "a/best/adapters.safetensors", "a/0000002_adapters.safetensors"
COMMANDS = {
    "fuse --model BASE --adapter-path a --save-path out": "out/model.safetensors",
    "convert a out --to mlx-lm": "out/adapters.safetensors",
    "merge a --weights 0.5 --save-path out": "out/adapters.safetensors",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_files_are_made_of_the_checkpoint_that_is_chosen(line, folder, capsys):
    made = {}
    for option in ("", " --checkpoint best", " --checkpoint last", " --checkpoint 1", " --checkpoint 2"):
        _, err = run(f"{line} --force{option}", capsys)
        made[option] = arrays(COMMANDS[line])
        mx.eval(made[option])
        assert ("Using the best checkpoint in a: iteration 1, val_loss 1. --checkpoint last" in err) == (not option)
        shutil.rmtree("out")
    assert same(made[""], made[" --checkpoint best"]) and same(made[""], made[" --checkpoint 1"])
    assert same(made[" --checkpoint last"], made[" --checkpoint 2"])
    assert not same(made[""], made[" --checkpoint last"])


@pytest.mark.parametrize(
    "line",
    [
        "test --model BASE --data data --adapter-path a --json",
        "generate --model BASE --adapter-path a --prompt x --max-tokens 4 --json",
        "inspect a --json",
        "doctor --model BASE --adapter-path a --json",
    ],
)
def test_other_commands_say_which_one_they_use(line, folder, capsys, monkeypatch):
    read = []
    own = mlx_lora.formats.mlx_lm.read
    monkeypatch.setattr(mlx_lora.formats.mlx_lm, "read", lambda path, options: read.append(path) or own(path, options))
    _, err = run(line, capsys)
    assert "Using the best checkpoint in a" in err and read == [folder / "best"]
    _, err = run(f"{line} --checkpoint last", capsys)
    assert "checkpoint in" not in err and read[1:] == [folder / "adapters.safetensors"]
    _, err = run(f"{line} --checkpoint 7", capsys, code=2)
    assert "a: has no checkpoint '7'" in err and "It has: last, best, 1, 2." in err


def test_train_that_only_tests_measures_the_best(folder, capsys):
    out, err = run("train --model BASE --data data --adapter-path a --no-train --test", capsys)
    assert "Using the best checkpoint" in err
    best, _ = run("test --model BASE --data data --adapter-path a/best", capsys)
    assert best == out


def test_chat_names_a_run_by_its_folder(folder, capsys, monkeypatch):
    lines = iter(("/adapters", "/adapter a", "/quit"))
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    _, err = run("chat --model BASE --adapter-path a", capsys)
    assert err.count("Using the best checkpoint in a") == 1 and "Adapter: a (" in err
    lines = iter(("/adapter a", "/quit"))
    _, err = run("chat --model BASE", capsys)
    assert "Using the best checkpoint in a" in err and "Adapter: a (" in err


@pytest.mark.parametrize(("checkpoint", "file"), [(None, BEST), ("last", LAST), (1, BEST)])
def test_push_uploads_the_chosen_one_under_its_usual_name(checkpoint, file, folder, monkeypatch):
    import huggingface_hub

    from mlx_lora.hub import push

    uploaded = {}

    class Api:
        def create_repo(self, *_, **__): ...

        def create_commit(self, _repo, operations, **_):
            for one in operations:
                content = one.path_or_fileobj
                uploaded[one.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
            return type("Done", (), {"commit_url": "there"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (folder / "README.md").write_text("mine")
    notes: list[str] = []
    push(folder, "me/x", base="me/base", notes=notes, checkpoint=checkpoint)
    assert uploaded.keys() == {"adapters.safetensors", "adapter_config.json", "README.md"}
    assert uploaded["adapters.safetensors"] == Path(file).read_bytes() and uploaded["README.md"] == b"mine"
    assert json.loads(uploaded["adapter_config.json"])["model"] == "me/base"


def test_resuming_goes_on_from_the_last_one(folder, capsys):
    before = (folder / "best" / "adapters.safetensors").read_bytes()
    _, err = run("train --adapter-path a --resume --iters 3 --val-batches 0 --steps-per-eval 200", capsys)
    assert "Iteration     3: saved" in err
    assert (folder / "best" / "adapters.safetensors").read_bytes() == before
