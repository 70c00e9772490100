"""``cache_prefix`` of a run: the size first, the file kept and dropped, killed and resumed, asking on a terminal."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

import mlx_lora
from conftest import killed_at
from mlx_lora.cli.main import cli
from mlx_lora.errors import ConfigError
from mlx_lora.hub import _files
from mlx_lora.runs import prefix as prefix_room
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training.prefix import FrozenPrefix

LAST = dict(num_layers=1, rank=2, scale=2.0)
TRAIN = dict(iters=9, batch_size=2, steps_per_report=1, steps_per_eval=4, save_every=3)


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data")


def write(folder, count: int = 6):
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return folder


def losses(folder, data, adapter=None, resume=False, stop_after=99, **train):
    """Of every iteration and validation; the run is stopped after ``stop_after`` iterations."""
    done = iter(range(1, 99))
    arguments = {} if resume else dict(model=PATH, data=str(data), adapter=adapter or LAST)
    found = []
    for report in mlx_lora.run(
        folder, train={**TRAIN, **train}, resume=resume, stop=lambda: next(done) >= stop_after, **arguments
    ):
        found += [getattr(report, name) for name in ("train_loss", "val_loss") if hasattr(report, name)]
    return found


@pytest.fixture
def computed(monkeypatch):
    rows: list = []
    own = FrozenPrefix._compute
    monkeypatch.setattr(FrozenPrefix, "_compute", lambda s, d, missing, *r: (rows.append(1), own(s, d, missing, *r))[1])
    return rows


def test_a_file_is_used_again_and_dropped_for_other_data_batches_and_layers(data, tmp_path, computed):
    folder = tmp_path / "run"

    def again(data=data, **changed) -> bool:
        """Whether a run computes states; it is stopped after the second epoch, so that its file stays."""
        computed.clear()
        losses(folder, data, **{"cache_prefix": "disk", "stop_after": 6, **changed})
        return bool(computed)

    assert again() and not again()
    assert again(adapter={**LAST, "num_layers": 2})
    assert again(batch_size=3)
    assert again(data=write(tmp_path / "other", 5))


def test_a_complete_run_deletes_its_file_and_a_stopped_one_leaves_it(data, tmp_path, computed):
    folder, plain = tmp_path / "run", losses(tmp_path / "plain", data)
    assert not computed
    first = losses(folder, data, cache_prefix="disk", stop_after=6)
    assert (folder / prefix_room.FILE).exists() and computed
    computed.clear()
    rest = losses(folder, data, resume=True)
    assert not (folder / prefix_room.FILE).exists() and not computed
    assert [*first, *rest] == plain


def test_the_file_of_a_stopped_run_is_neither_pushed_nor_copied(data, tmp_path):
    folder = tmp_path / "run"
    losses(folder, data, cache_prefix="disk", stop_after=3)
    assert (folder / prefix_room.FILE).exists()
    assert prefix_room.FILE not in [file.name for file in _files(folder, "mlx-lm")]
    for arguments in (
        ["convert", str(folder), str(tmp_path / "peft"), "--to", "peft", "--model", str(PATH)],
        ["fuse", "--model", str(PATH), "--adapter-path", str(folder), "--save-path", str(tmp_path / "fused")],
    ):
        found = CliRunner().invoke(cli, arguments)
        assert found.exit_code == 0, found.output
    assert list(tmp_path.rglob(prefix_room.FILE)) == [folder / prefix_room.FILE]


def test_a_killed_run_keeps_complete_rows(data, tmp_path):
    folder, plain = tmp_path / "run", losses(tmp_path / "plain", data)
    train = {**TRAIN, "cache_prefix": "disk"}
    reports = mlx_lora.run(tmp_path / "first", model=PATH, data=str(data), adapter=LAST, train=train)
    killed_at(reports, lambda report: isinstance(report, mlx_lora.Progress), tmp_path / "first", folder)
    assert (folder / prefix_room.FILE).stat().st_size > 1000
    assert losses(folder, data, cache_prefix="disk") == plain


def test_what_does_not_fit_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_room, "_free_disk", lambda path: 10)
    monkeypatch.setattr(prefix_room, "_free_memory", lambda: 10)
    for place, where in (("disk", "are free in"), ("memory", "in memory")):
        with pytest.raises(ConfigError, match=where) as error:
            losses(tmp_path / "run", data, cache_prefix=place)
        assert "leave --cache-prefix out" in error.value.hint
    assert not (tmp_path / "run" / prefix_room.FILE).exists()


def test_the_size_comes_first_and_closing_the_run_there_declines(data, tmp_path):
    loaded = mlx_lora.load(PATH)
    reports = mlx_lora.run(
        tmp_path / "run", model=loaded, data=str(data), adapter=LAST, train={**TRAIN, "cache_prefix": "disk"}
    )
    before = []
    report = next(r for r in reports if before.append(r) or type(r).__name__ == "PrefixCache")
    assert not [r for r in before if getattr(r, "what", "") == "answers"]
    assert report.bytes > 0 and report.layers == report.of - 1 and report.place.endswith(prefix_room.FILE)
    reports.close()
    assert not (tmp_path / "run" / prefix_room.FILE).exists()
    assert not [path for path, _ in tree_flatten(loaded[0].parameters()) if "lora" in path]


def test_the_predicted_size_is_that_of_the_file(data, tmp_path):
    arguments = dict(model=PATH, data=str(data), adapter=LAST, train={**TRAIN, "cache_prefix": "disk"})
    done = iter(range(1, 99))
    reports = list(mlx_lora.run(tmp_path / "run", stop=lambda: next(done) > 7, **arguments))
    predicted = next(r for r in reports if type(r).__name__ == "PrefixCache").bytes
    assert (tmp_path / "run" / prefix_room.FILE).stat().st_size == pytest.approx(predicted, rel=0.2)


def test_a_run_of_less_than_an_epoch_is_warned_of(data, tmp_path):
    arguments = dict(model=PATH, data=str(data), adapter=LAST, train={**TRAIN, "iters": 2, "cache_prefix": "memory"})
    texts = [r.text for r in mlx_lora.run(tmp_path / "run", **arguments) if type(r).__name__ == "Warned"]
    assert any("gains little" in text for text in texts)


def test_the_command_line_shows_the_size_and_asks(data, tmp_path, monkeypatch):
    base = ["train", "--model", str(PATH), "--data", str(data), "--adapter-path", str(tmp_path / "run")]
    base += ["--num-layers", "1", "--iters", "4", "--batch-size", "2", "--cache-prefix", "disk"]
    found = CliRunner().invoke(cli, base)
    assert found.exit_code != 0 and "asks for confirmation" in str(found.output) + str(found.exception)
    found = CliRunner().invoke(cli, [*base, "--yes"])
    assert found.exit_code == 0 and "layers will be kept in" in found.output
    assert "of the rows after the first epoch" in found.output
    found = CliRunner().invoke(cli, [*base[:-2], "--yes"])
    assert found.exit_code != 0 and "--yes has no effect" in str(found.output) + str(found.exception)
