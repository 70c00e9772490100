"""The peak that a plan predicts against the peak of the training itself, for random models of several families."""

from __future__ import annotations

import gc
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, QWEN3_MOE, make_model
from mlx_lora.base.names import BaseModel
from mlx_lora.config import AdapterConfig, OptimizerConfig, TrainConfig, preference_of
from mlx_lora.data import Dataset, Example
from mlx_lora.data.preferences import LabelDataset, Labelled, Pair, PairDataset
from mlx_lora.planning.estimate import estimate
from mlx_lora.planning.layers import frozen_bytes, repeats, shortened
from mlx_lora.planning.machines import Variant
from mlx_lora.planning.rows import epoch_of
from mlx_lora.training import build_optimizer, train
from mlx_lora.training.reference import ready

SIZES = dict(hidden_size=256, intermediate_size=704, vocab_size=2000, num_attention_heads=8, num_key_value_heads=4)
DENSE = {**LLAMA, **SIZES, "num_hidden_layers": 3, "max_position_embeddings": 1024}
MOE = {**QWEN3_MOE, **SIZES, "num_experts": 8, "moe_intermediate_size": 256}
GEMMA = dict(DENSE, model_type="gemma2", head_dim=32, sliding_window=64, query_pre_attn_scalar=32, num_hidden_layers=2)
QWEN3 = dict(DENSE, model_type="qwen3", head_dim=32)
PHI3 = dict(DENSE, model_type="phi3")
LONG = dict(DENSE, max_position_embeddings=2048)  # attention in blocks
GEMMA3 = dict(
    LONG, model_type="gemma3_text", head_dim=32, sliding_window=256, sliding_window_pattern=2, num_hidden_layers=2,
    query_pre_attn_scalar=32, rope_local_base_freq=10000.0,
)  # fmt: skip
LATENT = dict(
    LONG, model_type="minicpm3", q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16,
    num_key_value_heads=8, dim_model_base=256, scale_depth=1.4, scale_emb=12, rope_scaling={}, num_hidden_layers=2,
)  # fmt: skip
EXPERTS = ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"]
LORA = dict(rank=8, num_layers=-1)
FOUR = dict(bits=4, group_size=64)
# name: (config, adapter, tokens in a row, train, quantization)
CASES = {
    "batch 4": (DENSE, LORA, 128, dict(batch_size=4), None),
    "long rows": (DENSE, LORA, 384, dict(batch_size=1), None),
    "short rows": (DENSE, LORA, 32, dict(batch_size=16), None),
    "checkpointing": (DENSE, LORA, 192, dict(batch_size=4, grad_checkpoint=True), None),
    "accumulation": (DENSE, LORA, 160, dict(batch_size=2, grad_accumulation_steps=2), None),
    "packing": (DENSE, LORA, 96, dict(batch_size=1, pack=True), None),
    "dora": (DENSE, dict(LORA, method="dora"), 160, dict(batch_size=2), None),
    "vera": (DENSE, dict(method="vera", rank=64, num_layers=-1), 160, dict(batch_size=2), None),
    "full": (DENSE, dict(method="full", num_layers=-1), 64, dict(batch_size=2), None),
    "4-bit": (DENSE, LORA, 160, dict(batch_size=2), FOUR),
    "4-bit, checkpointing": (QWEN3, LORA, 160, dict(batch_size=2, grad_checkpoint=True), FOUR),
    "last layer": (DENSE, dict(rank=8, num_layers=1), 192, dict(batch_size=4), None),
    "dropout": (DENSE, dict(LORA, dropout=0.1), 128, dict(batch_size=4), None),
    "large vocabulary": (dict(DENSE, vocab_size=24000), LORA, 128, dict(batch_size=2), None),
    "experts": (MOE, dict(LORA, keys=EXPERTS), 160, dict(batch_size=2), None),
    "gemma2": (GEMMA, LORA, 160, dict(batch_size=2), None),
    "blocks": (LONG, LORA, 1024, dict(batch_size=1), None),
    "blocks, sliding window": (GEMMA3, LORA, 1024, dict(batch_size=1), None),
    "blocks, latent attention": (LATENT, LORA, 768, dict(batch_size=1), None),
    "dpo": (DENSE, LORA, 128, dict(batch_size=2, loss="dpo"), None),
    "orpo": (DENSE, LORA, 128, dict(batch_size=2, loss="orpo"), None),
    "kto": (DENSE, LORA, 128, dict(batch_size=4, loss="kto"), None),
    "phi3": (PHI3, dict(LORA, modules_to_save=["lm_head"]), 160, dict(batch_size=2), None),
    "12 layers, checkpointing": (
        dict(DENSE, num_hidden_layers=12),
        LORA,
        128,
        dict(batch_size=2, grad_checkpoint=True),
        None,
    ),
    "12 layers": (dict(DENSE, num_hidden_layers=12), dict(rank=8, num_layers=6), 96, dict(batch_size=2), None),
}


def rows(count: int, length: int, loss: str = "cross_entropy") -> Dataset:
    """Rows of ``length`` tokens, as the loss takes them."""
    random, mask = np.random.RandomState(0), np.arange(length) > 0
    tokens = random.randint(1, 90, (2 * count, length)).astype(np.int32)
    examples = [Example(row, mask) for row in tokens]
    if preference_of(loss).rows == "pairs":
        return PairDataset([Pair(*one, other) for one, other in zip(examples[::2], examples[1::2], strict=True)])
    if preference_of(loss).rows == "labels":
        return LabelDataset([Labelled(*one, k % 2 == 0, 1, one.tokens[1:]) for k, one in enumerate(examples[:count])])
    return Dataset(examples[:count])


