"""All of mlx-lm's families: kept states of frozen layers give the same losses to the bit, or are refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from model_families import families, tiny_model

import mlx_lora
from mlx_lora import AdapterConfig, TrainConfig
from mlx_lora.base import older_mlx_lm
from mlx_lora.data import train_batches
from mlx_lora.data.batches import Dataset, Example
from mlx_lora.errors import ConfigError, ModelError
from mlx_lora.planning.plan import plan
from mlx_lora.training.losses import loss_named
from mlx_lora.training.prefix import FrozenPrefix

# What the layers hand on besides one hidden state a token.
REFUSED = {
    "afm7": "keys and values of earlier layers",
    "deepseek_v41": "several residual streams",
    "gemma3n": "several residual streams",
    "gemma4": "keys and values of earlier layers",
    "gemma4_text": "keys and values of earlier layers",
    "hunyuan": "keys and values of earlier layers",
    "iquestloopcoder": "each layer is called twice",
    "rwkv7": "values of the first layer",
}
if older_mlx_lm.is_used():
    REFUSED["falcon_h1"] = "its first layer alone is computed without a cache"
# One of each kind trains for three epochs. `FrozenPrefix` compares one row of the others both ways.
TRAINED = {
    *("llama", "gemma2", "phi", "mixtral", "deepseek_v3", "gpt_oss", "mamba2", "recurrent_gemma", "qwen3_5"),
    *("kimi_linear", "granitemoehybrid", "lfm2"),
}
KEYS = {"gemma3n": ["self_attn.q_proj", "mlp.down_proj"]}
LENGTHS = (13, 5, 9, 2, 13, 7)


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def test_each_kind_is_a_family_that_is_not_refused():
    assert set(families()) >= TRAINED and not TRAINED & set(REFUSED)


def dataset() -> Dataset:
    draw = np.random.default_rng(1)
    return Dataset(Example(draw.integers(3, 60, n).astype(np.int32), np.arange(n) > 0) for n in LENGTHS)


def test_a_model_without_gradients_is_refused_by_name(tmp_path):
    model, rows, sgd = tiny_model("dbrx"), dataset(), optim.SGD(0.1)
    (tmp_path / "config.json").write_text(json.dumps(asdict(model.args)))
    mlx_lora.attach(model, AdapterConfig(rank=2, scale=2.0, num_layers=2))
    calls = (
        lambda: list(mlx_lora.train(model, sgd, rows, config=TrainConfig(iters=1, batch_size=2))),
        lambda: FrozenPrefix(model, rows),
        lambda: plan(tmp_path, machines=False),
        lambda: list(mlx_lora.run(tmp_path / "a", model=tmp_path, data=rows, train={"iters": 1, "val_batches": 0})),
    )
    for call in calls:
        with pytest.raises(ModelError, match=r"dbrx cannot be trained: .* NumPy"):
            call()


@pytest.mark.parametrize("name", families())
def test_kept_states_give_the_same_losses_to_the_bit_or_are_refused(name):
    model, rows = tiny_model(name), dataset()
    if name == "dbrx":
        pytest.skip("cannot be trained")
    if not hasattr(model, "_no_grad"):
        pytest.skip("mlx-lm's class is no complete module")
    mlx_lora.attach(model, AdapterConfig(rank=2, scale=2.0, num_layers=2, keys=KEYS.get(name)))
    if name in REFUSED:
        with pytest.raises(ConfigError, match="cache_prefix: the") as error:
            FrozenPrefix(model, rows)
        assert "Leave --cache-prefix out" in error.value.hint
        return
    prefix, loss = FrozenPrefix(model, rows), loss_named("cross_entropy")
    if name not in TRAINED:
        return
    model.train()
    classes = [type(module) for module in model.modules()]
    with prefix.on():
        kept = prefix.train_batches(train_batches(rows, 2, seed=0), 2, seed=0, start=0)
        for _ in range(9):  # three epochs
            hidden, *batch = next(kept)
            expected, found = loss(model, *batch)[0], prefix.loss(loss)(model, hidden, *batch)[0]
            assert found.item() == expected.item()
        assert len(prefix.states._states) >= len(rows)
    assert [type(module) for module in model.modules()] == classes
    assert all(mx.isfinite(p).all() for _, p in tree_flatten(model.trainable_parameters()))
