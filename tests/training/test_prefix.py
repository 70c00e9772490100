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

LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=97,
)


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def llama(dtype=mx.float32, bits: int | None = None) -> nn.Module:
    mx.random.seed(0)
    module = importlib.import_module("mlx_lm.models.llama")
    model = module.Model(module.ModelArgs.from_dict(LLAMA))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, 32, bits)
    return model


def rows(count: int, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 40, count)
    return Dataset(Example(draw.integers(1, 97, n).astype(np.int32), np.arange(n) > 0) for n in lengths)


def trained(model, train_set, valid_set=None, adapter=None, prefix=None, **train):
    """Losses of every iteration and validation, and the trained parameters."""
    config = TrainConfig(**{"iters": 60, "batch_size": 4, "steps_per_report": 1, "steps_per_eval": 20, **train})
    settings = dict(num_layers=2, rank=4, scale=2.0)
    mx.random.seed(1)
    mlx_lora.attach(model, adapter or AdapterConfig(**settings))
    optimizer = mlx_lora.build_optimizer(mlx_lora.OptimizerConfig(learning_rate=1e-2), config.iters)
    losses = []
    for report in mlx_lora.train(model, optimizer, train_set, valid_set, config, prefix=prefix):
        losses += [getattr(report, name) for name in ("train_loss", "val_loss") if hasattr(report, name)]
    return losses, {path: np.array(p.astype(mx.float32)) for path, p in tree_flatten(model.trainable_parameters())}


def equal(one, other):
    assert one[0] == other[0]
    assert all(np.array_equal(one[1][path], other[1][path]) for path in one[1])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_same_losses_to_the_bit(dtype, bits):
    plain = trained(llama(dtype, bits), rows(42), rows(9, 1))
    kept = trained(llama(dtype, bits), rows(42), rows(9, 1), cache_prefix="memory")
    assert len(plain[0]) == 64
    equal(plain, kept)
