"""Kept states of frozen layers: the same losses to the bit, and everything that stands in the way is refused."""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from mlx_lora import AdapterConfig, TrainConfig
from mlx_lora.data.batches import Dataset, Example
from mlx_lora.errors import ConfigError, MLXLoRAWarning
from mlx_lora.training import prefix as prefix_module
from mlx_lora.training import prefix_states
from mlx_lora.training.prefix import FrozenPrefix
from mlx_lora.training.prefix_checks import check_settings
from mlx_lora.training.prefix_states import FileStates

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=97,
    tie_word_embeddings=False,
)
LAST = dict(num_layers=2, rank=4, scale=2.0)


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def llama(dtype=mx.float32, bits: int | None = None, **changed) -> nn.Module:
    mx.random.seed(0)
    module = importlib.import_module("mlx_lm.models.llama")
    model = module.Model(module.ModelArgs.from_dict({**LLAMA, **changed}))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    return model


def rows(count: int = 22, seed: int = 0) -> Dataset:
    """In batches of 4, the 4 rows of 17 tokens are in one group with the 10 shorter ones, which so have two widths."""
    draw = np.random.default_rng(seed)
    lengths = draw.permutation([2, *[13] * 9, *[17] * 4, *[33] * 8])[:count]
    return Dataset(Example(draw.integers(1, 97, n).astype(np.int32), np.arange(n) > 0) for n in lengths)


def trained(model, valid_set=None, adapter=None, prefix=None, **train):
    """Losses of every iteration and validation, and the trained parameters."""
    config = TrainConfig(**{"iters": 14, "batch_size": 4, "steps_per_report": 1, "steps_per_eval": 10, **train})
    mx.random.seed(1)
    mlx_lora.attach(model, AdapterConfig(**(adapter or LAST)))
    optimizer = mlx_lora.build_optimizer(mlx_lora.OptimizerConfig(learning_rate=1e-2), config.iters)
    losses = []
    for report in mlx_lora.train(model, optimizer, rows(), valid_set, config, prefix=prefix):
        losses += [getattr(report, name) for name in ("train_loss", "val_loss") if hasattr(report, name)]
    return losses, {path: np.array(p.astype(mx.float32)) for path, p in tree_flatten(model.trainable_parameters())}


def equal(one, other):
    assert one[0] == other[0]
    assert all(np.array_equal(one[1][path], other[1][path]) for path in one[1])


@pytest.mark.parametrize(
    "model, train",
    [
        ({}, {}),
        ({"bits": 4}, {"grad_accumulation_steps": 2}),
        ({"dtype": mx.bfloat16}, {"grad_checkpoint": True}),
    ],
)
@pytest.mark.alternate
def test_the_same_losses_to_the_bit(model, train):
    adapter = {**LAST, "dropout": 0.3}  # its masks must not depend on what is kept
    plain = trained(llama(**model), rows(9, 1), adapter, **train)
    kept = trained(llama(**model), rows(9, 1), adapter, cache_prefix="memory", **train)
    assert len(plain[0]) == 14 + 3
    equal(plain, kept)


def counted(monkeypatch) -> list:
    computed: list = []
    own = FrozenPrefix._compute

    def compute(self, dataset, missing, *rest):
        computed.append(len(missing))
        return own(self, dataset, missing, *rest)

    monkeypatch.setattr(FrozenPrefix, "_compute", compute)
    return computed


def test_where_one_width_serves_for_all_every_row_is_computed_once(monkeypatch):
    """As on a GPU; the losses then differ by rounding."""
    plain, computed = trained(llama()), counted(monkeypatch)
    monkeypatch.setattr(prefix_module, "is_cpu", lambda: False)
    kept = trained(llama(), cache_prefix="memory")
    assert sum(computed) == 22
    np.testing.assert_allclose(kept[0], plain[0], rtol=1e-4)


def test_each_pair_of_row_and_width_is_computed_once(monkeypatch):
    computed = counted(monkeypatch)
    model = llama()
    mlx_lora.attach(model, AdapterConfig(**LAST))
    expected = FrozenPrefix(model, rows()).expected(4, 0, 24, 0)[0]
    states = prefix_states.MemoryStates()
    monkeypatch.setattr(states, "close", lambda: None)
    prefix = FrozenPrefix(model, rows(), states=states)
    optimizer = mlx_lora.build_optimizer(mlx_lora.OptimizerConfig(), 24)
    for _ in mlx_lora.train(
        model, optimizer, rows(), None, TrainConfig(iters=24, batch_size=4, cache_prefix="memory"), prefix=prefix
    ):
        pass
    assert sum(computed) == len(states._states)
    assert sum(s.nbytes for s in states._states.values()) == pytest.approx(expected, rel=0.35)


def file_states(tmp_path, owner="a"):
    return FileStates(tmp_path / "states", owner, 4)


def values(n: int) -> np.ndarray:
    return np.arange(n * 8, dtype=np.uint32).reshape(n, 8)


def test_a_file_keeps_states_and_drops_those_of_another_owner(tmp_path):
    states = file_states(tmp_path)
    states.put((0, 3, 17), values(5))
    assert np.array_equal(states.get((0, 3, 17)), values(5)) and states.get((0, 3, 21)) is None
    states.put((1, 3, 17), values(2))
    states.close()
    again = file_states(tmp_path)
    assert len(again) == 2 and np.array_equal(again.get((1, 3, 17)), values(2))
    again.close()
    assert len(file_states(tmp_path, "b")) == 0
    assert len(file_states(tmp_path)) == 0


