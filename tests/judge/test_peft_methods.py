"""PEFT and transformers as judges of PEFT's other methods, and of the head and the embedding of a tied model.

Each adapter is made by PEFT, read, written back and read by PEFT again; through mlx-lm's folder; merged, and the merged
model loaded by transformers. Run by scripts/judge; skipped where torch and peft are not installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_lora
from judges import IDS, difference, hf, make_bases, maker, peft, told
from mlx_lora import extract, load_adapter, mount, save_adapter
from mlx_lora.merge.export import export_merged

SEED = 4000  # not one of the fixtures'
TARGETS = ["q_proj", "down_proj"]
Q = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]
CASES = {
    "adalora": ("llama", {"config": "AdaLoraConfig", "init_r": 4, "lora_alpha": 6, "total_step": 9}),
    "adalora, no alpha": ("llama", {"config": "AdaLoraConfig", "init_r": 4, "lora_alpha": 0, "total_step": 9}),
    "adalora, conv1d": (
        "gpt2",
        {"config": "AdaLoraConfig", "total_step": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "loha": ("llama", {"config": "LoHaConfig", "r": 3, "alpha": 5}),
    "loha, rank above the layer's": ("llama", {"config": "LoHaConfig", "r": 7, "alpha": 5}),
    "loha, patterns": (
        "llama",
        {"config": "LoHaConfig", "r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*": 3}},
    ),
    "lokr": ("llama", {"config": "LoKrConfig", "r": 2, "alpha": 5}),
    "lokr, whole factors": ("llama", {"config": "LoKrConfig", "r": 32, "alpha": 5}),
    "lokr, both decomposed": (
        "llama",
        {"config": "LoKrConfig", "r": 2, "decompose_both": True, "decompose_factor": 8},
    ),
    "ia3": ("qwen2", {"config": "IA3Config", "feedforward_modules": ["down_proj"]}),
    "ia3, outputs": (
        "qwen2",
        {"config": "IA3Config", "feedforward_modules": [], "target_modules": ["q_proj", *BOTH[1:]]},
    ),
    "layer norms": ("qwen2", {"config": "LNTuningConfig", "target_modules": ["norm", "input_layernorm"]}),
    "head": ("qwen2", {**Q, "target_modules": ["lm_head"]}),
    "head, dora": ("qwen2", {**Q, "target_modules": ["lm_head", "q_proj"], "use_dora": True}),
    "head, rslora": ("gemma2", {**Q, "target_modules": ["lm_head", "q_proj"], "use_rslora": True}),
    "head, vera": ("qwen2", {"projection_prng_key": 3, "r": 8, "target_modules": ["lm_head", "q_proj"]}),
    "head, loha": ("qwen2", {"config": "LoHaConfig", "r": 2, "target_modules": ["lm_head"]}),
    "head and embedding": ("qwen2", {**Q, "target_modules": BOTH}),
    "head and embedding, gemma3": ("gemma3_text", {**Q, "target_modules": BOTH, "rank_pattern": {"lm_head": 5}}),
    "head and embedding, tied": ("qwen2", {**Q, "target_modules": BOTH, "ensure_weight_tying": True}),
    "saved embedding": ("qwen2", {**Q, "modules_to_save": ["embed_tokens"]}),
    "saved head": ("qwen2", {**Q, "modules_to_save": ["lm_head"]}),
    "saved both": ("qwen2", {**Q, "modules_to_save": BOTH}),
    "saved embedding, tied": ("qwen2", {**Q, "modules_to_save": BOTH[:1], "ensure_weight_tying": True}),
    "saved head, tied": ("qwen2", {**Q, "modules_to_save": BOTH[1:], "ensure_weight_tying": True}),
    "saved both, tied": ("qwen2", {**Q, "modules_to_save": BOTH, "ensure_weight_tying": True}),
    "saved, tied, of an untied model": ("llama", {**Q, "modules_to_save": BOTH[:1], "ensure_weight_tying": True}),
    "tokens of both": ("qwen2", {**Q, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}),
    "tokens of an untied head": ("llama", {**Q, "trainable_token_indices": {"embed_tokens": [3], "lm_head": [7, 9]}}),
    "kv_b_proj": ("deepseek_v3", {**Q, "target_modules": ["kv_b_proj", "o_proj"]}),
    "kv_b_proj, dora": ("deepseek_v3", {**Q, "target_modules": ["kv_b_proj"], "use_dora": True}),
}
SPLIT = ("kv_b_proj", "kv_b_proj, dora")  # cannot be mounted
ONE_MATRIX = ("head, rslora",)  # mlx-lm's gemma2 has no head of its own, so that this cannot be merged


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"), sorted({model for model, _ in CASES.values()}), SEED)


def ours(folder: Path, adapter=None) -> np.ndarray:
    model = mlx_lora.load(folder, dtype="float32")[0]
    if adapter is not None:
        mount(model, adapter)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def in_peft(base: Path, folder: Path) -> np.ndarray:
    return maker.logits(peft.PeftModel.from_pretrained(hf(base), folder).eval(), IDS)


@pytest.mark.parametrize("name", CASES)
def test_from_peft_and_back(name, bases, tmp_path):
    model, settings = CASES[name]
    settings = {"target_modules": TARGETS, **settings}
    tuned = maker.add_adapter(hf(bases[model]), settings, seed=SEED)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(tmp_path / "peft")
    adapter, measured = load_adapter(tmp_path / "peft", base=bases[model]), {}
    native = load_adapter(save_adapter(adapter, tmp_path / "native"), base=bases[model])
    if name not in SPLIT:
        loaded = mlx_lora.load(bases[model], dtype="float32")[0]
        mount(loaded, adapter if model == "gpt2" else load_adapter(tmp_path / "peft"))  # the base is not needed
        measured["live"] = difference(np.array(loaded(mx.array(IDS)).astype(mx.float32)), expected)
        measured["native"] = difference(ours(bases[model], native), expected)
        extracted = save_adapter(extract(loaded), tmp_path / "extracted", "peft", base=bases[model])
        measured["extracted"] = difference(in_peft(bases[model], extracted), expected)
    folder = save_adapter(native, tmp_path / "back", "peft", base=bases[model])
    measured["back"] = difference(in_peft(bases[model], folder), expected)
    if name in ONE_MATRIX:
        with pytest.raises(mlx_lora.errors.ConfigError, match="one matrix for both"):
            export_merged(bases[model], adapter, tmp_path / "merged")
    else:
        export_merged(bases[model], adapter, tmp_path / "merged")
        measured["merged"] = difference(ours(tmp_path / "merged"), expected)
        measured["merged_in_transformers"] = difference(maker.logits(hf(tmp_path / "merged"), IDS), expected)
    told(name, **measured, control_base=difference(ours(bases[model]), expected))


def test_adalora_with_ranks_that_training_took_away(bases, tmp_path):
    """PEFT keeps the scale of the first rank, and stores only the ranks that are left."""
    settings = {"config": "AdaLoraConfig", "init_r": 4, "lora_alpha": 6, "total_step": 9, "target_modules": TARGETS}
    tuned = maker.add_adapter(hf(bases["llama"]), settings, seed=SEED)
    names = [n for n, _ in tuned.named_parameters() if n.endswith("lora_E.default")]
    kept = {name: [bool((i + j) % 3) for j in range(4)] for i, name in enumerate(names)}
    kept[names[0]] = [False] * 4
    for name, parameter in tuned.named_parameters():
        if name in kept:
            parameter.data[[i for i, keep in enumerate(kept[name]) if not keep]] = 0
    expected = maker.logits(tuned, IDS)
    config = tuned.peft_config["default"]
    config.rank_pattern = {name.removeprefix("base_model.model."): keep for name, keep in kept.items()}
    tuned.save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", base=bases["llama"])
    assert len(adapter.modules) == 3 and {adapter.rank_of(p) for p in adapter.modules} <= {2, 3}
    told("adalora, ranks taken away", live=difference(ours(bases["llama"], adapter), expected),
         peft_itself=difference(in_peft(bases["llama"], tmp_path / "peft"), expected))  # fmt: skip


def test_fields_of_the_config_are_pefts(bases, tmp_path):
    tuned = maker.add_adapter(hf(bases["llama"]), {**Q, "task_type": None}, seed=SEED)
    tuned.save_pretrained(tmp_path / "peft")
    folder = save_adapter(load_adapter(tmp_path / "peft", base=bases["llama"]), tmp_path / "back", "peft")
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "peft", folder))
    assert before["task_type"] is None and after["task_type"] is None and "megatron_core" in after
    assert after.keys() <= set(peft.LoraConfig().to_dict()) | {"peft_type"}
    again = peft.LoraConfig.from_pretrained(folder)
    for name, value in peft.LoraConfig.from_pretrained(tmp_path / "peft").to_dict().items():
        if name not in ("target_modules", "layers_to_transform", "peft_version"):
            assert again.to_dict()[name] == value, name
