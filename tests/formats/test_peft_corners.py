"""PEFT's folders at the edges: heads of other names, rows of tokens by PEFT's names, damaged arrays, names kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, attach, extract, load_adapter, mount, save_adapter
from mlx_lora.adapter import Adapter
from mlx_lora.errors import AdapterError, FormatError
from mlx_lora.merge.export import export_merged

import mlx.core as mx  # isort: skip  (mlx_lora opens a BLAS before MLX is imported)
import numpy as np

from conftest import assert_close, make_model, shake
from mlx_lora.base.names import BaseModel
from mlx_lora.base.origin import Base, set_base

PEFT = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
INPUT = mx.array(np.load(PEFT / "input_ids.npy"))
GPT_NEOX = {
    **dict(model_type="gpt_neox", hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=64),
    **dict(max_position_embeddings=64, layer_norm_eps=1e-5, rotary_emb_base=10000, rotary_pct=0.5),
}


def load(model: str):
    return mlx_lora.load(PEFT / model / "base", dtype="float32")[0]


def logits(model) -> np.ndarray:
    return np.array(model(INPUT).astype(mx.float32))


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edited(name: str | Path, folder: Path, change=lambda arrays: arrays, **changes) -> Path:
    """A copy of a fixture with other settings and arrays."""
    folder = shutil.copytree(PEFT / name, folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config(folder), **changes}))
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), change(arrays))
    return folder


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt_neox(tmp_path):
    """A model of mlx-lm's whose head is ``embed_out``, and its folder."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(GPT_NEOX))
    model = make_model(GPT_NEOX)
    set_base(model, Base(name=str(tmp_path / "base"), folder=tmp_path / "base", config=GPT_NEOX))
    return model, tmp_path / "base"


@pytest.mark.parametrize("theirs", ["lm_head", "embed_out"])
def test_the_head_of_gpt_neox_has_a_name_in_every_version_of_transformers(theirs, gpt_neox):
    base = BaseModel(gpt_neox[1])
    assert base.to_mlx(theirs) == "model.embed_out"
    assert base.to_hf("model.embed_out") == "lm_head"  # the name since transformers 5
    assert not base.tied


@pytest.mark.parametrize(
    ("settings", "field"),
    [(dict(keys=["embed_out"]), "target_modules"), (dict(modules_to_save=["embed_out"]), "modules_to_save")],
    ids=["adapted", "saved"],
)
def test_a_head_of_another_name_through_a_peft_folder(settings, field, gpt_neox, tmp_path):
    model, base = gpt_neox
    attach(model, AdapterConfig(rank=2, **settings))
    shake(model)
    if field == "modules_to_save":
        model.model.embed_out.weight += 0.1
    expected, adapter = model(INPUT), extract(model)
    save_adapter(adapter, tmp_path / "peft", "peft", base=base)
    assert config(tmp_path / "peft")[field] == ["lm_head"]
    mount(model, load_adapter(tmp_path / "peft", base=base))
    assert_close(model(INPUT), expected, 1e-5)


@pytest.mark.parametrize("name", ["wte", "transformer.wte", None])
def test_rows_of_tokens_are_found_by_pefts_name_of_the_embedding(name, tmp_path):
    model, base = load("gpt2"), PEFT / "gpt2/base"
    attach(model, AdapterConfig(rank=2, keys=["attn.c_attn"], trainable_token_indices={"wte": [3, 5]}))
    shake(model)
    model.model.wte.trainable_tokens += 0.1
    expected, written = logits(model), tmp_path / "written"
    save_adapter(extract(model), written, "peft", base=base)
    if name:
        written = edited(written, tmp_path / "edited", trainable_token_indices={name: [3, 5]})
    again = load("gpt2")
    mount(again, load_adapter(written, base=base))
    assert_close(logits(again), expected, 1e-5)


def test_transformers_names_of_rows_of_tokens_are_recognised():
    path = "transformer.wte.trainable_tokens"
    adapter = Adapter(AdapterConfig(trainable_token_indices={"transformer.wte": [3]}), {path: mx.zeros((1, 32))})
    with pytest.raises(AdapterError, match="These are transformers' names: read the adapter with"):
        mount(load("gpt2"), adapter)


def test_names_of_the_user_are_kept_where_they_select_the_same(tmp_path):
    base = PEFT / "qwen2/base"
    save_adapter(load_adapter(PEFT / "qwen2/ia3", base=base), tmp_path / "ia3", "peft", base=base)
    before, after = config(PEFT / "qwen2/ia3"), config(tmp_path / "ia3")
    for field in ("feedforward_modules", "init_ia3_weights"):
        assert after[field] == before[field]
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    model = load("llama")
    attach(model, AdapterConfig(rank=2, keys=["q_proj"], modules_to_save=["input_layernorm"]))
    save_adapter(extract(model), tmp_path / "one", "peft")
    short = edited(tmp_path / "one", tmp_path / "two", modules_to_save=["input_layernorm"])
    adapter = load_adapter(short)
    save_adapter(adapter, tmp_path / "kept", "peft")
    assert config(tmp_path / "kept")["modules_to_save"] == ["input_layernorm"]
    path = next(iter(adapter.full_parameters))
    weights = {name: array for name, array in adapter.weights.items() if name != path}
    fewer = Adapter(adapter.config, weights, metadata=adapter.metadata)
    save_adapter(fewer, tmp_path / "fewer", "peft")
    left = sorted(name.removesuffix(".weight") for name in fewer.full_parameters)
    assert config(tmp_path / "fewer")["modules_to_save"] == left


