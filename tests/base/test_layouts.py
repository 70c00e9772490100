"""Checkpoints in the layouts of transformers 5, written by hand: renamed and completed, or refused by name."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from conftest import LLAMA, QWEN3_MOE, make_model
from mlx_lora.base.classes import model_classes
from mlx_lora.base.differences import known_differences
from mlx_lora.base.fields import as_known_type, class_fields
from mlx_lora.base.files import check_weight_files
from mlx_lora.base.layouts import check_names, fit
from mlx_lora.base.loading import load_base
from mlx_lora.base.names import BaseModel
from mlx_lora.errors import ModelError

GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=32, n_ctx=32, vocab_size=40)
GPT2 |= dict(layer_norm_epsilon=1e-5)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_position_embeddings=64, num_hidden_layers=2)
IRREGULAR = ["full_attention", *["sliding_attention"] * 3]
NEOX = dict(model_type="gpt_neox", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
NEOX |= dict(max_position_embeddings=32, layer_norm_eps=1e-5, use_parallel_residual=True)
NEOX |= dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25})


def built(config: dict) -> nn.Module:
    """mlx-lm's model for ``config``, as loading builds it."""
    from mlx_lora.base.config import missing_fields

    model_class, arguments = model_classes(config)
    model = model_class(arguments.from_dict({**config, **missing_fields(config)}))
    mx.eval(model.parameters())
    return model


