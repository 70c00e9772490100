"""Fingerprints of base models: equal for copies and quantized versions, different for other models."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from conftest import LLAMA, QWEN3_MOE, make_model
from mlx_lora.base.fingerprint import Fingerprint, digest
from mlx_lora.base.quantizing import quantize
from mlx_lora.model.state import bare_modules


def fingerprint(model) -> Fingerprint:
    return Fingerprint.of(bare_modules(model))


def with_norms(model, seed: int):
    """Random models have norms of ones; trained ones do not."""
    mx.random.seed(seed)
    norms = [(n, 1 + 0.1 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters()) if "norm" in n]
    model.update(tree_unflatten(norms))
    return model


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "mode",
    [
        {"bits": 8, "group_size": 32},
        {"bits": 4, "group_size": 32},
        {"bits": 2, "group_size": 32},
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    ],
    ids=["8", "4", "2", "mxfp4"],
)
def test_a_quantized_version_is_the_same_model(config, mode):
    known = fingerprint(make_model(config))
    quantized = fingerprint(make_model(config, quantize=mode))
    assert quantized.matches(known) and known.matches(quantized) and quantized.quantized
    other = fingerprint(make_model(config, seed=1, quantize=mode))
    assert not other.matches(known) and not known.matches(other) and not other.matches(quantized)


def test_nf4_is_the_same_model():
    model = make_model(LLAMA)
    known = fingerprint(model)
    quantize(model, mode="nf4")
    assert fingerprint(model).matches(known) and fingerprint(model) != known
    other = make_model(LLAMA, seed=1)
    quantize(other, mode="nf4")
    assert not fingerprint(other).matches(known)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_the_same_model(dtype):
    model = make_model(LLAMA)
    known, float_digest = fingerprint(model), digest(model)
    model.set_dtype(dtype)
    assert fingerprint(model).matches(known) and digest(model) != float_digest
    half = digest(model)
    model.set_dtype(mx.float32)  # as a CPU computes with it
    assert digest(model) == half


def test_a_small_change_of_the_weights_is_seen():
    """A hundredth, as a merged adapter makes, in all weights; and for the digest in one."""
    model, changed = make_model(LLAMA), make_model(LLAMA)
    for name, array in tree_flatten(changed.parameters()):
        if "q_proj" in name:
            changed.update(
                tree_unflatten([(name, array + 0.02 * mx.abs(array).mean() * mx.random.normal(array.shape))])
            )
    assert not fingerprint(changed).matches(fingerprint(model))
    one = make_model(LLAMA)
    one.model.norm.weight = one.model.norm.weight * 1.001
    assert digest(one) != digest(model)


def test_other_norms_are_another_model_though_the_weights_are_quantized():
    model = with_norms(make_model(LLAMA), 0)
    other = with_norms(make_model(LLAMA, quantize={"bits": 4, "group_size": 32}), 1)
    assert not fingerprint(other).matches(fingerprint(model))


def test_what_is_stored_is_read_back_and_anything_else_is_not_a_fingerprint():
    known = fingerprint(make_model(LLAMA))
    assert Fingerprint.from_stored(known.stored()) == known
    wrong = [None, "x", {}, {**known.stored(), "weights": "?"}, {**known.stored(), "norms": 3}]
    assert [Fingerprint.from_stored(value) for value in wrong] == [None] * 5
    assert len(str(known.stored())) < 2000


def test_models_of_other_depth_do_not_match():
    assert not fingerprint(make_model(LLAMA)).matches(fingerprint(make_model(LLAMA, num_hidden_layers=1)))
