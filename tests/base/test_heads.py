"""Whether the output head is tied: by the config, transformers' defaults and the checkpoint's tensors."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_lora.base.loading import load_base
from mlx_lora.base.names import BaseModel

TINY = Path(__file__).resolve().parents[2] / "mlx_lora/tiny_base"
LLAMA = dict(
    model_type="llama",
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=1027,
    rms_norm_eps=1e-5,
)
GEMMA = {**LLAMA, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 2}
GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32, n_ctx=32, vocab_size=1027)
GPT2 |= {"layer_norm_epsilon": 1e-5}
HEAD = "lm_head.weight"


def checkpoint(folder: Path, config: dict, head: str | None) -> Path:
    """A random model whose head is ``other`` than its embedding, the ``same``, or None."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    mx.random.seed(1)
    model = BaseModel(folder).model
    arrays = {name: mx.random.normal(array.shape) for name, array in tree_flatten(model.parameters())}
    embedding = arrays[next(name for name in arrays if "embed" in name or "wte" in name)]
    if head:
        arrays[HEAD] = embedding + 0 if head == "same" else mx.random.normal(embedding.shape)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model) -> np.ndarray:
    return np.array(model(mx.array([[3, 9, 27]])).astype(mx.float32))


def expected(model, folder: Path) -> np.ndarray:
    """The logits from the checkpoint's own head."""
    return np.array(model.model(mx.array([[3, 9, 27]])) @ mx.load(str(folder / "model.safetensors"))[HEAD].T)


@pytest.mark.parametrize("flag", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_a_head_with_another_weight_is_used_whatever_the_flag(tmp_path, flag):
    folder = checkpoint(tmp_path / "m", {**LLAMA, **flag}, "other")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_base(folder)[0]
    assert ("a head with another weight" in " ".join(str(w.message) for w in caught)) is flag.get(
        "tie_word_embeddings", False
    )
    assert np.allclose(logits(model), expected(model, folder), atol=1e-4)
    assert not BaseModel(folder).tied


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "tie_word_embeddings": True}, GEMMA, GPT2])
def test_without_a_head_the_embedding_is_used(tmp_path, config):
    folder = checkpoint(tmp_path / "m", config, None)
    assert HEAD not in dict(tree_flatten(load_base(folder)[0].parameters()))
    assert BaseModel(folder).tied


@pytest.mark.parametrize("config", [{**LLAMA, "tie_word_embeddings": True}, GEMMA, GPT2])
def test_a_copy_of_the_embedding_as_head_is_tied(tmp_path, config):
    folder = checkpoint(tmp_path / "m", config, "same")
    assert HEAD not in dict(tree_flatten(load_base(folder)[0].parameters()))
    assert BaseModel(folder).tied


@pytest.mark.parametrize(
    ("config", "tied"),
    [(LLAMA, False), (GEMMA, True), ({"model_type": "qwen2"}, False), ({"model_type": "minicpm3"}, True)],
)
def test_without_weights_transformers_default_is_used(tmp_path, config, tied):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert BaseModel(tmp_path).tied is tied


def test_the_text_part_of_a_vision_language_model_gets_the_same_flag(tmp_path):
    config = {"model_type": "gemma3", "text_config": {**GEMMA, "model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"),
        {"lm_head.weight": mx.ones((2, 2)), "model.language_model.embed_tokens.weight": mx.zeros((2, 2))},
    )
    found = BaseModel(tmp_path)
    assert not found.tied
    assert found.config["text_config"]["tie_word_embeddings"] is False