def arrays(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def loaded(config: dict, weights: dict[str, mx.array]) -> nn.Module:
    """A model that has read ``weights`` as mlx-lm's loader does."""
    model = built(config)
    found = model.sanitize(dict(weights))
    model.load_weights(list(found.items()))
    return model.eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    tokens = mx.array([[1, 5, 9, 33, 7, 20]])
    return mx.allclose(first(tokens), second(tokens), atol=1e-5).item()


def test_gpt2_with_a_prefix():
    whole = built(GPT2)
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    stored = {n: w.T if n.endswith(turned) else w for n, w in arrays(whole).items()}
    again = loaded(GPT2, {f"transformer.{name.removeprefix('model.')}": w for name, w in stored.items()})
    assert same(again, whole)


def test_the_loaded_model_is_of_mlx_lms_own_class():
    from mlx_lm.models import llama

    model = make_model()
    assert type(loaded(LLAMA, arrays(model))) is llama.Model


@pytest.mark.parametrize("width", [24, 80])
def test_gpt_neox_with_another_width_of_its_mlp(width):
    model = built(NEOX)
    stored = arrays(model)
    for i in range(2):
        up, down = f"model.h.{i}.mlp.dense_h_to_4h", f"model.h.{i}.mlp.dense_4h_to_h"
        stored |= {f"{up}.weight": mx.random.normal((width, 16)), f"{up}.bias": mx.zeros(width)}
        stored |= {f"{down}.weight": mx.random.normal((16, width))}
    again = loaded(NEOX, stored)
    assert again.layers[1].mlp.dense_h_to_4h.weight.shape == (width, 16)
    assert mx.isfinite(again(mx.array([[1, 2, 3]]))).all().item()


@pytest.mark.parametrize("kind", ["fused", "each", "as mlx-lm"])
def test_experts_in_any_layout(kind):
    model = make_model(QWEN3_MOE)
    stored = {}
    for name, array in arrays(model).items():
        block, _, leaf = name.partition(".switch_mlp.")
        if not leaf or kind == "as mlx-lm":
            stored[name] = array
        elif kind == "each":
            stored |= {f"{block}.experts.{i}.{leaf}": expert for i, expert in enumerate(array)}
        elif leaf.startswith("gate"):
            up = arrays(model)[name.replace("gate_proj", "up_proj")]
            stored[f"{block}.experts.gate_up_proj"] = mx.concatenate([array, up], axis=1)
        elif leaf.startswith("down"):
            stored[f"{block}.experts.down_proj"] = array
    assert same(loaded(QWEN3_MOE, stored), model)


def test_dense_experts_of_gpt_oss():
    config = dict(model_type="gpt_oss", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=40)
    config |= dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    config |= dict(rms_norm_eps=1e-5, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    model = built(config)
    mx.eval(model.parameters())
    stored = {}
    for name, array in arrays(model).items():
        block, _, leaf = name.partition(".experts.")
        if leaf.startswith("gate_proj"):  # gate and up interleaved; weights as [experts, in, out]
            both = mx.stack([array, arrays(model)[name.replace("gate_proj", "up_proj")]], axis=2)
            both = both.reshape(array.shape[0], -1, *array.shape[2:])
            ending = "gate_up_proj_bias" if leaf.endswith("bias") else "gate_up_proj"
            stored[f"{block}.experts.{ending}"] = both if leaf.endswith("bias") else both.swapaxes(1, 2)
        elif leaf == "down_proj.weight":
            stored[f"{block}.experts.down_proj"] = array.swapaxes(1, 2)
        elif leaf == "down_proj.bias":
            stored[f"{block}.experts.down_proj_bias"] = array
        elif not leaf:
            stored[name] = array
    assert same(loaded(config, stored), model)


def test_a_head_that_is_not_stored_is_the_embedding_and_biases_are_zeros():
    config = {**LLAMA, "tie_word_embeddings": False, "attention_bias": True}
    stored = {n: w for n, w in arrays(built(config)).items() if "lm_head" not in n and not n.endswith(".bias")}
    model = loaded(config, stored)
    assert mx.array_equal(model.lm_head.weight, model.model.embed_tokens.weight).item()
    assert not model.layers[0].self_attn.q_proj.bias.any().item()


def test_a_bias_that_is_missing_in_one_layer_is_refused():
    config = {**LLAMA, "attention_bias": True}
    stored = {n: w for n, w in arrays(built(config)).items() if n != "model.layers.1.self_attn.q_proj.bias"}
    with pytest.raises(ModelError, match=r"1 missing: model\.layers\.\*\.self_attn\.q_proj\.bias"):
        loaded(config, stored)


def test_left_over_missing_and_wrong_weights_are_said_at_once():
    model = make_model()
    weights = arrays(model)
    weights["model.layers.0.mlp.extra.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    weights["model.layers.1.extra.weight"] = mx.zeros((2, 2))
    weights["model.norm.weight"] = mx.zeros(3)
    with pytest.raises(ModelError) as caught:
        check_names(model, weights, "llama")
    message, hint = caught.value.message, caught.value.hint
    assert "2 left over: model.layers.*.mlp.extra.weight, model.layers.*.extra.weight" in message
    assert "1 missing: model.layers.*.mlp.up_proj.weight" in message
    assert "1 of another shape: model.norm.weight (is [3], must be [64])" in message
    assert "does not read this layout" in hint and "ownload" not in hint


def test_quantized_weights_are_left_to_mlx_lm():
    model = make_model()
    packed = {"transformer.x.weight": mx.zeros((2, 2), mx.uint32)}
    assert fit(model, packed) == packed


# -- config fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"model_type": "lfm2", "hidden_size": 64}, {"block_dim": 64}),
        ({"model_type": "lfm2", "hidden_size": 64, "block_dim": 32}, {}),
        ({"num_hidden_layers": 3}, {"num_layers": 3}),
        ({"num_local_experts": 8}, {"num_experts": 8}),
        ({"mlp_layer_types": ["dense", "sparse"]}, {"is_moe_layer": [False, True], "first_k_dense_replace": 1}),
        ({"model_type": "exaone4", "sliding_window_pattern": 4}, {"sliding_window_pattern": "LLLG"}),
        ({"model_type": "mamba2", "expand": 2, "hidden_size": 8}, {"intermediate_size": 16, "block_dim": 8}),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]},
            {
                "layer_types": ["mamba", "attention"],
                "position_embedding_type": "nope",
                "hybrid_layer_pattern": [0, 0],
            },
        ),
    ],
)
def test_class_fields(config, added):
    assert class_fields(config) == added


