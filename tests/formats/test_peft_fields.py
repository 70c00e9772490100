"""PEFT's folders: fields that mean nothing here, embeddings of any name, what is refused and why.

The golden numbers are made by scripts/make_peft_fixtures.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, attach, extract, fuse, load_adapter, mount, save_adapter
from mlx_lora.adapter import Adapter
from mlx_lora.errors import AdapterError, FormatError, MLXLoRAError
from mlx_lora.formats.files import read_safetensors
from mlx_lora.formats.options import is_embedding
from mlx_lora.merge.export import export_merged

import mlx.core as mx  # isort: skip  (mlx_lora opens a BLAS before MLX is imported)
import numpy as np
from mlx.utils import tree_flatten

PEFT = Path(__file__).resolve().parents[1] / "fixtures" / "peft"
INPUT = mx.array(np.load(PEFT / "input_ids.npy"))


def load(model: str):
    return mlx_lora.load(PEFT / model / "base", dtype="float32")[0]


def logits(model) -> np.ndarray:
    return np.array(model(INPUT).astype(mx.float32))


def assert_equal(got: np.ndarray, expected: np.ndarray, tolerance: float = 5e-6) -> None:
    worst = float(np.abs(got - expected).max() / np.abs(expected).max())
    assert worst <= tolerance, f"max difference {worst:.2e}, tolerance {tolerance:.0e}"


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edited(name: str, folder: Path, rename=lambda name: name, **changes) -> Path:
    """A copy of a fixture with other settings, and its tensors renamed."""
    folder = shutil.copytree(PEFT / name, folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config(folder), **changes}))
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {rename(k): v for k, v in arrays.items()})
    return folder


# -- fields ------------------------------------------------------------------------------------------------------------

FIELDS = {
    "task_type": None,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "revision": "main",
    "megatron_core": "megatron.core",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "a_field_of_tomorrow": [1, {"x": 2}],
}


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
def test_fields_without_meaning_here_are_kept(native, tmp_path):
    adapter = load_adapter(edited("llama/lora", tmp_path / "theirs", **FIELDS))
    if native:
        adapter = load_adapter(save_adapter(adapter, tmp_path / "native"))
    written = config(save_adapter(adapter, tmp_path / "again", "peft"))
    assert {name: written.get(name) for name in FIELDS} == FIELDS
    unlike = {n for n, v in config(tmp_path / "theirs").items() if written.get(n) != v and v not in (None, False, {})}
    assert unlike <= {"target_modules", "peft_version"}  # modules by name and layer; what wrote the file


def test_fields_follow_the_adapter_as_it_is(tmp_path):
    changes = {"exclude_modules": ["v_proj"], "use_rslora": True, "init_lora_weights": "orthogonal"}
    adapter = load_adapter(edited("llama/lora", tmp_path / "a", layers_pattern="layers", **changes))
    adapter = replace(adapter, config=replace(adapter.config, scale=3.0))
    written = config(save_adapter(adapter, tmp_path / "b", "peft"))
    assert written["lora_alpha"] / written["r"] == 3 and written["init_lora_weights"] is True
    assert not {"exclude_modules", "layers_pattern", "use_rslora"} & written.keys()


def test_fields_of_another_method_are_left_out(tmp_path):
    adapter = load_adapter(edited("llama/loha", tmp_path / "a", rank_dropout=0.5, task_type="SEQ_CLS"))
    written = config(save_adapter(adapter, tmp_path / "b", "peft"))
    assert written["peft_type"] == "LORA" and written["task_type"] == "SEQ_CLS" and "rank_dropout" not in written


def test_an_adapter_made_here_says_what_it_is_for(tmp_path):
    adapter = replace(load_adapter(PEFT / "llama/lora"), metadata={})
    assert config(save_adapter(adapter, tmp_path / "a", "peft"))["task_type"] == "CAUSAL_LM"


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed_in", "tok_emb", "word_embeddings", "word_table"])
@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
def test_embeddings_are_recognised_by_their_keys(name, native, tmp_path):
    folder = edited("llama/embedding", tmp_path / "a", lambda key: key.replace("embed_tokens", name))
    adapter = load_adapter(folder)
    assert adapter.config.embedding_side == "input"
    if native:
        adapter = load_adapter(save_adapter(adapter, tmp_path / "native"))
        assert "mlx_lora" in config(tmp_path / "native")  # mlx-lm would adapt both sides
    again = read_safetensors(save_adapter(adapter, tmp_path / "b", "peft") / "adapter_model.safetensors")
    before = read_safetensors(folder / "adapter_model.safetensors")
    assert again.keys() == before.keys() and all(mx.array_equal(again[k], before[k]).item() for k in before)


def test_heads_and_parts_of_attention_are_no_embeddings():
    adapter = Adapter(AdapterConfig(), {})
    assert not is_embedding("embed_out", adapter) and not is_embedding("model.layers.0.self_attn.embed_q", adapter)
    assert is_embedding("model.embed_tokens", adapter) and is_embedding("model.wte", adapter)


def test_a_model_says_which_modules_are_embeddings(tmp_path):
    model = load("gpt2")
    attach(model, AdapterConfig(rank=2, keys=("wte", "c_attn")))
    names = read_safetensors(save_adapter(extract(model), tmp_path / "a", "peft", base=PEFT / "gpt2/base")
                             / "adapter_model.safetensors")  # fmt: skip
    assert "base_model.model.transformer.wte.lora_embedding_A" in names
    assert "base_model.model.lm_head.lora_A.weight" in names  # the update acts on both sides


def test_dora_of_an_embedding_is_refused_with_the_reason(tmp_path):
    folder = edited("llama/embedding", tmp_path / "a", use_dora=True)
    arrays = dict(read_safetensors(folder / "adapter_model.safetensors"))
    for path, size in (("model.embed_tokens", 32), *((f"model.layers.{i}.self_attn.q_proj", 64) for i in (0, 1))):
        arrays[f"base_model.model.{path}.lora_magnitude_vector"] = mx.ones(size)
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    with pytest.raises(FormatError, match="one magnitude per dimension"):
        load_adapter(folder)


# -- what is refused, and why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"peft_type": "OFT"}, "merge_and_unload"),
        ({"peft_type": "PROMPT_TUNING"}, "cannot be merged"),
        ({"peft_type": "XLORA"}, "cannot be merged"),
        ({"use_qalora": True}, "merge_and_unload"),
        ({"alora_invocation_tokens": [1]}, "cannot be merged"),
        ({"arrow_config": {"top_k": 2}}, "cannot be merged"),
        ({"use_qalora": True, "alora_invocation_tokens": [1]}, "cannot be merged"),
    ],
)
def test_the_hint_names_a_way_that_exists(changes, hint, tmp_path):
    with pytest.raises(FormatError) as error:
        load_adapter(edited("llama/lora", tmp_path / "a", **changes))
    assert hint in error.value.hint


def test_settings_of_the_backward_pass_are_ignored(tmp_path):
    """VeLoRA stores compressed activations for the backward pass; the update is LoRA's."""
    folder = edited("llama/lora", tmp_path / "a", velora_config={"num_groups": 4})
    arrays = dict(read_safetensors(folder / "adapter_model.safetensors"))
    arrays["base_model.model.model.layers.0.self_attn.q_proj.lora_velora_embed"] = mx.ones(4)
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    assert load_adapter(folder) == load_adapter(PEFT / "llama/lora")


