"""Full disks, folders that become read-only and drives that vanish: one message, and what was there stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, TrainConfig
from mlx_lora.base import writing
from mlx_lora.errors import FormatError, MLXLoRAError, ModelError
from mlx_lora.formats.files import write_file
from mlx_lora.hub import pull
from mlx_lora.merge.export import export_merged
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import TrainingState

ADAPTER = AdapterConfig(rank=4, num_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, 4)))
    return DataConfig(data=str(folder))


def steps(iters: int, **options) -> TrainConfig:
    return TrainConfig(iters=iters, batch_size=1, val_batches=0, **options)


def run(folder: Path, data, train: TrainConfig, **options) -> list:
    return list(mlx_lora.run(folder, model=PATH, data=data, adapter=ADAPTER, train=train, **options))


@pytest.fixture(scope="module")
def adapter(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    run(folder, data, steps(1))
    return mlx_lora.load_adapter(folder)


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root on Linux")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)])


def test_a_disk_that_fills_up_while_training_keeps_the_last_checkpoint(data, small_disk, tmp_path):
    folder = small_disk(2_000_000) / "a"
    with pytest.raises(FormatError) as caught:
        run(folder, data, steps(9, save_every=1))
    text = str(caught.value)
    assert "the disk is full" in text and "needed" in text and "free" in text
    kept = max(int(p.name[:7]) for p in folder.glob("0*_adapters.safetensors"))
    assert kept >= 1 and f"The checkpoint of iteration {kept} is kept: resume continues from it." in text
    assert not any(p.name.startswith(".") for p in folder.iterdir())
    target = Path(shutil.copytree(folder, tmp_path / "copy"))
    run(target, data, steps(9), resume=True)
    run(tmp_path / "whole", data, steps(9))
    assert (
        files(target)[target / "adapters.safetensors"]
        == files(tmp_path / "whole")[tmp_path / "whole" / "adapters.safetensors"]
    )


def test_an_earlier_run_stays_in_its_place_if_the_new_one_cannot_be_saved(data, small_disk):
    folder = small_disk(1_000_000) / "a"
    run(folder, data, steps(1))
    before = files(folder)
    (folder.parent / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 300_000))
    with pytest.raises(FormatError, match="No checkpoint of this run was written before"):
        run(folder, data, steps(2))
    assert files(folder) == before


def test_a_folder_that_becomes_read_only(data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    reports = mlx_lora.run(tmp_path / "a", model=PATH, data=data, adapter=ADAPTER, train=steps(4, save_every=2))
    with pytest.raises(FormatError, match="the file system is read-only") as caught:
        for report in reports:
            if type(report).__name__ == "Checkpoint":
                monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert "The checkpoint of iteration 2 is kept" in str(caught.value)
    monkeypatch.undo()
    run(tmp_path / "a", data, steps(4), resume=True)


def test_a_drive_that_vanishes(data, small_disk):
    """An empty mount point is left, on the disk that holds it. Nothing is written there."""
    mount = small_disk(20_000_000)
    reports = mlx_lora.run(mount / "a", model=PATH, data=data, adapter=ADAPTER, train=steps(4, save_every=2))
    with pytest.raises(FormatError, match="the drive does not answer"):
        for report in reports:
            if type(report).__name__ == "Checkpoint":
                subprocess.run(["umount", "-l", str(mount)], check=True)
    assert list(mount.iterdir()) == []


def test_a_full_disk_in_every_command_that_writes(adapter, small_disk, tmp_path):
    """fuse and quantize (save_model), convert --to merged, convert and merge (save_adapter), in a file and a folder."""
    disk = small_disk(100_000)
    model, _ = mlx_lora.load(PATH)
    writes = {
        "save_model": lambda: mlx_lora.save_model(model, disk / "model"),
        "export": lambda: export_merged(PATH, adapter, disk / "merged"),
        "mlx-lm": lambda: mlx_lora.save_adapter(adapter, disk / "a", base=PATH),
        "peft": lambda: mlx_lora.save_adapter(adapter, disk / "a", "peft", base=PATH),
        "gguf": lambda: mlx_lora.save_adapter(adapter, disk / "a.gguf", "gguf", base=PATH),
        "loralib": lambda: mlx_lora.save_adapter(adapter, disk / "a.pt", "loralib", base=PATH),
    }
    for name, write in writes.items():
        with pytest.raises(MLXLoRAError) as caught:
            write()
        assert "the disk is full" in str(caught.value) and "needed" in str(caught.value), f"{name}: {caught.value}"
        assert list(disk.iterdir()) == [], name


def test_the_command_line_says_it_and_exits_with_1(adapter, small_disk, tmp_path, capsys):
    from mlx_lora.cli.main import main

    disk = small_disk(100_000)
    mlx_lora.save_adapter(adapter, tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        main(["fuse", "--model", str(PATH), "--adapter-path", str(tmp_path / "a"), "--save-path", str(disk / "m")])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and "the disk is full" in err and "Hint: Free some space" in err and "bug" not in err


def test_a_full_disk_that_no_code_expects_is_no_bug(monkeypatch, capsys):
    from mlx_lora.cli import main

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    monkeypatch.setattr(main.cli, "main", full)
    with pytest.raises(SystemExit):
        main.main(["doctor"])
    err = capsys.readouterr().err
    assert "some/file: cannot be written (the disk is full)" in err and "bug" not in err


LIMITED = """
import resource, sys
import mlx_lora
from mlx_lora.tiny_base import PATH
model, _ = mlx_lora.load(PATH)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    mlx_lora.save_model(model, sys.argv[1])
except mlx_lora.MLXLoRAError as error:
    print(error)
"""


def test_a_limit_of_file_sizes(tmp_path):
    path = os.pathsep.join([str(Path(mlx_lora.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "larger than allowed" in done.stdout and "ulimit -f" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_mlx_names_no_reason_and_one_is_found(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[write] Unable to write 3900096 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    state = TrainingState({"a": mx.ones(1000)}, {})
    with pytest.raises(FormatError, match="the disk is full"):
        state.save(tmp_path / "state.safetensors")
    monkeypatch.setattr(writing, "_free", lambda path: 1000)
    with pytest.raises(FormatError, match=r"the disk is full\); 4 kB needed, 1 kB free"):
        state.save(tmp_path / "state.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "drive does not answer"),
        (errno.ESTALE, "drive does not answer"),
        (errno.ENOTCONN, "drive does not answer"),
    ],
)
def test_every_reason_has_words_and_a_fix(number, said, tmp_path):
    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("before")
    with pytest.raises(FormatError, match=said) as caught:
        write_file(tmp_path / "file", write)
    assert caught.value.hint
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_weights_that_cannot_be_read_while_writing_are_no_full_disk(tmp_path):
    def write(path: Path) -> None:
        raise RuntimeError("[read] Unable to read 4096 bytes from file.")

    with pytest.raises(FormatError, match="what it is made from cannot be read") as caught:
        write_file(tmp_path / "file", write)
    assert "space" not in caught.value.hint


def test_a_full_disk_while_downloading_is_no_network_problem(monkeypatch, tmp_path):
    import huggingface_hub

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "blob"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match="the disk is full"):
        mlx_lora.load("someone/model")
    with pytest.raises(MLXLoRAError, match="the disk is full"):
        pull("someone/adapter", tmp_path / "a")