def test_only_fields_of_the_class_are_added():
    assert class_fields({"hidden_size": 64, "num_attention_heads": 4}, known={"head_dim"}) == {"head_dim": 16}


@pytest.mark.parametrize(("version", "tied"), [("5.1.0", False), ("4.57.0", True)])
def test_the_whole_config_decides_about_the_head_since_version_5(version, tied):
    text = {"model_type": "qwen3", "tie_word_embeddings": True}
    config = {"transformers_version": version, "tie_word_embeddings": False, "text_config": text}
    assert class_fields(config)["text_config"]["tie_word_embeddings"] is tied


def test_text_parts_are_read_by_the_class_of_the_whole_model():
    config = {"model_type": "qwen3_5_text", "vocab_size": 5}
    assert as_known_type(config) == {"model_type": "qwen3_5", "text_config": config, "vocab_size": 5}
    assert as_known_type({"model_type": "llama"}) == {"model_type": "llama"}


def test_missing_fields_of_a_class_are_named():
    _, arguments = model_classes({"model_type": "llama"})
    with pytest.raises(ModelError, match=r"needs config fields that are missing: .*hidden_size.*vocab_size"):
        arguments.from_dict({"model_type": "llama"})


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("exaone", "model.layers.0.self_attn.o_proj", "transformer.h.0.attn.attention.out_proj"),
        ("exaone", "model.layers.1.mlp.down_proj", "transformer.h.1.mlp.c_proj"),
        ("nanochat", "model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_q"),
    ],
)
def test_names_of_modules(kind, theirs, ours, tmp_path):
    config = {**LLAMA, "model_type": kind, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = BaseModel(tmp_path)
    assert base.to_mlx(theirs) == ours
    assert base.to_hf(ours) == theirs


# -- differences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768}, "the last 4096"),
        ({"model_type": "mistral", "sliding_window": None, "max_position_embeddings": 32768}, None),
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}, None),
        ({"model_type": "gpt_oss", "rope_parameters": {"rope_type": "yarn", "truncate": False}}, "YaRN"),
        ({"model_type": "gpt_oss", "rope_parameters": {"rope_type": "yarn"}}, None),
        ({"model_type": "glm", "rope_parameters": {"partial_rotary_factor": 1.0}}, None),
        ({"model_type": "glm"}, "rotates"),
        ({"model_type": "jamba", "num_experts": 16}, "normalizes"),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "hidden_act": "relu"}, "activation silu, the model relu"),
        ({"model_type": "gemma", "hidden_act": "gelu"}, None),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "activation gelu"),
        ({"model_type": "qwen2", **WINDOW, "max_window_layers": 0}, "the last 4"),
        ({"model_type": "qwen2", **WINDOW, "max_window_layers": 2}, None),
        ({"model_type": "qwen3", **WINDOW, "layer_types": ["full_attention"] * 2}, None),
        ({"model_type": "qwen3", **WINDOW, "layer_types": ["sliding_attention"] * 2}, "the last 4"),
        ({"model_type": "mixtral", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"model_type": "mixtral", "rope_parameters": {"rope_type": "default"}}, None),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "long"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 3}}, "cap"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "later tokens"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": False, "attn_logit_softcapping": None}, None),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "normalize"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": False}, None),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"model_type": "gpt_oss", "swiglu_limit": 1.0}, "swiglu_limit"),
    ],
)
def test_known_differences(config, fragment):
    found = known_differences(config)
    assert (not found) if fragment is None else (len(found) == 1 and fragment in found[0])


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model_type": "gemma2", "final_logit_softcapping": None}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "layer_types": IRREGULAR * 2, "num_hidden_layers": 8}, "layer_types"),
        ({"model_type": "cohere2", "layer_types": IRREGULAR * 2}, "layer_types"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 4, "num_hidden_layers": 4}, "num_"),
        ({"model_type": "gemma3_text", "layer_types": IRREGULAR[:2] * 2, "num_hidden_layers": 4}, "num_"),
    ],
)
def test_what_mlx_lm_cannot_compute_is_refused_before_the_model_is_built(config, field):
    with pytest.raises(ModelError, match=field):
        model_classes(config)
    with pytest.raises(ModelError, match=field):
        model_classes({"model_type": "gemma3", "text_config": config})


