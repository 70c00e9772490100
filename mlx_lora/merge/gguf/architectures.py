"""An mlx-lm model's settings and parameters as llama.cpp's: key-value pairs, names, types and orders of tensors.

Settings come from the arguments that mlx-lm's class computes with, defaults included. A model that differs from what
llama.cpp's graph of its architecture fixes is refused, and the differences are named. Nothing here reads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...adapter import Adapter
from ...base.differences import other_numbers
from ...base.names import BaseModel
from ...errors import FormatError
from ...formats.fused_projections import to_interleaved
from ...formats.gguf import ARCHITECTURES
from .tokenizer import ELSEWHERE

# Supported families: those whose graphs in llama.cpp and mlx-lm have been compared.
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2")
FAMILIES += ("gemma3", "gemma3_text", "phi3")
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B model, for which llama.cpp scales attention differently
_BIASES = {"attn_q", "attn_k", "attn_v", "attn_qkv"}  # that every architecture takes
HEAD = "lm_head.weight"
_LLAMA_BIASES = {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model as a GGUF tensor."""

    tensor: str  # GGUF's name
    heads: int = 0  # heads of rows that llama.cpp expects in Meta's order; 0 for none
    plus_one: bool = False  # norms that multiply by 1 + weight

    def converted(self, array: mx.array) -> mx.array:
        """``array`` as llama.cpp expects it."""
        if self.heads:
            array = to_interleaved(array.T, self.heads).T
        return array.astype(mx.float32) + 1 if self.plus_one else array


