"""GGUF LoRA adapters, for llama.cpp and Ollama: one file.

Tensors are ``blk.N.attn_q.weight.lora_a`` [r, in] and ``.lora_b`` [out, r], for experts [experts, r, in] and [experts,
out, r], for the embedding [vocabulary, r] and [dim, r]. llama.cpp multiplies by alpha / r, with one
``adapter.lora.alpha`` for the file and the r of each tensor; an alpha of 0 means a multiplier of 1. Different scales
are folded into B. In the ``llama`` architecture the rows of q and k are in Meta's order. GGUF has LoRA only: DoRA, full
parameters, biases and trained tokens are refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter import FINGERPRINT, Adapter, raise_faults
from ..base.names import BaseModel
from ..errors import FormatError
from .files import fingerprint_text, stored_fingerprint
from .fused_projections import from_interleaved, reorder_q_and_k, to_interleaved
from .gguf_file import MAGIC, read_gguf, write_gguf
from .options import ReadOptions, WriteOptions
from .state_dicts import low_rank_adapter
from .uniform import low_rank_only, uniform

READS, WRITES, SUFFIXES, FILES = set(), {"alpha"}, (".gguf",), ()
# transformers' model_type: llama.cpp's architecture.
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "ministral3"), "llama"),
    **{
        name: name.replace("_", "")
        for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "starcoder2", "olmo2", "olmoe", "stablelm")
    },
    **{name: name.replace("_", "") for name in ("qwen2_moe", "qwen3_moe", "smollm3", "granite", "internlm2", "glm4")},
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "seed_oss": "seed_oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
# mlx-lm's name within a layer: GGUF's. A GGUF name is read as the first module that has it, or as _FAMILY says.
_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_b_proj": "attn_kv_b",
}
# mlx-lm's names for architectures with other names than the first ones above.
_FAMILY = {
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "phi2": ("self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt-oss": ("mlp.router", "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"),
}
# Layers for which llama.cpp accepts a LoRA and then computes without it.
_NOT_APPLIED = {"deepseek2": {"attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "output"}}
_TENSOR = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+)\.weight\.(?P<leaf>lora_a|lora_b)$")
_LAYER = re.compile(r"^(?:language_model\.)?model\.(?:layers|h)\.(\d+)\.(.+)$")
_MERGE = "Merge it into the model instead (convert --to merged) and convert the model."


def detect(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read(path: Path, options: ReadOptions) -> Adapter:
    pairs, tensors = read_gguf(path)
    kind = pairs.get("general.type")
    if kind != "adapter" or pairs.get("adapter.type") != "lora":
        raise FormatError(f"{path}: holds a {kind or 'model'}, not a LoRA adapter", "Name the adapter's GGUF file.")
    if pairs.get("adapter.alora.invocation_tokens"):
        raise FormatError(
            f"{path}: is an activated LoRA (aLoRA), which is not converted", "Use it in llama.cpp as it is."
        )
    architecture, weights, faults = pairs.get("general.architecture"), {}, []
    interleaved = architecture == "llama" and any(re.search(r"attn_[qk]\.weight\.lora_b$", name) for name in tensors)
    base = options.base_for(f"{path}: the order of rows of q and k") if interleaved else options.known_base
    for name, array in tensors.items():
        found = _TENSOR.match(name)
        module = _module(found, architecture, base) if found else None
        if module is None:
            faults.append(f"{path}: {name}: not a tensor of a LoRA of {architecture}")
            continue
        if array.ndim not in (2, 3):
            faults.append(f"{path}: {name}: shape {list(array.shape)}")
            continue
        as_it_is = array.ndim == 3 or (found["name"] == "token_embd" and found["leaf"] == "lora_a")
        weights[f"{module}.{found['leaf']}"] = array if as_it_is else array.T
    raise_faults(faults, "Convert it with a newer mlx-lora, or convert the file that it was made from.", FormatError)
    if interleaved and base is not None:
        weights = reorder_q_and_k(weights, base, from_interleaved)
    alpha, name = pairs.get("adapter.lora.alpha", 0), pairs.get("general.base_model.0.name")
    paths = [name.removesuffix(".lora_b") for name in weights if name.endswith(".lora_b")]
    if not isinstance(alpha, (int, float)) or alpha == 0:  # llama.cpp then multiplies by 1
        scale = {"scales": dict.fromkeys(paths, 1.0)}
    else:
        scale = {"alpha": alpha}
    side = "input" if any("embed" in path or "wte" in path for path in paths) else "both"
    name = name if isinstance(name, str) else None
    adapter = low_rank_adapter(weights, path, options, base=name, embedding_side=side, **scale)
    adapter.metadata.update(stored_fingerprint(pairs.get(f"mlx_lora.{FINGERPRINT}")))
    return adapter


def _module(found: re.Match, architecture: str | None, base: BaseModel | None) -> str | None:
    """mlx-lm's path of a GGUF tensor's module."""
    name, layer = found["name"], found["layer"]
    gpt = architecture == "gpt2"
    if layer is None:
        named = {"token_embd": "model.wte" if gpt else "model.embed_tokens", "output": "lm_head"}.get(name)
        return base.to_mlx(named) if named and base is not None else named
    own = _FAMILY.get(architecture, ())
    candidates = [ours for ours, theirs in _MODULES.items() if theirs == name]
    if not candidates:
        return None
    path = f"model.{'h' if gpt else 'layers'}.{layer}.{next((m for m in candidates if m in own), candidates[0])}"
    if base is not None:
        theirs, ours = base.moe_block
        path = base.to_mlx(path.replace(".mlp.", f".{ours}.") if theirs != ours else path)
    return path


def write(adapter: Adapter, path: Path, options: WriteOptions) -> None:
    base = options.base_for("GGUF's architecture and order of rows")
    architecture = ARCHITECTURES.get(base.model_type)
    if architecture is None:
        raise FormatError(f"llama.cpp's names are unknown for {base.model_type}", _MERGE)
    adapter = uniform(low_rank_only(adapter, options, "GGUF", hint=_MERGE), alpha=options.alpha, pad=False)
    weights, tensors, faults = adapter.weights, {}, []
    if architecture == "llama":
        weights = reorder_q_and_k(weights, base, to_interleaved)
    for module in adapter.modules:
        theirs = _to_gguf(module)
        name = (theirs or "").rpartition(".")[2]
        if name == "token_embd" and base.tied:
            faults.append(f"{module}: llama.cpp fails on a LoRA of an embedding that is the output head too")
        elif theirs is None or (name == "output" and base.tied):
            faults.append(f"{module}: llama.cpp has no such tensor in {architecture}")
        elif name in _NOT_APPLIED.get(architecture, ()):
            faults.append(f"{module}: llama.cpp does not apply a LoRA to this layer of {architecture}")
        if theirs is None:
            continue
        a, b = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"]
        if a.ndim == 2:
            a, b = a if theirs == "token_embd" else a.T, b.T
        tensors[f"{theirs}.weight.lora_a"], tensors[f"{theirs}.weight.lora_b"] = a, b
    raise_faults(faults, _MERGE, FormatError)
    pairs = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.config.scale * adapter.config.rank),
        "general.base_model.count": 1,
        "general.base_model.0.name": str(adapter.base or base.name),
        **{f"mlx_lora.{name}": text for name, text in fingerprint_text(adapter).items()},
    }
    write_gguf(path, pairs, tensors)


def _to_gguf(module: str) -> str | None:
    """GGUF's name of mlx-lm's module; None if it has none."""
    bare = module.removeprefix("language_model.")
    if bare in ("lm_head", "model.embed_tokens", "model.wte"):
        return "output" if bare == "lm_head" else "token_embd"
    found = _LAYER.match(module)
    name = found and _MODULES.get(found[2].replace("block_sparse_moe.", "mlp."))
    return f"blk.{found[1]}.{name}" if name else None