def resized(adapter: Adapter) -> Adapter:
    """The adapter as if tokens had been added to the model that it was trained on."""
    name = "model.embed_tokens.lora_a"
    more = mx.concatenate([adapter.weights[name], adapter.weights[name][:4]])
    return replace(adapter, weights={**adapter.weights, name: more})


@pytest.mark.parametrize(
    ("base", "task", "hint"),
    [
        (None, None, "does not name it"),
        ("some/other", None, "trained on some/other, and this model is"),
        (str(PEFT / "llama/base"), None, "names this very model"),
        ("owner/base", None, "names this very model"),
        (str(PEFT / "llama/base"), "SEQ_CLS", "task_type is SEQ_CLS"),
    ],
)
def test_why_an_adapter_is_not_for_this_model(base, task, hint):
    adapter = resized(load_adapter(PEFT / "llama/embedding"))
    metadata = {**adapter.metadata, "peft": {"fields": {"task_type": task}}}
    model = load("llama")
    with pytest.raises(AdapterError, match="do not fit") as error:
        mount(model, replace(adapter, base=base, metadata=metadata))
    assert hint in error.value.hint and "mount it on that model" not in error.value.hint


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_base_of_other_sizes_is_refused_by_conversions(what, tmp_path):
    adapter = load_adapter(PEFT / "llama/lora")
    with pytest.raises(MLXLoRAError, match=r"lora_a \[32, 8\] and lora_b \[8, 64\] do not fit .*\(32 x 32\)") as error:
        if what == "read":
            load_adapter(PEFT / "llama/lora", base=PEFT / "qwen2/base")
        else:
            save_adapter(adapter, tmp_path / "a", "peft", base=PEFT / "qwen2/base")
    assert "trained on tiny-llama" in error.value.hint