def test_the_adapter_of_the_root_is_called_default(tmp_path):
    folder = shutil.copytree(PEFT / "llama/dora", tmp_path / "both")
    shutil.copytree(PEFT / "llama/dora", folder / "zwei")
    assert load_adapter(folder, adapter="default").weights.keys() == load_adapter(folder, adapter="zwei").weights.keys()
    with pytest.raises(FormatError, match=r"no adapter 'drei'(.|\n)*zwei, default"):
        load_adapter(folder, adapter="drei")


# -- damage ------------------------------------------------------------------------------------------------------------


def first_row(ending: str, axis: int = 0):
    """Cut the arrays of this ending to one row or column, which MLX would repeat."""
    cut = (slice(1),) if axis == 0 else (slice(None), slice(1))
    return lambda arrays: {n: w[cut] if n.endswith(ending) else w for n, w in arrays.items()}


@pytest.mark.parametrize(
    ("name", "change", "changes", "said"),
    [
        ("llama/adalora", first_row("lora_E"), {}, "their rank differs"),
        ("llama/adalora", None, {"init_r": 0}, "a rank of 0"),
        ("llama/loha", first_row("hada_w1_a"), {}, "their output size differs"),
        ("llama/loha", first_row("hada_w2_b", axis=1), {}, "their input size differs"),
        ("llama/loha", None, {"r": 0}, "a rank of 0"),
        ("llama/lokr", None, {"r": 0}, "a rank of 0"),
        ("mixtral/experts", None, {"target_parameters": None}, "target_parameters does not name"),
        ("mixtral/experts", None, {"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters does not name"),
    ],
)
def test_damaged_adapters_are_refused_by_name(name, change, changes, said, tmp_path):
    folder = edited(name, tmp_path / "damaged", change or (lambda arrays: arrays), **changes)
    with pytest.raises(FormatError, match=said):
        load_adapter(folder, base=PEFT / name.partition("/")[0] / "base")


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3"])
def test_numbers_that_mlx_lacks_are_named_with_the_way_to_cast_them(dtype, tmp_path):
    folder, size = shutil.copytree(PEFT / "llama/dora", tmp_path / "other"), 8 if dtype == "F64" else 1
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({key: {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 4 * size]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * size))
    with pytest.raises(FormatError, match=rf"q_proj.lora_A.weight is stored as {dtype}(.|\n)*tensor.float\(\)"):
        load_adapter(folder)


def test_parameters_of_experts_trained_in_full_are_refused_with_the_reason(tmp_path):
    key = "base_model.model.model.layers.0.mlp.experts.down_proj"
    folder = edited("mixtral/experts", tmp_path / "saved", lambda w: {**w, key: mx.zeros((4, 8, 8))})
    with pytest.raises(FormatError, match="not an array of LoRA"):
        load_adapter(folder, base=PEFT / "mixtral/base")
    (folder / "adapter_config.json").write_text(json.dumps({**config(folder), "modules_to_save": ["experts"]}))
    with pytest.raises(
        FormatError, match=r"trained in full \(modules_to_save\), but not the weight or bias of a layer"
    ):
        load_adapter(folder, base=PEFT / "mixtral/base")


def test_a_part_that_the_class_lacks_is_not_called_split(tmp_path):
    base = shutil.copytree(PEFT / "llama/base", tmp_path / "base")
    arrays = mx.load(str(base / "model.safetensors"))
    mx.eval(arrays)
    tower = "model.vision_tower.layers.0.attention.q_proj"
    model = mlx_lora.load(base, dtype="float32")[0]
    mx.save_safetensors(str(base / "model.safetensors"), {**arrays, f"{tower}.weight": mx.zeros((8, 8))})
    adapter = Adapter(AdapterConfig(rank=2), {f"{tower}.lora_a": mx.zeros((8, 2)), f"{tower}.lora_b": mx.zeros((2, 8))})
    with pytest.raises(AdapterError, match="lack the part of the model"):
        mount(model, adapter)


def test_rows_and_an_adapter_of_a_tied_head_are_refused_without_advice_for_training():
    model = load("qwen2")
    rows = {"model.embed_tokens.trainable_tokens": mx.zeros((1, 32))}
    head = {"lm_head.lora_a": mx.zeros((32, 2)), "lm_head.lora_b": mx.zeros((2, 64))}
    settings = AdapterConfig(rank=2, trainable_token_indices={"model.embed_tokens": [3]}, embedding_side="input")
    with pytest.raises(AdapterError, match=r"act on the tied output head(.|\n)*Use this adapter in PEFT"):
        mount(model, Adapter(settings, {**rows, **head}))


# -- other files -------------------------------------------------------------------------------------------------------


def test_whole_parameters_beside_a_rank_are_a_full_fine_tune(tmp_path):
    raw = {"num_layers": 1, "train_type": "full", "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    name = "model.layers.1.mlp.down_proj.weight"
    model = load("llama")
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {name: model.model.layers[1].mlp.down_proj.weight + 1})
    adapter = load_adapter(tmp_path)
    assert adapter.config.method == "full"
    before = logits(model)
    mount(model, adapter)
    assert not np.array_equal(logits(model), before)


def test_a_suffix_in_capitals_is_the_suffix(tmp_path):
    adapter = load_adapter(PEFT / "llama/dora", base=PEFT / "llama/base")
    with pytest.raises(FormatError, match=r"llama\.cpp cannot express this tokenizer"):  # only GGUF files ask for it
        export_merged(PEFT / "llama/base", adapter, tmp_path / "x.GGUF")
    assert not list(tmp_path.iterdir())
    shutil.copy(PEFT / "llama/dora/adapter_model.safetensors", tmp_path / "x.SAFETENSORS")
    from mlx_lora.formats.files import read_safetensors

    assert read_safetensors(tmp_path / "x.SAFETENSORS")
