"""A run whose folder is deleted while it trains, and folders that have lost their log."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError, MLXLoRAError
from mlx_lora.runs.log import RunLog, read_log
from mlx_lora.runs.report import GENERATOR, write_report
from mlx_lora.tiny_base import PATH, skill


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A function that trains in a folder, and calls ``seen`` with each report."""
    data = tmp_path_factory.mktemp("rows") / "data"
    data.mkdir()
    for split, count in (("train", 4), ("valid", 2)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    settings = {"model": PATH, "data": str(data), "optimizer": {"learning_rate": 1e-3}}
    settings["adapter"] = {"rank": 2, "num_layers": 1, "keys": ("self_attn.q_proj",)}
    train = {"iters": 2, "batch_size": 2, "save_every": 1, "steps_per_report": 1, "val_batches": 0, "report_prompts": 0}

    def run(folder: Path, seen=lambda report: None) -> None:
        for report in mlx_lora.run(folder, **settings, train=train):
            seen(report)

    return run


def deletes(folder: Path, after: str):
    return lambda report: shutil.rmtree(folder) if type(report).__name__ == after and folder.exists() else None


def test_a_folder_deleted_during_a_run_is_one_warning_and_the_log_goes_on(reports, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports(tmp_path / "a", deletes(tmp_path / "a", "Started"))
    texts = [str(w.message) for w in caught if "log" in str(w.message)]
    assert len(texts) == 1 and "was deleted during the run" in texts[0]
    kinds = [record["kind"] for record in read_log(tmp_path / "a").records]
    assert kinds == ["TrainReport", "Checkpoint", "TrainReport", "Checkpoint", "Done"]


def test_where_the_checkpoint_fails_too_its_error_alone_is_shown(reports, tmp_path, recwarn):
    def becomes_a_file(report) -> None:
        if type(report).__name__ == "Started":
            shutil.rmtree(tmp_path / "outer")
            (tmp_path / "outer").write_text("")

    with pytest.raises(MLXLoRAError):
        reports(tmp_path / "outer" / "a", becomes_a_file)
    assert not [w for w in recwarn if "log" in str(w.message)]


def test_a_log_that_cannot_be_written_in_a_folder_that_is_there_is_still_a_warning(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.warns(UserWarning, match="goes on without a log"):
        RunLog(tmp_path).add("Run", {})


def test_checkpoints_without_a_log_say_what_can_be_done(reports, tmp_path, capsys):
    reports(tmp_path / "a")
    (tmp_path / "a" / "log.jsonl").unlink()
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "a")])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert all(text in err for text in ("iterations 1 to 2, but no log.jsonl", "train --resume", "mlx-lora test")), err


def test_python_replaces_no_file_but_a_report(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"kind": "Run", "time": 1}\n')
    (run / "mine.html").write_text("my page")
    for name, text in (
        ("mine.html", "is not a report"),
        ("adapters.safetensors", "does not end in .html"),
        ("", "a folder"),
    ):
        with pytest.raises(ConfigError, match=text):
            write_report([run], run / name)
    assert (run / "mine.html").read_text() == "my page" and not (run / "adapters.safetensors").exists()
    for _ in range(2):
        write_report([run], run / "page.html")
    assert GENERATOR in (run / "page.html").read_text()[:1000]