@pytest.mark.parametrize(("types", "pattern"), [(["full_attention"] * 2, 1), (IRREGULAR[1::-1] * 2, 2)])
def test_regular_layers_of_gemma3_are_computed(types, pattern):
    from mlx_lora.base.config import missing_fields

    config = {"model_type": "gemma3_text", "layer_types": types, "num_hidden_layers": len(types)}
    _, arguments = model_classes(config)
    assert arguments.from_dict({**config, **missing_fields(config)}).sliding_window_pattern == pattern


# -- files -------------------------------------------------------------------------------------------------------


def save(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def test_complete_files_are_accepted(tmp_path):
    save(tmp_path, LLAMA, {"x": mx.zeros(3)})
    check_weight_files("it", tmp_path)


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ({}, "has no weights", "ownload"),
        ({"pytorch_model.bin": b"x"}, "only as pickles", "save_pretrained"),
        ({"model.Q4.gguf": b"GGUF"}, "only as GGUF", "original model"),
        ({"adapter_model.safetensors": b"x"}, "holds an adapter", "as the adapter"),
        ({"consolidated.safetensors": b"x"}, "not named model", "Rename"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "pointer of Git LFS", "git lfs pull"),
        ({"model.safetensors": b"\x10\0\0\0\0\0\0\0{"}, "cut off or damaged", "ownload"),
    ],
)
def test_files_that_cannot_be_read(files, message, hint, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        check_weight_files("it", tmp_path)
    assert hint in caught.value.hint


def test_shards_that_are_missing_or_cut_are_all_named(tmp_path):
    names = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    mx.save_safetensors(str(tmp_path / names[0]), {"x": mx.zeros(1000)})
    (tmp_path / names[0]).write_bytes((tmp_path / names[0]).read_bytes()[:200])
    mx.save_safetensors(str(tmp_path / names[1]), {"y": mx.zeros(1000)})
    index = {"weight_map": dict(zip("xyz", names, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError) as caught:
        check_weight_files("it", tmp_path)
    assert names[2] in caught.value.message and f"{names[0]}: is cut off" in caught.value.message
    assert names[1] not in caught.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nothing"}, "mlx-lm has no nothing"),
        ({"model_type": "nothing", "auto_map": {"AutoModel": "code.Model"}}, "the code that comes with the model"),
        ({"model_type": "nothing", "text_config": {"model_type": "qwen3"}}, "whose language model is a qwen3"),
        ({"model_type": "llama"}, "needs config fields that are missing"),
    ],
)
def test_configs_that_mlx_lm_cannot_read(config, message, tmp_path):
    save(tmp_path / "it", config, {"x": mx.zeros(3)})
    with pytest.raises(ModelError, match=message) as caught:
        load_base(tmp_path / "it")
    assert "ownload the model" not in caught.value.hint


def test_a_known_difference_is_said_when_loading(tmp_path, shared):
    source = shared / "data" / "stories260K"
    config = {**json.loads((source / "config.json").read_text()), "model_type": "mistral", "sliding_window": 8}
    for file in source.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="the last 8"):
        load_base(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(source)


def test_text_weights_of_gemma3_with_vision_are_loaded():
    text = dict(num_hidden_layers=2, hidden_size=16, intermediate_size=24, head_dim=8, vocab_size=32)
    text |= dict(model_type="gemma3_text", sliding_window_pattern=2)
    config, ours = {"model_type": "gemma3", "text_config": text}, "language_model.model."
    weights = arrays(built(config))
    stored = {n.replace(ours, "model.language_model."): w for n, w in weights.items()}
    stored["lm_head.weight"] = stored.pop("language_model.lm_head.weight")
    found = arrays(loaded(config, stored))
    assert all(mx.array_equal(found[name], array).item() for name, array in weights.items())