@pytest.mark.parametrize("format", ["gguf", "loralib"])
def test_systems_without_adapters_of_a_tied_head(format, tmp_path):
    base, path = PEFT / "qwen2/base", tmp_path / f"a.{'gguf' if format == 'gguf' else 'pt'}"
    adapter, lost = load_adapter(PEFT / "qwen2/head", base=base), []
    with pytest.raises(FormatError, match=r"lm_head: .* no head apart from the embedding"):
        save_adapter(adapter, path, format, base=base)
    save_adapter(adapter, path, format, base=base, allow_lossy=True, lost=lost)
    kept = load_adapter(path, base=base, **({} if format == "gguf" else {"alpha": 6})).modules
    assert len(lost) == 1 and kept == [p for p in adapter.modules if p != "lm_head"]


# -- modules that mlx-lm splits ----------------------------------------------------------------------------------------


def test_an_update_of_a_split_module_is_merged_and_refused_with_this_way(tmp_path):
    """mlx-lm makes embed_q and unembed_out of DeepSeek's kv_b_proj."""
    name, base = "deepseek_v3/kv_b_proj", PEFT / "deepseek_v3/base"
    adapter, model = load_adapter(PEFT / name, base=base), load("deepseek_v3")
    with pytest.raises(AdapterError, match=r"kv_b_proj.*splits or joins") as error:
        mount(model, adapter)
    assert "--to merged" in error.value.hint
    for part in (adapter, replace(adapter, weights={n: w for n, w in adapter.weights.items() if "kv_b" in n})):
        reports = export_merged(base, part, tmp_path / "merged", overwrite=True)
        assert {report.path for report in reports} == set(part.modules)
        merged = mlx_lora.load(tmp_path / "merged", dtype="float32")[0]
        if part is adapter:
            assert_equal(logits(merged), np.load(PEFT / name / "logits.npy"))
        names = read_safetensors(tmp_path / "merged/model.safetensors").keys()
        assert names == read_safetensors(base / "model.safetensors").keys()
    bad = {n: w[:-2] if n.endswith("kv_b_proj.lora_a") else w for n, w in adapter.weights.items()}
    with pytest.raises(AdapterError, match=r"kv_b_proj: lora_a \[6, 2\], expected \[8, 2\]"):
        export_merged(base, replace(adapter, weights=bad), tmp_path / "bad")


# -- full fine-tunes of mlx-lm-lora ------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [{"num_layers": 1}, {"num_layers": 1, "model": "x"}, {"lora_layers": 1},
                                 {"num_layers": 1, "lora_parameters": None}])  # fmt: skip
def test_whole_parameters_are_a_full_fine_tune(raw, tmp_path):
    """mlx-lm-lora writes neither fine_tune_type nor lora_parameters for them: the arrays' names tell what they are."""
    model = load("llama")
    attach(model, AdapterConfig(method="full", num_layers=1))
    model.layers[1].mlp.up_proj.weight += 0.1
    expected = logits(model)
    folder = tmp_path / "full"
    folder.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    adapter = load_adapter(folder)
    assert adapter.config.method == "full" and adapter.config.num_layers == 1
    other = load("llama")
    mount(other, adapter)
    assert_equal(logits(other), expected, 1e-6)
    fuse(other)
    assert_equal(logits(other), expected, 1e-6)


def test_low_rank_arrays_without_their_settings_are_still_asked_for_them(tmp_path):
    folder = save_adapter(load_adapter(PEFT / "llama/lora"), tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"num_layers": 2}))
    with pytest.raises(FormatError, match="lora_parameters is missing"):
        load_adapter(folder)