class Architecture:
    """The settings and tensors for llama.cpp of the model ``base`` with ``adapter`` merged.

    Raises: FormatError: llama.cpp computes something else; every reason is named.
    """

    def __init__(self, base: BaseModel, adapter: Adapter | None = None):
        self.base, self.family, self.notes, self._faults = base, base.model_type, [], []
        if base.config["model_type"] not in FAMILIES:
            raise FormatError(
                f"{base.name}: {base.config['model_type']} models are not written as GGUF, only {', '.join(FAMILIES)}",
                ELSEWHERE,
            )
        self.name = ARCHITECTURES[self.family]
        model = base.model
        self._prefix = "language_model." if hasattr(model, "language_model") else ""
        self._model = getattr(model, "language_model", model)
        self.args = self._model.args
        self.head_dim = getattr(self.args, "head_dim", None) or self.args.hidden_size // self.args.num_attention_heads
        self.extra: dict[str, mx.array] = {}  # tensors in addition to the parameters
        self.pairs = {f"{self.name}.{key}": value for key, value in (self._sizes() | self._rope()).items()}
        self._check()
        self.parameters = self._parameters(adapter)
        if self._prefix:
            self.notes.append("only the language model is written, without the part that sees images")
        if self._faults:
            raise FormatError(
                f"{base.name}: llama.cpp computes {self.name} differently: {'; '.join(self._faults)}", ELSEWHERE
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self._model.model.embed_tokens.weight.shape[0]

    def _get(self, *names: str) -> Any:
        """The first of ``names`` that is an argument of mlx-lm's class or a field of the config."""
        for name in names:
            if (value := getattr(self.args, name, self.base.text.get(name))) is not None:
                return value
        return None

    def _sizes(self) -> dict[str, Any]:
        get, experts = self._get, "moe" in self.family or self.family == "mixtral"
        rotated = int(self.head_dim * (get("partial_rotary_factor") or 1.0))
        found = {
            "context_length": get("max_position_embeddings"),
            "embedding_length": get("hidden_size"),
            "block_count": get("num_hidden_layers"),
            "feed_forward_length": get("intermediate_size"),
            "attention.head_count": get("num_attention_heads"),
            "attention.head_count_kv": get("num_key_value_heads") or get("num_attention_heads"),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
            "rope.dimension_count": rotated,
            "vocab_size": self.rows,
            "expert_count": get("num_local_experts", "num_experts") if experts else None,
            "expert_used_count": get("num_experts_per_tok") if experts else None,
            "expert_feed_forward_length": get("moe_intermediate_size") if "moe" in self.family else None,
            "expert_shared_feed_forward_length": get("shared_expert_intermediate_size"),
        }
        if self.name == "gemma2":
            found["attention.sliding_window"] = self.base.text.get("sliding_window") or 4096
            found["attn_logit_softcapping"] = get("attn_logit_softcapping")
            found["final_logit_softcapping"] = get("final_logit_softcapping")
        elif self.name == "gemma3":
            pattern = get("sliding_window_pattern")
            found["attention.sliding_window"] = get("sliding_window") if pattern > 1 else None
            found["attention.sliding_window_pattern"] = pattern if pattern not in (1, 6) else None  # 6 is the default
        elif self.name == "phi3":
            found["attention.sliding_window"] = get("sliding_window") or 0  # required; 0 is none
        floats = {"attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping"}
        return {k: float(v) if k in floats else v for k, v in found.items() if v is not None}

    def _rope(self) -> dict[str, Any]:
        """The rotary settings, by the rules of mlx-lm's ``initialize_rope``."""
        get, scaling = self._get, getattr(self.args, "rope_scaling", None) or {}
        kind = scaling.get("type") or scaling.get("rope_type", "default")
        found: dict[str, Any] = {"rope.freq_base": float(get("rope_theta"))}
        if self.name == "gemma3":
            found["rope.freq_base_swa"] = float(get("rope_local_base_freq"))
        if kind == "linear":
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        elif kind == "llama3" and self.name == "llama":
            from mlx_lm.models.rope_utils import initialize_rope

            scaled = initialize_rope(self.head_dim, self.args.rope_theta, False, scaling)._freqs
            plain = self.args.rope_theta ** (mx.arange(0, self.head_dim, 2) / self.head_dim)
            self.extra["rope_freqs.weight"] = scaled / plain
        elif kind == "yarn" and not {"mscale", "mscale_all_dim", "attention_factor"} & scaling.keys():
            found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"])}
            found["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings", 4096)
            for key in ("beta_fast", "beta_slow"):
                found[f"rope.scaling.yarn_{key}"] = float(scaling.get(key, {"beta_fast": 32, "beta_slow": 1}[key]))
        elif kind in ("longrope", "su") and self.name == "phi3":
            found |= self._long_rope(scaling)
        elif kind != "default":
            self._faults.append(f"rotary embeddings scaled as {kind} ({', '.join(sorted(scaling))})")
        return found

    def _long_rope(self, scaling: dict[str, Any]) -> dict[str, Any]:
        original = self.args.original_max_position_embeddings
        for length in ("long", "short"):
            self.extra[f"rope_factors_{length}.weight"] = mx.array(scaling[f"{length}_factor"], mx.float32)
        self.notes.append(
            f"in contexts of up to {original} tokens llama.cpp uses the model's short rotary factors; mlx-lm always "
            "uses the long ones"
        )
        factor = float(self._model.layers[0].self_attn.rope._scale)
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}

    def _check(self) -> None:
        """Add a fault for everything that mlx-lm computes and llama.cpp's graph cannot."""
        get = self._get
        self._faults += [f"mlx-lm {cause}" for cause in other_numbers(self.base.config)]
        if get("rope_traditional"):
            self._faults.append("rotary embeddings of adjacent pairs (rope_traditional)")
        if self.name == "llama" and "sliding_attention" in (get("layer_types") or ()):
            self._faults.append("some layers have sliding attention")
        if self.name in _LARGEST:
            largest = get("num_hidden_layers") == _LARGEST[self.name]
            fixed = get("hidden_size") // get("num_attention_heads") if largest else self.head_dim
            if get("query_pre_attn_scalar") != fixed:
                self._faults.append(f"query_pre_attn_scalar is {get('query_pre_attn_scalar')}, not {fixed}")
        if self.family == "qwen3_moe" and not get("norm_topk_prob"):
            self._faults.append("the weights of experts are not normalized (norm_topk_prob)")
        sparse = get("mlp_only_layers") or (get("decoder_sparse_step") or 1) != 1
        if self.name in ("qwen2moe", "qwen3moe") and sparse:
            self._faults.append("some layers have no experts")

    def _parameters(self, adapter: Adapter | None) -> dict[str, Parameter]:
        """mlx-lm's name of each parameter of the merged model: its tensor."""
        import gguf

        kinds = {theirs: kind for kind, theirs in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[self.name], self.args.num_hidden_layers)
        present = [name for name, _ in tree_flatten(self.base.model.parameters())]
        if adapter is not None and adapter.config.lora_bias:
            present += [f"{path}.bias" for path in adapter.modules if f"{path}.bias" not in present]
        present += [name for name in (adapter.full_parameters if adapter else ()) if name not in present]
        found, unknown = {}, []
        heads = {"attn_q": self.args.num_attention_heads, "attn_k": self._get("num_key_value_heads")}
        allowed = _BIASES | (_LLAMA_BIASES if self.name == "llama" else set())
        for name in dict.fromkeys(present):
            tensor = names.get_name(_as_known(name.removeprefix(self._prefix)), (".weight", ".bias"))
            short, _, leaf = (tensor or "").removeprefix("blk.").lstrip("0123456789.").rpartition(".")
            if tensor is None or (leaf == "bias" and short not in allowed):
                unknown.append(name)
                continue
            permuted = heads.get(short, 0) if self.name == "llama" else 0
            plus_one = self.name.startswith("gemma") and tensor.endswith("norm.weight")
            found[name] = Parameter(tensor, permuted or 0, plus_one)
        if head := names.get_name(HEAD, (".weight", ".bias")):  # a tied model may get one when the adapter is merged
            found.setdefault(self._prefix + HEAD, Parameter(head))
        if unknown:
            self._faults.append(f"it has no tensor for {', '.join(unknown[:5])}{', ...' if unknown[5:] else ''}")
        return found

    def tensors(self, parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """The parameters of the merged model as llama.cpp's tensors, not yet computed."""
        found = {
            self.parameters[name].tensor: self.parameters[name].converted(array) for name, array in parameters.items()
        }
        # the only architecture whose head cannot share the embedding
        if self.name == "qwen2moe" and "output.weight" not in found:
            found["output.weight"] = found["token_embd.weight"]
        return {**self.extra, **found}


def _as_known(name: str) -> str:
    """mlx-lm's names of experts in the spelling of the gguf package."""
    return name.replace("block_sparse_moe.switch_mlp.", "mlp.experts.").replace(".switch_mlp.", ".experts.")
