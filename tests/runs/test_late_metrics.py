"""A metric that fails late: the run ends with the error and is saved, and the resumed run measures what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig
from mlx_lora.cli.main import main
from mlx_lora.errors import ConfigError
from mlx_lora.runs.log import read_log
from mlx_lora.tiny_base import PATH, skill

METRIC = """
from pathlib import Path

def score(given, expected):
    if Path(__file__).with_name("fails").exists():
        raise ValueError("no connection")
    return Path(__file__).with_name("values").stat().st_size / 10
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows") / "data"
    folder.mkdir()
    for split, count in (("train", 8), ("valid", 2)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return DataConfig(data=str(folder), mask_prompt=True, max_seq_length=96)


def run(folder: Path, metric: Path, data: DataConfig, fails_at: int, **train) -> list:
    """Train; the metric is 0.0, 0.1, ... in the order of the validations, and fails in that of an iteration."""
    found, fails, values = [], metric.with_name("fails"), metric.with_name("values")
    config = {"iters": 4, "batch_size": 2, "steps_per_eval": 2, "val_batches": 1, "report_prompts": 0, **train}
    config |= {"metric": (f"{metric}:score",), "metric_rows": 1, "metric_max_tokens": 1, "best_by": "score"}
    config |= {"steps_per_report": 3, "grad_accumulation_steps": 3}
    options = {"model": PATH, "adapter": AdapterConfig(rank=2, num_layers=1, keys=("self_attn.q_proj",))}
    options |= {"data": data, "optimizer": OptimizerConfig(learning_rate=1e-3), "train": config}
    resume = (folder / "training_state.safetensors").exists()
    for report in mlx_lora.run(folder, **options, resume=resume):
        found.append(report)
        if type(report).__name__ == "ValReport":
            with values.open("a") as file:
                file.write("x")
        if getattr(report, "iteration", None) == fails_at - 1:
            fails.touch()
    return found


def write_metric(folder: Path) -> Path:
    file = folder / "metric.py"
    file.write_text(METRIC)
    file.with_name("values").touch()
    return file


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, list]:
    """The folder and the reports of a run whose metric never fails."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "a", run(folder / "a", write_metric(folder), data, fails_at=-1)


def adapters(folder: Path) -> dict[str, bytes]:
    names = ("adapters.safetensors", "best/adapters.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("fails_at", [2, 4])
def test_the_resumed_run_validates_where_the_metric_failed(fails_at, data, whole, tmp_path, capsys):
    metric = write_metric(tmp_path)
    with pytest.raises(ConfigError, match="metric score fails: ValueError: no connection"):
        run(tmp_path / "a", metric, data, fails_at)
    assert (tmp_path / "a" / f"{fails_at:07d}_adapters.safetensors").exists()
    with pytest.raises(SystemExit) as end:  # the metric still fails: not "the run is complete"
        main(["train", "--adapter-path", str(tmp_path / "a"), "--resume"])
    assert end.value.code == 2 and "no connection" in capsys.readouterr().err
    metric.with_name("fails").unlink()
    resumed = run(tmp_path / "a", metric, data, fails_at=-1)
    validated = {r.iteration: (r.val_loss, r.metrics) for r in whole[1] if type(r).__name__ == "ValReport"}
    again = {r.iteration: (r.val_loss, r.metrics) for r in resumed if type(r).__name__ == "ValReport"}
    assert again == {at: found for at, found in validated.items() if at >= fails_at}
    assert adapters(tmp_path / "a") == adapters(whole[0])
    logged = [(r["kind"], r.get("iteration")) for r in read_log(tmp_path / "a").records]
    for kind in ("TrainReport", "Checkpoint", "ValReport", "NewBest"):
        once = [at for found, at in logged if found == kind]
        assert len(once) == len(set(once)), (kind, once)
    with pytest.raises(ConfigError, match="has done 4 iterations"):
        run(tmp_path / "a", metric, data, fails_at=-1)
