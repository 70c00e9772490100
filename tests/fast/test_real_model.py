"""The kernels on real weights and text: stories260K, Shakespeare, and an adapter of Qwen2.5 as it was published."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_lora
from conftest import assert_close, plainly
from kernel_cases import float64
from mlx_lora import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from mlx_lora.kernels import Stored, lora_qmv, lora_shrink
from mlx_lora.model.multi import MultiLoRA
from mlx_lora.training import TrainReport, head
from mlx_lora.training.losses import cross_entropy


@pytest.fixture
def stories(shared):
    def load() -> tuple:
        model, tokenizer = mlx_lora.load(shared / "data" / "stories260K")
        nn.quantize(
            model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        )
        return model, tokenizer

    return load


def trained(model, tokenizer, shared, method: str, iters: int = 3, seed: int = 0) -> list[float]:
    mx.random.seed(seed)
    mlx_lora.attach(model, AdapterConfig(method=method, rank=4, num_layers=-1))
    data = mlx_lora.load_dataset(DataConfig(data=str(shared / "data" / "shakespeare"), max_seq_length=64), tokenizer)
    optimizer = mlx_lora.build_optimizer(OptimizerConfig(learning_rate=1e-2), steps=iters)
    config = TrainConfig(iters=iters, steps_per_report=1, val_batches=0)
    reports = mlx_lora.train(model, optimizer, data.train, data.valid, config)
    return [report.train_loss for report in reports if isinstance(report, TrainReport)]


def decoded(model, tokens: list[int]) -> mx.array:
    model.eval()
    cache = make_prompt_cache(model)
    parts = [model(mx.array([part]), cache=cache) for part in (tokens[:9], *([token] for token in tokens[9:13]))]
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_train_and_decode(backend, method, stories, shared, monkeypatch):
    model, tokenizer = stories()
    losses = trained(model, tokenizer, shared, method)
    tokens = tokenizer.encode("To be, or not to be, that is the question")
    got = decoded(model, tokens)
    assert_close(got, decoded(plainly(model, monkeypatch), tokens), 2e-5)
    more = trained(*stories(), shared, method, iters=9)
    assert_close(np.array(losses), np.array(more[:3]), 1e-5)
    assert sum(more[-3:]) < sum(losses)


def test_many_adapters(backend, stories, shared, monkeypatch):
    """Each of three rows, two of them with an adapter of its own, as if alone."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    adapters = {}
    for seed in (1, 2):
        model, tokenizer = stories()
        trained(model, tokenizer, shared, "lora", seed=seed)
        adapters[str(seed)] = mlx_lora.extract(model)
    model, tokenizer = stories()
    lines = [
        "Once upon a time there was a little dog",
        "My kingdom for a horse, a horse, a horse",
        "The sun was very hot",
    ]
    rows = [tokenizer.encode(line)[:8] for line in lines]
    plain = [
        decoded(mounted(stories()[0], adapters.get(name)), row)[0]
        for name, row in zip(("1", None, "2"), rows, strict=True)
    ]
    if backend != "reference":
        monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    MultiLoRA(model, adapters).choose(["1", None, "2"])
    model.eval()
    cache, tokens = make_prompt_cache(model), mx.array(rows)
    got = mx.concatenate([model(tokens[:, :-1], cache=cache), model(tokens[:, -1:], cache=cache)], axis=1)
    for row, expected in zip(got, plain, strict=True):
        assert_close(row, expected, 3e-5)


def mounted(model, adapter):
    if adapter is not None:
        mlx_lora.mount(model, adapter)
    return model


def test_a_published_adapter(backend, shared):
    """Its matrices, over weights of the shape they were made for."""
    adapter = mlx_lora.load_adapter(shared / "data" / "adapters" / "mlx-lm-qwen2.5-0.5b")
    mx.random.seed(0)
    for path in itertools.islice(adapter.modules, 3):
        a, b = (adapter.weights[f"{path}.{leaf}"].astype(mx.float16) for leaf in ("lora_a", "lora_b"))
        w = 0.02 * mx.random.normal((b.shape[1], a.shape[0]))
        base, x = Stored(*mx.quantize(w.astype(mx.float16)), 64, 4, "affine"), mx.random.normal((2, a.shape[0]))
        x, scale = x.astype(mx.float16), adapter.config.scale_of(path)
        y = lora_qmv(x, base, lora_shrink(x, [a]), b, mx.array([scale]), mx.array([0], mx.int32))
        expected = float64(x) @ float64(base.dequantized()).T + scale * float64(x) @ float64(a) @ float64(b)
        assert_close(y, expected, 2e-3, path)


def test_loss_in_pieces(stories, shared, monkeypatch):
    model, tokenizer = stories()
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1))
    rows = mlx_lora.load_dataset(DataConfig(data=str(shared / "data" / "shakespeare")), tokenizer).valid
    batch, found = next(iter(mlx_lora.data.eval_batches(rows, 4)), None), []
    monkeypatch.setattr(head, "PIECE", 0)
    for whole in (0, 1 << 60):
        monkeypatch.setattr(head, "WHOLE", whole)
        found.append(cross_entropy.loss(model.train(), batch.tokens, batch.mask)[0])
    assert batch.tokens.size > 200, "more than one piece"
    assert_close(*found, 1e-6)
