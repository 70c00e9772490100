"""Tiny random checkpoints of every architecture that transformers and mlx-lm share, as transformers saves them, and the
comparison of the logits on both sides. ``scripts/make_architecture_table`` writes the results as a table.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from judges import IDS, difference, maker, torch, transformers
from mlx_lora import load_adapter, mount, save_adapter, unmount
from mlx_lora.base.classes import _mlx_lm_classes
from mlx_lora.base.config import missing_fields, read_config
from mlx_lora.base.differences import _NO_WINDOW
from mlx_lora.base.fields import as_known_type, class_fields
from mlx_lora.base.loading import load_base
from mlx_lora.errors import MLXLoRAError

CHUNKS = (5, 11)
TOLERANCE = 3e-5  # max |difference| / max |logit|

# Refused, and why.
REFUSED = {
    "bitnet": "mlx-lm holds packed ternary weights alone, not the unquantized ones",
    "minimax": "mlx-lm's class of this name is MiniMax M2; MiniMax-Text-01 has linear attention",
    "minimax_m3_vl_text": "mlx-lm has the whole model alone, and the text part is saved with other names",
    "muse_spark": "mlx-lm's chat template for it cannot be imported",
    "olmo": "mlx-lm's class needs the package ai2-olmo",
}
# Not made: transformers has no language model of this type, or needs another package for it.
NOT_MADE = {
    "gemma3n": "transformers needs timm for its vision part; its language model is gemma3n_text",
    "pixtral": "transformers has only the vision part",
    "step3p5": "transformers has no class for its language model alone",
}
# Loaded with other logits because of mlx-lm, and why.
DIFFERENT = {
    "ernie4_5_moe": "chooses experts without the correction bias (moe_statics)",
    "glm": "rotates the whole head; the config says half (partial_rotary_factor)",
    "gpt_oss": "rounds the limits of YaRN's ramp; the config says not to (truncate)",
    "jamba": "normalizes the weights of the chosen experts",
    "olmo_hybrid": "the cause is not known",
}
# Loaded with nearly the same logits: the difference that is allowed, and why.
CLOSE = {
    "gemma": (3e-4, "exact GELU instead of its approximation"),
    "gpt_bigcode": (5e-4, "exact GELU instead of its approximation"),
    "gpt_neox": (5e-4, "approximated GELU instead of the exact one"),
    "longcat_flash": (1e-4, "the cause of this difference is not known"),
    "nanochat": (1e-3, "1e-5 in its norms instead of the config's 1e-6"),
    "nemotron_h": (3e-3, "the cause of this difference is not known"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        (5e-4, "the cause of this difference is not known"),
    ),
    "starcoder2": (5e-4, "exact GELU instead of its approximation"),
}
# mlx-lm computes these as the config says only up to the window of attention.
WINDOW = "attends to all tokens; equal up to the sliding window"
# Adapters of PEFT that are refused, and why.
NO_ADAPTER = {
    "longcat_flash": "PEFT also adapts the experts that return their input",
    "minimax_m3_vl": "gate_up_proj of shared experts is two modules in mlx-lm",
}
NO_EXPERTS = {
    "longcat_flash": "PEFT also adapts the experts that return their input",
    "nemotron_h": "its experts have no gate",
}
VOCABULARY = maker.VOCABULARY

# Sizes by the names that configs of transformers have for them. A config gets those that it has a field for.
_SIZES: dict[str, Any] = {
    name: size
    for size, names in {
        # The square root of 64 is exact in bfloat16, in which mlx-lm scales the embeddings of Gemma.
        VOCABULARY: "vocab_size vocab_size_per_layer_input hidden_size n_embd d_model lru_width dim_model_base "
        "hidden_dim text_hidden_size mamba_d_ssm",
        4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads index_topk depth "
        "linear_num_heads mamba_n_groups index_topk_blocks index_block_size laurel_rank hidden_size_per_layer_input",
        2: "num_key_value_heads kv_n_heads num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token "
        "linear_num_key_heads n_group num_expert_group n_groups attn_layer_period zero_expert_num layer_group_size "
        "num_global_key_value_heads",
        48: "intermediate_size ffn_hidden_size intermediate_size_mlp mlp_hidden_size dense_intermediate_size",
        24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
        "q_lora_rank moe_shared_expert_intermediate_size share_expert_dim moe_latent_size",
        16: "head_dim attention_head_dim v_head_dim global_head_dim kv_lora_rank linear_head_dim index_head_dim "
        "linear_key_head_dim linear_value_head_dim query_pre_attn_scalar swa_head_dim",
        8: "sliding_window attention_window_size attention_chunk_size chunk_size mamba_chunk_size block_size "
        "qk_nope_head_dim qk_rope_head_dim state_size ssm_state_size mamba_d_state rotary_dim mamba_d_head "
        "mamba_head_dim mamba_num_heads mamba_n_heads floor_scale",
        128: "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_sequence_length",
        32: "index_n_heads",  # few heads give ties, which either side may break in its own way
        0: "pad_token_id num_kv_shared_layers",
        1: "bos_token_id topk_group moe_layer_start_index",
    }.items()
    for name in names.split()
} | {"eos_token_id": 2}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_LAYERS = ("full_attention", "sliding_attention")
# Where the sizes above contradict each other, or a default is missing.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_key_value_heads": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 500.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "gemma3": {"text_config": {"num_hidden_layers": 6}},
    "gemma3n_text": {"num_hidden_layers": 5},
    "gemma3_text": {"num_hidden_layers": 6},
    "granitemoehybrid": {"mamba_n_heads": 16, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mimo_v2_flash": {"head_dim": 24},
    "minimax_m3_vl": {"text_config": {"rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 0.5}}},
    "olmo_hybrid": {"linear_num_key_heads": 4},
    "jamba": {"attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": {"num_experts_per_tok": 1}},
    "llama4_text": {"num_experts_per_tok": 1},
    "longcat_flash": {"head_dim": 8},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "olmo3": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 50.0} for kind in _LAYERS}},
    "recurrent_gemma": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    **{kind: {"sliding_window": 64} for kind in _NO_WINDOW},
    "kimi_linear": {"q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"] * 2},
    "mistral3": {"text_config": {"sliding_window": 64}},
    "muse_spark": {"audio_config": {"out_hidden_size": 64}},
    "qwen2_vl": {"text_config": {"rope_parameters": {**_PLAIN_ROPE, "mrope_section": [4, 2, 2]}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {**_PLAIN_ROPE, "mrope_section": [4, 2, 2]}}},
}


def shared() -> list[str]:
    """The model types that both transformers and mlx-lm have, and the text parts that transformers has of them."""
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    modules = {module.name.replace("-", "_") for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    names = (modules | set(MODEL_REMAPPING)) & set(CONFIG_MAPPING_NAMES)
    return sorted(names | {f"{name}_text" for name in names} & set(CAUSAL))


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Other thetas than any default, which matter within 12 tokens."""
    if any(isinstance(inner, dict) for inner in value.values()):
        return {k: {**v, "rope_theta": 50.0 if "sliding" in k else 5000.0} for k, v in value.items() if v}
    return {**value, "rope_theta": 500.0} if value else value


