"""Fusing: the fused model computes what the adapter did, and the report measures what rounding loses."""

from __future__ import annotations

from importlib.util import find_spec

import mlx.core as mx
import mlx.nn as nn
import pytest

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, relative, shake
from mlx_lora.base.modules import is_quantized
from mlx_lora.config import AdapterConfig
from mlx_lora.errors import ConfigError
from mlx_lora.fast import accelerate
from mlx_lora.merge.fuse import fuse
from mlx_lora.model.attach import adapters_on, attach, extract, mount

Q4 = dict(group_size=32, bits=4)
SPARK = dict(
    model_type="spark2_5",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
    sliding_window=16,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
)
KEYS = ["all-linear", "model.embed_tokens", "lm_head"]


def adapted(config, method, quantize, size=0.05, **changes):
    model = make_model(config, quantize=quantize, **changes)
    accelerate(model)
    attach(model, AdapterConfig(method=method, rank=4, num_layers=2, keys=KEYS))
    shake(model, size=size)
    return model


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "moe"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("quantize", [None, Q4], ids=["dense", "4-bit"])
def test_fused_floats_compute_the_same_as_the_adapter(config, method, quantize, tokens):
    model = adapted(config, method, quantize)
    live = model(tokens)
    reports = fuse(model, dtype="float32")
    assert not adapters_on(model) and all(r.survives and r.storage == "float32" for r in reports)
    assert_close(model(tokens), live, 2e-5)


@pytest.mark.parametrize("mode", [Q4, dict(group_size=64, bits=3), dict(mode="mxfp4"), dict(mode="nvfp4")], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_quantized_base_keeps_the_adapter_by_default(method, mode, tokens):
    model = adapted(LLAMA, method, mode)
    live = model(tokens)
    adapter = extract(model)
    mount(model, adapter)
    reports = fuse(model)
    assert all(r.survives for r in reports), reports
    assert {r.storage for r in reports} <= {"8-bit", "float32"}
    base = make_model(LLAMA, quantize=mode)
    accelerate(base)
    effect = relative(base(tokens), live)
    assert relative(model(tokens), live) < 0.1 * effect, "more than a tenth of the adapter's effect is lost"
    untouched = model.layers[0].mlp.up_proj
    assert is_quantized(untouched) and untouched.bits == mode.get("bits", 4)


def test_a_small_update_is_stored_as_floats(tokens):
    model = adapted(LLAMA, "lora", Q4, size=0.0005)
    live = model(tokens)
    reports = fuse(model)
    assert {r.storage for r in reports} == {"float32"} and all(r.survives for r in reports)
    assert_close(model(tokens), live, 2e-5)


def test_four_bits_need_force_and_are_reported_as_a_loss(tokens):
    model = adapted(LLAMA, "lora", Q4, size=0.001)
    with pytest.raises(ConfigError, match="4 bits"):
        fuse(model, bits=4)
    assert adapters_on(model), "the refused call removed the adapters"
    reports = fuse(model, bits=4, force=True)
    assert {r.storage for r in reports} == {"4-bit"}
    assert not any(r.survives for r in reports) and min(r.cosine for r in reports) < 0.5


def test_dequantize_leaves_nothing_quantized(tokens):
    model = adapted(LLAMA, "dora", Q4)
    live = model(tokens)
    fuse(model, dequantize=True)
    assert not any(is_quantized(m) for m in model.modules())
    assert_close(model(tokens), live, 2e-5)


@pytest.mark.parametrize("keys", [["out_proj"], ["out_proj", "model.embedding"]], ids=["free", "adapted"])
@pytest.mark.skipif(find_spec("mlx_lm.models.spark2_5") is None, reason="this mlx-lm has no spark2_5")
def test_dequantize_includes_modules_named_like_the_slot_of_an_adapter(keys, tokens):
    """spark2_5 calls its embedding ``embedding``, the attribute in which an adapter layer holds its base."""
    model = make_model(SPARK, quantize=Q4)
    attach(model, AdapterConfig(rank=4, keys=keys))
    shake(model)
    live = model(tokens)
    fuse(model, dequantize=True)
    assert not any(is_quantized(m) for m in model.modules())
    assert_close(model(tokens), live, 2e-5)


def test_dequantize_includes_modules_named_linear(tokens):
    """phixtral calls its head's matrix ``linear``."""

    class Head(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def __call__(self, x):
            return self.linear(x)

    model = make_model(quantize=Q4)
    model.lm_head = Head(model.lm_head)
    attach(model, AdapterConfig(rank=4, keys=["q_proj"]))
    fuse(model, dequantize=True)
    assert not any(is_quantized(m) for m in model.modules())


def test_half_precision_reports_what_it_rounds():
    model = make_model()
    model.set_dtype(mx.bfloat16)
    attach(model, AdapterConfig(rank=4, keys=["up_proj"]))
    shake(model, size=0.0002)
    reports = fuse(model)
    assert {r.storage for r in reports} == {"bfloat16"}
    assert all(0.0 < r.relative_error < 2 and r.update_norm < 0.02 for r in reports)


@pytest.mark.parametrize(
    "arguments",
    [dict(bits=7), dict(bits=8, dequantize=True), dict(dtype="int8"), dict(bits=8)],
    ids=["bits", "both", "dtype", "dense base"],
)
def test_contradictions_are_refused(arguments):
    model = adapted(LLAMA, "lora", None)
    with pytest.raises(ConfigError):
        fuse(model, **arguments)
    assert adapters_on(model)
