"""Merging an update that changes a tied embedding and the output head differently: the model gets a head of its own."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from conftest import LLAMA, assert_close, make_model, shake
from mlx_lora import AdapterConfig, attach, extract, fuse, load, mount, save_model
from mlx_lora.base.modules import is_quantized
from mlx_lora.base.origin import Base, base_of, set_base
from mlx_lora.errors import ConfigError
from mlx_lora.merge.combine import merge_adapters
from mlx_lora.model.multi import MultiLoRA
from mlx_lora.model.state import split_of

TIED = {**LLAMA, "tie_word_embeddings": True}
QUANTIZED = dict(group_size=32, bits=4)
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA3 = {**GEMMA2, "model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}
QWEN3 = {**TIED, "model_type": "qwen3", "head_dim": 16}
SIDES = {
    "head": dict(keys=["lm_head"]),
    "embedding": dict(keys=["embed_tokens"], embedding_side="input"),
    "both apart": dict(keys=["lm_head", "embed_tokens"], embedding_side="input"),
}


def adapted(config: dict, settings: dict, quantize: dict | None = None):
    model = make_model(config, quantize=quantize)
    if config["model_type"] == "gemma3_text":  # as mlx-lm's sanitize leaves a checkpoint without a head
        model.tie_word_embeddings = True
        model.pop("lm_head")
    attach(model, AdapterConfig(rank=4, **settings))
    shake(model)
    return model


@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4-bit"])
@pytest.mark.parametrize("settings", SIDES.values(), ids=list(SIDES))
@pytest.mark.parametrize("config", [TIED, QWEN3, GEMMA3], ids=lambda c: c["model_type"])
def test_the_model_gets_a_head(config, settings, quantize, tokens):
    model = adapted(config, settings, quantize)
    live = model(tokens)
    fuse(model, dtype="float32")
    assert_close(model(tokens), live, 3e-5)
    assert split_of(model) is None and "lm_head" in model
    assert model.model.embed_tokens.weight is not model.lm_head.weight


def test_dequantizing_covers_the_head_that_was_split_off(tokens):
    model = adapted(TIED, SIDES["embedding"], QUANTIZED)
    fuse(model, dequantize=True)
    assert not any(is_quantized(module) for module in model.modules())


def test_a_model_without_a_head_of_its_own_is_refused_and_unchanged(tokens):
    model = adapted(GEMMA2, SIDES["head"])
    live = model(tokens)
    with pytest.raises(ConfigError, match="gemma2 models have one matrix for both"):
        fuse(model)
    assert mx.array_equal(model(tokens), live).item() and "lm_head" not in model


def test_an_untied_model_is_saved_and_loaded_as_such(tmp_path, shared):
    path = shared / "data" / "stories260K"
    model, tokenizer = load(path)
    ids = mx.array([tokenizer.encode("Once upon a time")])
    attach(model, AdapterConfig(rank=4, keys=["lm_head", "q_proj"]))
    shake(model)
    live, before = model(ids), base_of(model).config
    fuse(model, dtype="float32")
    again, _ = load(save_model(model, tmp_path / "fused"))
    assert before["tie_word_embeddings"] and not base_of(again).config["tie_word_embeddings"]
    assert_close(again(ids), live, 3e-5)


def test_a_split_that_nothing_uses_is_joined_again(tokens):
    model = make_model(TIED)
    set_base(model, Base("x", None, {"tie_word_embeddings": True}))
    attach(model, AdapterConfig(rank=4, keys=[r".*(q_proj|lm_head_of_another_model)"]))
    fuse(model)
    assert split_of(model) is None and "lm_head" not in model and base_of(model).config["tie_word_embeddings"]


def made_on(keys: list[str], rank: int, tokens: mx.array):
    """(an adapter of a tied model, the logits with it)."""
    model = make_model(TIED)
    attach(model, AdapterConfig(rank=rank, keys=keys))
    shake(model, size=0.2)
    return extract(model), model(tokens)


def test_several_adapters_one_of_them_on_a_tied_head(tokens):
    """One adapter per row: none, on the tied head, on a projection."""
    model = make_model(TIED)
    names, expected, adapters = [None, "head", "query"], {None: model(tokens)}, {}
    for name, keys, rank in (("head", ["lm_head"], 6), ("query", ["q_proj"], 2)):
        adapters[name], expected[name] = made_on(keys, rank, tokens)
    several = MultiLoRA(model, adapters)
    for name in names:
        several.choose([name])
        assert_close(model(tokens), expected[name], 1e-5, str(name))
    several.choose(names)
    rows = model(mx.concatenate([tokens[:1]] * 3))
    for row, name in zip(rows, names, strict=True):
        assert_close(row, expected[name][0], 1e-5, str(name))
    several.unmount()
    assert mx.array_equal(model(tokens), expected[None]).item() and split_of(model) is None


def test_adapters_of_a_tied_head_merge_with_others(tokens):
    """The merged adapter computes what both do: first the projections change what the head reads, then the head."""
    query, with_query = made_on(["q_proj"], 4, tokens)
    head, _ = made_on(["lm_head"], 4, tokens)
    merged = merge_adapters([query, head], method="cat")
    assert merged.config.embedding_side == "input" and set(merged.modules) == {*query.modules, *head.modules}
    model = make_model(TIED)
    mount(model, replace(merged, weights={n: w for n, w in merged.weights.items() if "lm_head" not in n}))
    assert_close(model(tokens), with_query, 1e-5)
    mount(model, merged)
    assert mx.abs(model(tokens) - with_query).max().item() > 1e-3
