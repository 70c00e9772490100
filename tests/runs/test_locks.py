"""One writer in a folder at a time. The runs are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, TrainConfig
from mlx_lora.base.locking import LOCK, locked
from mlx_lora.base.saving import check_target
from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError, MLXLoRAWarning, ModelError
from mlx_lora.tiny_base import PATH, skill

TINY = ["--rank", "2", "--num-layers", "1", "--keys", "self_attn.q_proj", "--batch-size", "1", "--val-batches", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, 4)))
    return str(folder)


def train(folder: Path, data: str, *options: str) -> list[str]:
    return ["train", "--model", str(PATH), "--data", data, "--adapter-path", str(folder), *TINY, *options]


def start(folder: Path, data: str, *options: str) -> subprocess.Popen:
    """``mlx-lora train`` in a process of its own."""
    path = os.pathsep.join([str(Path(mlx_lora.__file__).parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_lora", *train(folder, data, *options)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("it did not happen within two minutes")


def test_a_second_run_is_refused_until_the_first_is_killed(data, tmp_path, capsys):
    folder = tmp_path / "a"
    first = start(folder, data, "--iters", "1000000", "--save-every", "5")
    try:
        wait_for(lambda: (folder / "training_state.safetensors").exists(), first)
        before = {p.name for p in folder.iterdir()}
        with pytest.raises(SystemExit) as ended:
            main(train(folder, data, "--iters", "2"))
        err = capsys.readouterr().err
        assert ended.value.code == 2 and "another run or command is writing there" in err and "Hint:" in err
        assert before <= {p.name for p in folder.iterdir()} and not (folder / "earlier-1").exists()
        # Other commands that write there are refused too.
        adapter = mlx_lora.load_adapter(folder)
        with pytest.raises(ConfigError, match="another run or command"):
            mlx_lora.save_adapter(adapter, folder, overwrite=True)
        with pytest.raises(ModelError, match="another run or command"):
            check_target(folder, overwrite=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (folder / LOCK).exists()  # the file stays, the lock does not
    third = start(folder, data, "--resume", "--iters", "1000000", "--save-every", "1000000")
    try:
        wait_for(lambda: not list(folder.glob(".writing-*")), third)
        third.stderr.readline()
    finally:
        assert third.poll() is None
        third.kill()
        third.communicate()
    mlx_lora.save_adapter(adapter, folder, overwrite=True)
    assert not (folder / LOCK).exists()


def test_a_run_in_this_process_is_refused_too_and_leaves_no_lock(data, tmp_path):
    folder = tmp_path / "a"
    options = {
        "model": PATH,
        "data": DataConfig(data=data),
        "adapter": AdapterConfig(rank=2, num_layers=1),
        "train": TrainConfig(iters=2, batch_size=1, val_batches=0),
    }
    waiting = mlx_lora.run(folder, **options)  # accepted, but it does not run yet
    first = mlx_lora.run(folder, **options)
    next(first)
    with pytest.raises(ConfigError, match="another run"):
        mlx_lora.run(folder, **options)
    with pytest.raises(ConfigError, match="another run"):
        next(waiting)
    first.close()
    assert not folder.exists()  # nothing was saved
    list(mlx_lora.run(folder, **options))
    assert not (folder / LOCK).exists()


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path, monkeypatch):
    """The last holder removes the file between our opening and locking it."""
    acquire, tries = filelock.FileLock.acquire, []

    def late(self, *args, **options):
        acquire(self, *args, **options)
        tries.append(1)
        if len(tries) == 1:
            os.unlink(self.lock_file)

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with locked(tmp_path):
        assert len(tries) == 2 and (tmp_path / LOCK).exists()


@pytest.mark.parametrize("problem", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_said_and_used(problem, tmp_path, monkeypatch):
    def refuse(self, *args, **options):
        raise problem

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.warns(MLXLoRAWarning, match="has no locks"), locked(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert (tmp_path / "a" / "file").exists()


def test_a_folder_made_for_the_lock_is_removed_if_nothing_is_written(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked(tmp_path / "a"):
            pass
    assert not (tmp_path / "a").exists()