def tiny_config(config_class: type, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    """A config of ``config_class`` with the sizes above in it and in the configs within it."""
    default = config_class()
    fields = default.to_dict()
    settings = {k: v for k, v in _SIZES.items() if k in fields}
    for name in config_class.sub_configs:
        if isinstance(inner := getattr(default, name, None), transformers.PretrainedConfig):
            settings[name] = tiny_config(type(inner), overrides.get(name, {})).to_dict()
    if "kv_lora_rank" in settings:  # multi-head latent attention: these follow from other sizes
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {k: v for k, v in overrides.items() if k not in config_class.sub_configs or k not in settings}
    made = config_class(**settings)
    if "rope_parameters" not in overrides and isinstance(rope := getattr(made, "rope_parameters", None), dict):
        made = config_class(**{**settings, "rope_parameters": _rope(rope)})
    return made


def make_checkpoint(model_type: str, folder: Path) -> torch.nn.Module:
    """Save a tiny random model with a tokenizer in ``folder``, and return it."""
    config = tiny_config(transformers.CONFIG_MAPPING[model_type], _OVERRIDES.get(model_type, {}))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = _auto_class(config).from_config(config, dtype=torch.float32).eval()
    maker.randomize(model, seed=sum(model_type.encode()))
    model.save_pretrained(folder)
    maker.save_tokenizer(folder)
    return model


def logits(model, chunks=None) -> np.ndarray:
    """mlx-lm's logits of ``IDS``, at once or through its cache in chunks that end at the positions ``chunks``."""
    if chunks is None:
        return np.array(model(mx.array(IDS)).astype(mx.float32))
    from mlx_lm.models.cache import make_prompt_cache

    cache, parts = make_prompt_cache(model), np.split(IDS, chunks, axis=1)
    return np.concatenate([np.array(model(mx.array(part), cache=cache).astype(mx.float32)) for part in parts], axis=1)


@dataclass
class Result:
    """What became of one architecture. Differences are max |difference| / max |logit|; None where not measured."""

    model_type: str
    error: str = ""  # why it is not compared
    base: float | None = None  # all tokens at once
    cached: float | None = None  # in three pieces, through mlx-lm's cache
    adapter: float | None = None  # PEFT's LoRA on all linear layers of the language model
    experts: float | None = None  # PEFT's LoRA on the experts' parameters
    filled: tuple[str, ...] = ()  # config fields that mlx-lm's class needs and transformers did not write
    adapter_effect: float = 0.0  # how far that adapter moves the logits
    adapter_error: str = ""
    experts_error: str = ""


def compare(model_type: str, root: Path) -> Result:
    """Make a checkpoint in ``root``, load it, and compare it and two adapters of PEFT with transformers."""
    result = Result(model_type)
    try:
        theirs = make_checkpoint(model_type, root / "base")
        expected = maker.logits(theirs, IDS)
    except (ValueError, ImportError, TypeError) as error:
        result.error = f"transformers: {_first_line(error)}"
        return result
    try:
        ours = load_base(root / "base", dtype="float32")[0]
        result.base = difference(logits(ours), expected)
    except MLXLoRAError as error:
        result.error = error.message.replace(str(root), "").replace("\n", "; ")
        return result
    result.filled = filled_fields(root / "base")
    result.cached = difference(logits(ours, CHUNKS), expected)
    settings = {"r": 4, "lora_alpha": 6}
    mamba = any("mamba" in part for part in (model_type, *vars(theirs.config)))
    # PEFT refuses out_proj beside Mamba's kernels, and transformers reads dt_proj's weight without its adapter. mlx-lm
    # splits kv_b_proj, so adapters of it are refused, and reads the weights of Gemma 3n's coefficients itself.
    aside = ("kv_b_proj", "_coefs", *(("out_proj", "dt_proj") if mamba else ()))
    names = [name for name in linears(theirs) if not name.endswith(aside)]
    experts = expert_parameters(theirs)
    del theirs
    result.adapter, result.adapter_error, result.adapter_effect = _adapter(
        root, "adapter", ours, {**settings, "target_modules": names}
    )
    if experts:
        settings |= {"target_modules": [], "target_parameters": experts}
        result.experts, result.experts_error, _ = _adapter(root, "experts", ours, settings)
    return result


def filled_fields(folder: Path) -> tuple[str, ...]:
    """The config fields that loading fills in."""
    stored = read_config(folder)
    found = {**stored, **missing_fields(stored)}
    known = inspect.signature(_mlx_lm_classes(as_known_type(found))[1]).parameters
    changes = {**missing_fields(stored), **class_fields(as_known_type(found), known)}
    return tuple(
        sorted("fields of text_config" if name == "text_config" else name for name in changes if name in known)
    )


def _adapter(root: Path, name: str, ours, settings: dict[str, Any]) -> tuple[float | None, str, float]:
    """The difference of the logits with PEFT's adapter on both sides, why there is none, and the adapter's effect."""
    tuned = maker.add_adapter(load_again(root / "base"), settings, seed=1)
    expected = maker.logits(tuned, IDS)
    tuned.save_pretrained(root / name)
    try:
        adapter = load_adapter(root / name, base=root / "base")
        mount(ours, adapter)
    except MLXLoRAError as error:
        return None, error.message.replace(str(root), "").replace("\n", "; "), 0.0
    got = difference(logits(ours), expected)
    unmount(ours)
    effect = difference(logits(ours), expected)
    try:
        again = save_adapter(adapter, root / f"{name}-again", "peft", base=root / "base")
    except MLXLoRAError as error:
        return got, "not written back: " + error.message.replace(str(root), "").replace("\n", "; "), effect
    first, second = (mx.load(str(folder / "adapter_model.safetensors")) for folder in (root / name, again))
    same = first.keys() == second.keys() and all(mx.array_equal(first[n], second[n]).item() for n in first)
    return got, "" if same else f"written back with other tensors: {sorted(first.keys() ^ second.keys())[:4]}", effect


def load_again(folder: Path) -> torch.nn.Module:
    """transformers' model of the checkpoint in ``folder``."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return _auto_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _auto_class(config: transformers.PretrainedConfig) -> type:
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:200]


def expert_parameters(model: torch.nn.Module) -> list[str]:
    """The parameters that hold all experts of a block, in PEFT's order."""
    names = [name for name, _ in model.named_parameters()]
    leaves = ("experts.gate_up_proj", "experts.down_proj")
    return [leaf for leaf in leaves if any(name.endswith(f".{leaf}") for name in names)]


def linears(model: torch.nn.Module) -> list[str]:
    """The linear layers of the language model, without the output head."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    aside = ("vision", "visual", "audio", "projector", "image", "merge")
    return [
        name
        for name, module in model.named_modules()
        if type(module) in kinds and module is not head and not any(part in name for part in aside)
    ]


HEADER = ["model_type", "loads", "logits", "in pieces", "PEFT adapter", "of experts", "remarks"]


def row(result: Result) -> str:
    """A line of the table."""
    kind = result.model_type
    loads = "not tried" if kind in NOT_MADE else "no" if result.error else "yes"
    reasons = [table[kind] for table in (NOT_MADE, REFUSED, DIFFERENT) if kind in table]
    reasons += [CLOSE[kind][1]] if kind in CLOSE else []
    reasons += [WINDOW] if kind in _NO_WINDOW else []
    reasons += [f"adapter refused: {NO_ADAPTER[kind]}"] if kind in NO_ADAPTER else []
    reasons += [f"of experts refused: {NO_EXPERTS[kind]}"] if kind in NO_EXPERTS else []
    reasons += [f"filled in: {', '.join(result.filled)}"] if result.filled else []
    values = [result.base, result.cached, result.adapter, result.experts]
    numbers = ["" if value is None else f"{value:.0e}" for value in values]
    return "| " + " | ".join([kind, loads, *numbers, "; ".join(reasons)]) + " |"
