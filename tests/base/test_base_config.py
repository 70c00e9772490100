"""Adding transformers 4's fields to configs of transformers 5, and what mlx-lm builds from them."""

from __future__ import annotations

import copy

import pytest

import mlx_lora  # noqa: F401  (opens a BLAS before MLX is imported)
from mlx_lora.base.config import missing_fields

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TYPES = [*["sliding_attention"] * 5, "full_attention"] * 2


def gemma3(**changes):
    return {"model_type": "gemma3_text", "rope_parameters": GEMMA3, "layer_types": TYPES, **changes}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": None},
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False},
        {"model_type": "phi3", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"}},
        {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        {"model_type": "gemma3", "text_config": {"rope_theta": 1e6, "rope_scaling": {"factor": 8.0}}},
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts": 8},
        {"model_type": "llama", "rope_parameters": None},
        {},
    ],
)
def test_configs_of_transformers_4_are_unchanged(config):
    assert missing_fields(config) == {}


@pytest.mark.parametrize(
    ("rope", "added"),
    [
        (DEFAULT, {"rope_theta": 500000.0, "rope_scaling": None}),
        ({**DEFAULT, "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5, "rope_scaling": None}),
        (LLAMA3, {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}),
        (YARN, {"rope_theta": 1e6, "rope_scaling": {**YARN, "type": "yarn"}}),
        ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
    ],
    ids=["default", "partial", "llama3", "yarn", "no-type"],
)
def test_flat_rope_parameters(rope, added):
    config = {"model_type": "llama", "rope_parameters": rope}
    before = copy.deepcopy(config)
    found = missing_fields(config)
    assert config == before
    assert found == {"rope_theta": rope["rope_theta"]} | added
    assert missing_fields({**config, **found}) == {}


def test_stated_fields_stay_except_a_contradicted_theta():
    """transformers 5 reads rope_parameters, and rope_scaling instead if it is set."""
    config = {"rope_parameters": LLAMA3, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert missing_fields(config) == {"rope_theta": 500000.0}
    assert missing_fields({"rope_parameters": DEFAULT, "rope_theta": 500000.0}) == {"rope_scaling": None}
    # null counts as missing.
    assert missing_fields({"rope_parameters": YARN, "rope_scaling": None})["rope_scaling"]["type"] == "yarn"


def test_gemma3_keeps_its_two_settings():
    assert missing_fields(gemma3()) == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_window_pattern": 6,
    }
    plain = {**GEMMA3, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert "rope_scaling" not in missing_fields(gemma3(rope_parameters=plain))


def test_gemma4_gets_no_rope_scaling():
    """mlx-lm's class reads both settings. With a rope_scaling, transformers would ignore both."""
    rope = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    found = missing_fields({"model_type": "gemma4_text", "rope_parameters": rope})
    assert found == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}


def test_one_of_two_settings_may_be_absent():
    assert missing_fields({"rope_parameters": {"full_attention": {"rope_theta": 3.0}, "sliding_attention": None}}) == {
        "rope_theta": 3.0
    }


@pytest.mark.parametrize(
    ("types", "pattern"),
    [
        (TYPES, 6),
        (["sliding_attention", "full_attention"], 2),
        (["sliding_attention", "full_attention", "sliding_attention"], 2),
        (["full_attention", "sliding_attention"], None),  # no pattern that sliding_window_pattern can express
        (["sliding_attention"] * 4, None),
        (["full_attention"] * 4, None),
        (None, None),
    ],
)
def test_sliding_window_pattern(types, pattern):
    assert missing_fields({"layer_types": types}).get("sliding_window_pattern") == pattern


def test_text_config_of_a_vision_model():
    config = {"model_type": "gemma3", "text_config": gemma3(hidden_size=7), "vision_config": {"hidden_size": 3}}
    found = missing_fields(config)
    assert found.keys() == {"text_config"}
    assert found["text_config"] == gemma3(hidden_size=7) | missing_fields(gemma3())


def test_renamed_fields():
    assert missing_fields({"num_local_experts": 8}) == {"num_experts": 8}
    assert missing_fields({"n_positions": 1024}) == {"n_ctx": 1024}
    rope = {**DEFAULT, "partial_rotary_factor": 0.25}
    found = missing_fields({"model_type": "gpt_neox", "rope_parameters": rope})
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (500000.0, 0.25)


@pytest.mark.parametrize(("rope", "kind"), [(DEFAULT, "RoPE"), (LLAMA3, "Llama3RoPE"), (YARN, "YarnRoPE")])
def test_mlx_lm_builds_the_right_rotary_embedding(rope, kind):
    from mlx_lm.models import llama

    sizes = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 8}
    sizes |= {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 8, "max_position_embeddings": 131072}
    config = {**sizes, "rope_parameters": rope}
    built = llama.Model(llama.ModelArgs.from_dict({**config, **missing_fields(config)})).layers[0].self_attn.rope
    assert type(built).__name__ == kind
    bare = llama.Model(llama.ModelArgs.from_dict(config)).layers[0].self_attn.rope
    assert type(bare).__name__ == "RoPE" and bare.base == 10000  # what mlx-lm builds without the added fields
    if kind == "RoPE":
        assert built.base == 500000.0
