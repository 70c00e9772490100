"""Plans of runs that keep the output of frozen layers (``cache_prefix``)."""

from __future__ import annotations

import json

import pytest

import mlx_lora
from mlx_lora.errors import ConfigError
from mlx_lora.planning import speed
from mlx_lora.runs import run
from mlx_lora.tiny_base import PATH, skill

ADAPTER = {"rank": 4, "num_layers": 1}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 24), ("valid", 8)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return tmp_path


def planned(data, place: str, **train):
    train = {"epochs": 3, "batch_size": 4, "cache_prefix": place, **train}
    return mlx_lora.plan(PATH, data, adapter=ADAPTER, train=train, machines=False)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_plan_names_the_size_that_the_run_names(place, data):
    train = {"epochs": 3, "batch_size": 4, "cache_prefix": place, "report_prompts": 0}
    found, said = planned(data, place).prefix, None
    for report in run(data / "run", model=PATH, data=data, adapter=ADAPTER, train=train):
        if type(report).__name__ == "PrefixCache":
            said = report
            break
    assert (found.bytes, found.layers, found.place) == (said.bytes, said.layers, place)
    assert found.reused == pytest.approx(said.reused * 2 / 3)  # of three epochs, the first finds none


def test_states_in_memory_are_part_of_the_peak_and_those_in_a_file_are_not(data):
    without, memory, disk = (planned(data, place) for place in ("none", "memory", "disk"))
    assert without.prefix is None and without.memory == disk.memory
    assert memory.memory.kept == memory.prefix.bytes == disk.prefix.bytes > 0
    assert memory.memory.peak == disk.memory.peak + memory.prefix.bytes


def test_the_time_is_shorter_by_the_frozen_layers_of_the_later_epochs(data, monkeypatch):
    monkeypatch.setattr(speed, "measured", lambda flops: 1e9)
    without, kept, first = planned(data, "none"), planned(data, "disk"), planned(data, "disk", epochs=1)
    assert kept.seconds < without.seconds and first.prefix.reused == 0
    assert first.seconds * 3 == pytest.approx(without.seconds)


def test_what_train_refuses_is_refused(data):
    with pytest.raises(ConfigError, match="the first layer is trained"):
        mlx_lora.plan(PATH, data, adapter={"num_layers": -1}, train={"cache_prefix": "disk"}, machines=False)
    with pytest.raises(ConfigError, match="2 processes"):
        mlx_lora.plan(PATH, data, adapter=ADAPTER, train={"cache_prefix": "disk"}, processes=2, machines=False)


def test_without_data_a_note_says_that_nothing_is_counted():
    found = mlx_lora.plan(PATH, adapter=ADAPTER, train={"cache_prefix": "memory"}, max_seq_length=64, machines=False)
    assert found.prefix is None and any("--cache-prefix" in note for note in found.notes)