def measured(config, adapter, data, settings, quantize) -> int:
    model = make_model(config, quantize=quantize)
    if quantize:  # as loading does on a CPU
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    mlx_lora.attach(model, AdapterConfig(**adapter))
    optimizer = build_optimizer(OptimizerConfig(), 4, model)
    gc.collect()
    mx.clear_cache()
    data = ready(model, data, settings, "train")
    *_, done = train(model, optimizer, data, None, settings)
    return round(done.peak_memory * 1e9)


def predicted(folder, config, adapter, data, settings, quantize) -> int:
    quantization = {"quantization": quantize} if quantize else {}
    (folder / "config.json").write_text(json.dumps({**config, **quantization}))
    variant = Variant(AdapterConfig(**adapter), settings, length=epoch_of(data, settings).longest)
    return estimate(BaseModel(folder), OptimizerConfig(), variant, gpu=False).parts.peak


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(name, tmp_path):
    config, adapter, length, options, quantize = CASES[name]
    settings = TrainConfig(iters=2, val_batches=0, **options)
    data = rows(8, length, settings.loss)
    data.summary = data.summary.__class__(**{**vars(data.summary), "limit": 2 * length})
    gc.collect()
    left = mx.get_active_memory()
    guess = predicted(tmp_path, config, adapter, data, settings, quantize)
    assert mx.get_active_memory() - left < 1e6, "planning took memory"
    peak = measured(config, adapter, data, settings, quantize) - left
    assert guess == pytest.approx(peak, rel=0.15), f"{name}: predicted {guess / 1e6:.1f} MB, measured {peak / 1e6:.1f}"


def test_equal_layers_are_extrapolated_to_what_all_of_them_take(tmp_path, monkeypatch):
    config = dict(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=14)
    data, settings = rows(4, 64), TrainConfig(batch_size=2)
    adapter = dict(rank=8, num_layers=9)
    few = predicted(tmp_path, config, adapter, data, settings, None)
    monkeypatch.setattr("mlx_lora.planning.estimate.repeats", lambda model: [])
    assert few == pytest.approx(predicted(tmp_path, config, adapter, data, settings, None), rel=0.05)


LARGE = dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, vocab_size=32000)
EXTRAPOLATED = {  # sizes as of real models: where all arrays are small, MLX holds those of several layers at once
    "dense": (dict(QWEN3 | LARGE, head_dim=128, num_hidden_layers=20), 10),
    "hybrid": (dict(GEMMA3 | LARGE, head_dim=128, num_hidden_layers=24), 12),
    "experts": (dict(MOE | LARGE, head_dim=128, num_hidden_layers=20), 12),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRAPOLATED)
def test_the_peak_of_few_layers_leads_to_that_of_all_of_them(name, tmp_path, monkeypatch):
    config, layers = EXTRAPOLATED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    variant = Variant(AdapterConfig(rank=8, num_layers=layers), TrainConfig(batch_size=2), length=1024)
    few = estimate(BaseModel(tmp_path), OptimizerConfig(), variant, gpu=True).parts
    monkeypatch.setattr("mlx_lora.planning.estimate.repeats", lambda model: [])
    every = estimate(BaseModel(tmp_path), OptimizerConfig(), variant, gpu=True).parts
    assert few.peak == pytest.approx(every.peak, rel=0.01)
    assert (few.weights, few.adapter, few.optimizer) == (every.weights, every.adapter, every.optimizer)


def test_frozen_layers_before_all_that_is_trained_take_their_weights_alone():
    model = make_model(dict(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=14))
    mlx_lora.attach(model, AdapterConfig(rank=2, num_layers=6))
    frozen, trained = repeats(model)
    assert frozen_bytes(model, frozen) == sum(a.nbytes for _, a in tree_flatten(model.layers[0].parameters()))
    assert frozen_bytes(model, trained) is None
    model.model.embed_tokens.unfreeze()  # a gradient now passes every layer
    assert frozen_bytes(model, frozen) is None


def test_checkpointed_layers_are_extrapolated_for_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(dict(DENSE, num_hidden_layers=16)))
    adapter, settings = AdapterConfig(rank=8, num_layers=-1), TrainConfig(batch_size=1, grad_checkpoint=True)
    variant = Variant(adapter, settings, length=256)
    few = estimate(BaseModel(tmp_path), OptimizerConfig(), variant, gpu=True).parts.peak
    monkeypatch.setattr("mlx_lora.planning.estimate.repeats", lambda model: [])
    every = estimate(BaseModel(tmp_path), OptimizerConfig(), variant, gpu=True).parts.peak
    assert few == pytest.approx(every, rel=0.15)


def test_a_model_is_shortened_by_its_equal_layers_and_put_back():
    model = make_model(dict(DENSE, hidden_size=64, intermediate_size=128, num_hidden_layers=14))
    mlx_lora.attach(model, AdapterConfig(rank=2, num_layers=6))
    runs = repeats(model)
    assert runs == [(0, 1, 8), (8, 1, 6)]
    ids = [id(layer) for layer in model.layers]
    with shortened(model, runs, [2, 3]):
        assert [ids.index(id(layer)) for layer in model.layers] == [0, 1, 8, 9, 10]
    assert [id(layer) for layer in model.layers] == ids
