"""All of mlx-lm's families: training computes what generation does, also where that needs a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from model_families import families, tiny_model

import mlx_lora
from conftest import needs_mlx_lm_0_32
from mlx_lora import AdapterConfig, TrainConfig
from mlx_lora.base import forward_paths, older_mlx_lm
from mlx_lora.base.forward_paths import _fresh, difference, needs_cache, through_cache
from mlx_lora.data import Dataset, train_batches
from mlx_lora.data.batches import Example
from mlx_lora.errors import MLXLoRAWarning, ModelError
from mlx_lora.training import evaluate
from mlx_lora.training.losses import loss_named

ROW = np.random.default_rng(0).integers(3, 60, 13).tolist()
# With a window of 8 tokens, both families differ within the row.
THROUGH_CACHE = {"gemma3n": "its last layers find the keys and values of earlier ones in the cache only"}
# Gemma 3n reads the weights of its coefficients itself, so that no adapter can be on them.
KEYS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
REFUSED = {"plamo3": "its window is one token longer in the mask of a prompt than in the cache"}
if older_mlx_lm.is_used():
    THROUGH_CACHE = {**THROUGH_CACHE, "falcon_h1": "without a cache it computes its first layer alone"}
    REFUSED = {"gemma3n": "its last layers use the next token's position", "llama4": "its cache keeps other tokens"}


@pytest.fixture(autouse=True)
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def logits(model: nn.Module, training: bool = False, cached: bool = False, step: int | None = None) -> mx.array:
    """The logits of ROW, at once or ``step`` tokens at a time."""
    model.train(training)
    cache, tokens, step = _fresh(model) if cached else None, mx.array([ROW]), step or len(ROW)
    parts = []
    for i in range(0, len(ROW), step):
        part = tokens[:, i : i + step]
        parts.append(model(part, cache=cache) if cached else model(part))
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", families())
def test_training_evaluation_prefill_and_decode_agree(name):
    model = tiny_model(name)
    prefill = logits(model, cached=True)
    paths = {
        "training": logits(model, training=True),
        "evaluation": logits(model),
        "training through a cache": logits(model, training=True, cached=True),
        "decode": logits(model, cached=True, step=1),
    }
    differences = {path: difference(values, prefill) for path, values in paths.items()}
    apart = {path for path, off in differences.items() if not off < 1e-5}
    expected = {"training", "evaluation"} if name in THROUGH_CACHE else set()
    expected |= {"decode"} if name in REFUSED else set()
    assert apart == expected, differences
    if name in REFUSED:
        with pytest.raises(ModelError, match=f"{name} computes other logits"):
            needs_cache(model, ROW)
    else:
        assert needs_cache(model, ROW) == (name in THROUGH_CACHE)


@needs_mlx_lm_0_32
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_every_dtype_shows_that_gemma3n_needs_a_cache(dtype):
    for name in ("gemma3n", "llama", "gemma3_text"):
        model = tiny_model(name)
        model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
        assert needs_cache(model, ROW) == (name == "gemma3n")


def test_the_cache_is_given_only_while_the_context_is_open():
    model = tiny_model("gemma3n")
    own, plain, cached = type(model), logits(model), logits(model, cached=True)
    with through_cache(model):
        assert difference(logits(model), cached) < 1e-6
    assert type(model) is own and difference(logits(model), plain) == 0
    with through_cache(model, needed=False):
        assert type(model) is own


@needs_mlx_lm_0_32
def test_gradients_through_the_cache_are_those_of_the_generating_model():
    """Against a central difference of the loss as generation computes it, one token at a time."""
    model = tiny_model("gemma3n").train()
    mlx_lora.attach(model, AdapterConfig(rank=2, scale=2.0, num_layers=-1, keys=KEYS))
    mx.random.seed(3)
    start = tree_map(lambda p: 0.1 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(start)
    tokens, mask = mx.array([ROW]), mx.ones((1, len(ROW) - 1), mx.bool_)
    with through_cache(model):
        objective = nn.value_and_grad(model, lambda m: loss_named("cross_entropy")(m, tokens, mask)[0])
        _, gradients = mx.compile(lambda parameters: (model.update(parameters), objective(model))[1])(start)
    model.update(start)
    flat = dict(tree_flatten(gradients))
    assert all(mx.abs(g).max() > 0 for g in flat.values()), "a parameter without a gradient"
    norm = mx.sqrt(sum(g.square().sum() for g in flat.values()))

    def generated_loss(step: float) -> float:
        model.update(tree_map(lambda p, g: p + step * g / norm, start, gradients))
        values = logits(model, cached=True, step=1)[0, :-1]
        return nn.losses.cross_entropy(values, mx.array(ROW[1:]), reduction="sum").item()

    slope = (generated_loss(0.01) - generated_loss(-0.01)) / 0.02
    assert slope == pytest.approx(norm.item(), rel=0.01)


def dataset(rows: int = 8) -> Dataset:
    draw = np.random.default_rng(1)
    mask = np.arange(13) > 0
    return Dataset([Example(draw.integers(3, 60, 13).astype(np.int32), mask) for _ in range(rows)])


def generated_loss(model: nn.Module, rows: Dataset) -> float:
    """The mean loss of the rows as generation computes it, one token at a time."""
    model.eval()
    losses = []
    for row in rows:
        cache, tokens = _fresh(model), mx.array(row.tokens)[None]
        values = mx.concatenate([model(tokens[:, i : i + 1], cache=cache) for i in range(12)], axis=1)
        losses.append(nn.losses.cross_entropy(values[0], tokens[0, 1:], reduction="mean").item())
    return float(np.mean(losses))


def plain_loss(model: nn.Module, rows: Dataset) -> float:
    """The mean loss of the rows by the model without a cache."""
    tokens = mx.array(np.stack([row.tokens for row in rows]))
    total, count = loss_named("cross_entropy")(model.eval(), tokens, mx.ones((len(rows), 12), mx.bool_))
    return (total / count).item()


def run(model, folder, rows, **train):
    keys = KEYS if model.model_type == "gemma3n" else None
    config = TrainConfig(iters=10, batch_size=4, val_batches=-1, steps_per_eval=10, **train)
    adapter = AdapterConfig(rank=4, scale=4.0, num_layers=-1, dropout=0.1, keys=keys)
    options = {"optimizer": {"learning_rate": 1e-2}, "test_batches": -1}
    return list(mlx_lora.run(folder, model=model, data=(rows, rows, rows), adapter=adapter, train=config, **options))


@needs_mlx_lm_0_32
def test_gemma3n_is_trained_as_it_generates(tmp_path):
    model, rows = tiny_model("gemma3n"), dataset()
    before = generated_loss(model, rows)
    assert abs(before - plain_loss(model, rows)) > 0.01, "without a cache the loss is another model's"
    reports = run(model, tmp_path, rows)
    assert next(r.text for r in reports if type(r).__name__ == "Warned").startswith("without a cache")
    first, last = [r.val_loss for r in reports if type(r).__name__ == "ValReport"]
    after = generated_loss(model, rows)
    assert first == pytest.approx(before, abs=1e-4)
    assert last == pytest.approx(after, abs=1e-4) and reports[-1].loss == pytest.approx(after, abs=1e-4)
    assert after < before - 0.3


@needs_mlx_lm_0_32
def test_models_that_cannot_be_trained_as_they_generate_are_refused_and_left_as_they_were(tmp_path):
    for name, train, words in (("plamo3", {}, "one token at a time"), ("gemma3n", {"grad_checkpoint": True}, "twice")):
        model = tiny_model(name)
        before = [path for path, _ in tree_flatten(model.parameters())]
        with pytest.raises(ModelError, match=words) as error:
            run(model, tmp_path / name, dataset(), **train)
        assert name in error.value.message and error.value.hint
        assert [path for path, _ in tree_flatten(model.parameters())] == before


@needs_mlx_lm_0_32
def test_training_and_measuring_without_a_folder_compute_what_generates(monkeypatch):
    """`train`, `evaluate` and initialisations from data, called directly, compare once each."""
    calls = []
    own = forward_paths.needs_cache
    monkeypatch.setattr(forward_paths, "needs_cache", lambda *args: calls.append(args) or own(*args))
    model, rows = tiny_model("gemma3n"), dataset()
    kind, expected = type(model), generated_loss(model, rows)
    assert evaluate(model, rows).loss == pytest.approx(expected, abs=1e-4) and len(calls) == 1
    config = TrainConfig(iters=1, batch_size=8, val_batches=-1)
    mlx_lora.attach(model, AdapterConfig(rank=4, scale=4.0, num_layers=-1, keys=KEYS))
    calls.clear()
    with pytest.warns(MLXLoRAWarning, match="through a fresh cache"):
        reports = list(mlx_lora.train(model, mlx.optimizers.Adam(1e-2), rows, rows, config))
    assert len(calls) == 1 and type(model) is kind
    losses = [r.val_loss for r in reports if type(r).__name__ == "ValReport"]
    assert losses[0] == pytest.approx(expected, abs=1e-4)
    assert losses[-1] == pytest.approx(generated_loss(model, rows), abs=1e-4)
    with pytest.raises(ModelError, match="twice"):
        list(mlx_lora.train(model, mlx.optimizers.Adam(1e-2), rows, rows, replace(config, grad_checkpoint=True)))
    assert type(model) is kind and not forward_paths._compared


def test_a_run_compares_once(tmp_path, monkeypatch):
    calls = []
    own = forward_paths.needs_cache
    monkeypatch.setattr(forward_paths, "needs_cache", lambda *args: calls.append(args) or own(*args))
    run(tiny_model("llama"), tmp_path, dataset())
    assert len(calls) == 1


def gradient_seen_by_lora_ga(model: nn.Module, rows: Dataset) -> mx.array:
    batches = list(itertools.islice(train_batches(rows, 4, seed=0), 2))
    mx.random.seed(0)
    config = AdapterConfig(rank=2, scale=2.0, num_layers=-1, keys=KEYS, init="lora_ga")
    mlx_lora.attach(model, config, batches)
    return mlx_lora.extract(model).weights


@needs_mlx_lm_0_32
def test_an_initialisation_from_data_reads_the_model_that_generates(monkeypatch):
    rows = dataset()
    expected = tiny_model("gemma3n")
    with through_cache(expected):
        expected = gradient_seen_by_lora_ga(expected, rows)
    found = gradient_seen_by_lora_ga(tiny_model("gemma3n"), rows)
    assert all(mx.array_equal(found[name], array).item() for name, array in expected.items())
    monkeypatch.setattr(forward_paths, "needs_cache", lambda *_: False)
    plain = gradient_seen_by_lora_ga(tiny_model("gemma3n"), rows)
    assert not all(mx.array_equal(found[name], array).item() for name, array in plain.items())