def test_an_incomplete_record_and_a_damaged_one_are_computed_again(tmp_path):
    states = file_states(tmp_path)
    for row in range(3):
        states.put((0, row, 9), values(4))
    states.close()
    data = bytearray((tmp_path / "states").read_bytes())
    record = (len(data) - 2) // 3  # after the line "a\n"
    data[2 + record + 40] ^= 1  # a byte of the second row
    (tmp_path / "states").write_bytes(data[:-7])  # the third one is cut
    again = file_states(tmp_path)
    assert np.array_equal(again.get((0, 0, 9)), values(4))
    assert again.get((0, 1, 9)) is None and again.get((0, 2, 9)) is None
    again.put((0, 2, 9), values(4))
    again.close()
    assert np.array_equal(file_states(tmp_path).get((0, 2, 9)), values(4))


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch):
    states, own = file_states(tmp_path), prefix_states._write

    def write(file, data, place):
        if place > 3000:
            own(file, data[:100], place)
            raise OSError(28, "No space left on device")
        own(file, data, place)

    monkeypatch.setattr(prefix_states, "_write", write)
    model = llama()
    plain = trained(llama())
    mlx_lora.attach(model, AdapterConfig(**LAST))
    prefix = FrozenPrefix(model, rows(), states=states)
    mlx_lora.unmount(model)
    with pytest.warns(MLXLoRAWarning, match="No space left on device. No more states"):
        equal(plain, trained(model, prefix=prefix, cache_prefix="disk"))
    assert (tmp_path / "states").stat().st_size < 20_000


@pytest.mark.parametrize(
    "adapter, message",
    [
        ({**LAST, "num_layers": -1}, "the first layer is trained"),
        ({**LAST, "modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({**LAST, "trainable_token_indices": {"embed_tokens": [3]}}, "embed_tokens"),
    ],
)
def test_trained_parameters_before_the_last_layers_are_refused(adapter, message):
    with pytest.raises(ConfigError, match=message):
        trained(llama(), adapter=adapter, cache_prefix="memory")


@pytest.mark.parametrize(
    "loss, processes, message", [("dpo", 1, "does not read each row once"), ("cross_entropy", 2, "each of 2 processes")]
)
def test_other_losses_and_several_processes_are_refused(loss, processes, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_settings(loss, processes)
    assert "Leave --cache-prefix out" in error.value.hint


def test_dropout_in_a_frozen_layer_is_refused():
    model = llama()
    mlx_lora.attach(model, AdapterConfig(**LAST))
    model.model.layers[1].mlp.drop = nn.Dropout(0.1)
    with pytest.raises(ConfigError, match="the frozen layers have dropout"):
        FrozenPrefix(model, rows())


def test_the_expected_reuse_is_what_training_finds(monkeypatch):
    model, computed = llama(), counted(monkeypatch)
    mlx_lora.attach(model, AdapterConfig(**LAST))
    assert FrozenPrefix(model, rows()).expected(4, 0, 6, 0)[1] is None  # one epoch
    reused = FrozenPrefix(model, rows()).expected(4, 0, 24, 0)[1]
    mlx_lora.unmount(model)
    trained(model, cache_prefix="memory", iters=24)
    assert sum(computed) - 22 == round((1 - reused) * 3 * 22)
    assert 0.6 < reused < 1


def test_a_trained_head_is_behind_the_prefix():
    adapter = {**LAST, "modules_to_save": ["lm_head"]}
    equal(trained(llama(), adapter=adapter), trained(llama(), adapter=adapter, cache_prefix="memory"))


def test_a_parameter_that_acts_in_frozen_layers_is_found():
    model = llama()
    mlx_lora.attach(model, AdapterConfig(**LAST))
    model.model.layers[0].mlp.up_proj = model.model.layers[3].mlp.up_proj  # one adapted module in two layers
    with pytest.raises(ConfigError, match="cache_prefix"):
        FrozenPrefix(model, rows())


def test_packing_and_an_unknown_place_are_refused():
    with pytest.raises(ConfigError, match="cache_prefix cannot be used with pack"):
        TrainConfig(cache_prefix="memory", pack=True)
    with pytest.raises(ConfigError, match="one of none, memory, disk"):
        TrainConfig(cache_prefix="tape")
    with pytest.raises(ConfigError, match="'disk' needs a file"):
        trained(llama(), cache_prefix="disk")


def test_the_whole_model_is_back_also_when_the_run_is_closed_or_fails():
    model = llama()
    mlx_lora.attach(model, AdapterConfig(**LAST))
    classes = [type(module) for module in model.modules()]
    before = model(mx.array([[1, 2, 3]]))
    optimizer = mlx_lora.build_optimizer(mlx_lora.OptimizerConfig(learning_rate=1e-30), 9)
    reports = mlx_lora.train(model, optimizer, rows(), None, TrainConfig(iters=9, batch_size=4, cache_prefix="memory"))
    next(reports)
    assert [type(module) for module in model.modules()] != classes
    assert mx.allclose(model(mx.array([[1, 2, 3]])), before)  # also between two iterations
    reports.close()
    assert [type(module) for module in model.modules()] == classes

    def fail(state):
        raise RuntimeError("no")

    reports = mlx_lora.train(
        model, optimizer, rows(), None, TrainConfig(iters=2, batch_size=4, cache_prefix="memory"), checkpoint=fail
    )
    with pytest.raises(RuntimeError, match="no"):
        list(reports)
    assert [type(module) for module in model.modules()] == classes
    assert mx.allclose(model(mx.array([[1, 2, 3]])), before)
