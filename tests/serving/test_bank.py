"""Named adapters: loaded on demand, reloaded, dropped, shared in a batch or mounted alone."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest

from conftest import make_model, shake
from mlx_lora import save_adapter
from mlx_lora.config import AdapterConfig
from mlx_lora.errors import AdapterError, FormatError
from mlx_lora.formats import load_adapter
from mlx_lora.model.attach import adapters_on, attach, extract, unmount
from mlx_lora.serving import bank as bank_module
from mlx_lora.serving import residents
from mlx_lora.serving.bank import AdapterBank

TOKENS = mx.array([[1, 5, 9, 4]])


def adapter(model, seed: int, **config):
    attach(model, AdapterConfig(num_layers=-1, **{"rank": 4, **config}))
    shake(model, seed)
    made = extract(model)
    unmount(model)
    return made


@pytest.fixture
def model():
    return make_model()


def logits(model):
    return model(TOKENS)


def same(a, b) -> bool:
    return mx.allclose(a, b, atol=1e-5).item()


def test_rows_of_a_batch_use_their_own_adapters(model):
    bank, base, alone = AdapterBank(model), logits(model), {}
    for name, made in {f"a{rank}": adapter(model, rank, rank=rank) for rank in (2, 8)}.items():
        bank.add(name, made)
        resident = bank.acquire(name)
        bank.mount_alone(resident)
        alone[resident.key] = logits(model)
        assert not same(alone[resident.key], base)
    first, second = alone
    bank.choose([second, None, first])
    got = model(mx.repeat(TOKENS, 3, axis=0))
    assert same(got[:1], alone[second]) and same(got[1:2], base) and same(got[2:], alone[first])
    bank.choose([None])
    assert mx.array_equal(logits(model), base), "without an adapter the base is computed as it is"
    bank.clear()
    assert not adapters_on(model)


def test_an_adapter_that_is_no_plain_lora_is_alone(model):
    bank = AdapterBank(model)
    for name, config in (("plain", {}), ("dora", {"method": "dora"}), ("tokens", {"modules_to_save": ["lm_head"]})):
        bank.add(name, adapter(model, 3, **config))
        assert bool(bank.load(name).alone) == (name != "plain")
    assert {each.name: bool(each.alone) for each in bank.listed()} == {"plain": False, "dora": True, "tokens": True}


def test_a_folder_is_read_again_when_it_changes_and_running_rows_keep_theirs(model, tmp_path):
    bank = AdapterBank(model, folder=tmp_path)
    save_adapter(adapter(model, 1), tmp_path / "mine", "peft")
    assert bank.names == ["mine"] and not bank.listed()[0].loaded
    old = bank.acquire("mine")
    assert bank.load("mine") is old
    save_adapter(adapter(model, 2), tmp_path / "mine", "peft", overwrite=True)
    new = bank.acquire("mine")
    assert new is not old and new.key != old.key
    bank.choose([old.key, new.key])
    got = model(mx.repeat(TOKENS, 2, axis=0))
    assert not same(got[:1], got[1:])
    bank.release(old)
    bank.release(new)


def test_the_least_recently_used_are_dropped_at_the_limit(model):
    bank = AdapterBank(model)
    adapters = [adapter(model, seed) for seed in range(4)]
    bank.memory_limit = 2 * adapters[0].nbytes
    bank.add("pinned", adapters[0], pinned=True)
    for number in (1, 2, 3):
        bank.add(f"a{number}", adapters[number])
    bank.load("pinned")
    busy = bank.acquire("a1")
    bank.load("a2")
    assert {each.name for each in bank.listed() if each.loaded} == {"pinned", "a1", "a2"}, "the new one stays"
    bank.load("a3")
    assert {each.name for each in bank.listed() if each.loaded} == {"pinned", "a1", "a3"}
    bank.release(busy)
    assert {each.name for each in bank.listed() if each.loaded} == {"pinned", "a3"}


def test_what_is_no_adapter_or_not_for_this_model_is_refused(model, tmp_path):
    bank = AdapterBank(model, folder=tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert bank.names == []
    for name in ("empty", "..", "../elsewhere", str(tmp_path), ""):
        with pytest.raises(AdapterError, match="no adapter named"):
            bank.load(name)
    with pytest.raises(FormatError):
        bank.add("empty", tmp_path / "empty")
    bank.add("other", adapter(make_model(hidden_size=32), 1))
    with pytest.raises(AdapterError):
        bank.load("other")


def test_a_name_may_get_another_adapter(model):
    bank = AdapterBank(model)
    results = []
    for seed in (1, 2):
        bank.add("name", adapter(model, seed))
        bank.choose([bank.acquire("name").key])
        results.append(logits(model))
        bank.choose([None])
    assert not same(*results)


def test_a_model_with_an_adapter_takes_no_others(model):
    made = adapter(model, 1)
    attach(model, AdapterConfig(rank=2, num_layers=-1))
    bank = AdapterBank(model)
    bank.add("one", made)
    with pytest.raises(AdapterError, match="has an adapter"):
        bank.load("one")


def test_an_adapter_whose_folder_was_deleted_does_not_stop_the_others(model, tmp_path):
    made = adapter(model, 1)
    bank = AdapterBank(model, folder=tmp_path, memory_limit=made.nbytes)
    for name in ("gone", "there"):
        save_adapter(made, tmp_path / name, "peft")
    bank.release(bank.acquire("gone"))
    shutil.rmtree(tmp_path / "gone")
    bank.release(bank.acquire("there"))
    assert [(each.name, each.loaded) for each in bank.listed()] == [("there", True)]
    with pytest.raises(AdapterError, match="no adapter named 'gone'"):
        bank.acquire("gone")


@pytest.fixture
def slow_reads(monkeypatch):
    """(names of the folders that are read, an event that lets the reading go on)."""
    found, go = [], threading.Event()

    def read(path, base):
        found.append(path.name)
        assert go.wait(120)
        return load_adapter(path, base=base)

    monkeypatch.setattr(bank_module, "load_adapter", read)
    yield found, go
    go.set()


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_at_once_read_an_adapter_once_and_hold_nobody_up(model, tmp_path, slow_reads):
    read, go = slow_reads
    bank = AdapterBank(model, folder=tmp_path)
    bank.add("warm", adapter(model, 1))
    bank.load("warm")
    save_adapter(adapter(model, 2), tmp_path / "cold", "peft")
    with ThreadPoolExecutor(3) as pool:
        acquired = [pool.submit(bank.acquire, "cold") for _ in range(3)]
        wait_for(lambda: read)
        bank.choose([bank.acquire("warm").key])  # as the engine does at each step
        bank.choose([None])
        assert not any(each.done() for each in acquired)
        go.set()
        (cold,) = {each.result(120) for each in acquired}
    assert read == ["cold"] and cold.rows == 3 and bank.load("cold") is cold


def test_a_name_that_gets_another_adapter_while_the_first_is_read(model, tmp_path, slow_reads):
    read, go = slow_reads
    bank = AdapterBank(model)
    for seed, name in enumerate(("first", "second")):
        save_adapter(adapter(model, seed), tmp_path / name, "peft")
    bank.add("name", tmp_path / "first")
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(bank.load, "name")
        wait_for(lambda: read)
        bank.add("name", tmp_path / "second")
        go.set()
        assert loaded.result(120) is bank.load("name")
    assert read == ["first", "second"]


def test_a_list_of_many_adapters_looks_into_each_folder_once(model, tmp_path, monkeypatch):
    save_adapter(adapter(model, 1), tmp_path / "a0", "peft")
    for number in range(1, 6):
        shutil.copytree(tmp_path / "a0", tmp_path / f"a{number}")
    looked = []
    monkeypatch.setattr(residents, "detect_format", lambda path: looked.append(path.name))
    bank = AdapterBank(model, folder=tmp_path)
    assert "a3" in bank and looked == ["a3"]
    assert [each.name for each in bank.listed()] == bank.names == [f"a{number}" for number in range(6)]
    assert len(looked) == 6
    shutil.rmtree(tmp_path / "a0")
    assert "a0" not in bank and "a0" not in bank.names


def test_an_older_version_that_rows_use_counts_against_the_limit(model):
    bank = AdapterBank(model)
    adapters = [adapter(model, seed) for seed in range(3)]
    bank.memory_limit = 2 * adapters[0].nbytes
    bank.add("a", adapters[0])
    bank.add("b", adapters[1])
    bank.load("b")
    old = bank.acquire("a")
    bank.add("a", adapters[2])
    bank.load("a")
    assert {each.name for each in bank.listed() if each.loaded} == {"a"}
    bank.release(old)
