"""What a base model's config implies: sizes, modules, and their names in transformers and in mlx-lm.

Adapters from other libraries use transformers' module names. mlx-lm's classes sometimes use others (``mlp.experts`` is
``block_sparse_moe.switch_mlp`` in Mixtral; prefixes differ in vision-language models). To learn which paths are
modules, mlx-lm's class is built without computing its weights. Single weights can be read by name; whole models are
loaded in ``loading.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..threads import Caller
from .config import missing_fields, read_config
from .downloads import download_hint
from .heads import INPUT_EMBEDDING, stated_tie, tensor_files, tie_fields
from .modules import dims, kind

# Families in which mlx-lm keeps transformers' names and shapes: ``sanitize`` drops nothing but rotary buffers and a
# tied head. So a path needs no translation, and an MLX model's weights can be written for transformers as they are.
_SAME_NAMES = {
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2"),
    *("cohere", "cohere2", "starcoder2", "stablelm", "smollm3", "granite", "glm", "glm4", "helium", "seed_oss"),
}
# Prefixes of modules: (transformers', mlx-lm's). The first match is used; transformers 5's name comes first.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("language_model.model.", "language_model.model."),
    ("language_model.lm_head", "language_model.lm_head"),
    ("model.language_model.", "model."),
    ("transformer.", "model."),
    ("gpt_neox.layers.", "model.h."),
    ("gpt_neox.", "model."),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("", "model."),
)
# Parts of module names: (transformers 5's, mlx-lm's), by model type. All that match are replaced, in this order.
_SPARSE_BLOCK = (("mlp", "block_sparse_moe"),)
_PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2", "minimax_m3_vl_text"), _SPARSE_BLOCK),
    "bailing_hybrid": (("self_attn", "attention"), ("forget_gate.f_proj", "f_proj"), ("o_proj", "dense")),
    "exaone": (
        ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"),
        ("self_attn", "attn.attention"),
        ("o_proj", "out_proj"),
        ("mlp.gate_proj", "mlp.c_fc_0"),
        ("mlp.up_proj", "mlp.c_fc_1"),
        ("mlp.down_proj", "mlp.c_proj"),
    ),
    "gpt_neox": (("lm_head", "model.embed_out"),),
    "kimi_linear": (("forget_gate.f_a_proj", "f_a_proj"), ("forget_gate.f_b_proj", "f_b_proj")),
    "llama4_text": (("lm_head", "output"),),
    "laguna": (("shared_experts", "shared_expert"),),
    "lfm2_moe": (
        ("feed_forward.w1", "feed_forward.gate_proj"),
        ("feed_forward.w3", "feed_forward.up_proj"),
        ("feed_forward.w2", "feed_forward.down_proj"),
    ),
    "nanochat": (
        ("model.layers", "transformer.h"),
        ("model.embed_tokens", "transformer.wte"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.q_proj", "attn.c_q"),
        ("self_attn.k_proj", "attn.c_k"),
        ("self_attn.v_proj", "attn.c_v"),
        ("self_attn.o_proj", "attn.c_proj"),
    ),
    "nemotron_h": (("model.layers", "backbone.layers"), ("model.embeddings", "backbone.embeddings")),
}
# PEFT knows that transformers stores these experts as [experts, in, out]. In gpt-oss gate and up are interleaved.
_EXPERTS_IN_OUT = ("gpt_oss",)


def _spellings(name: str) -> tuple[str, ...]:
    """A tensor's name with the prefixes that checkpoints of one model have or lack."""
    return name, name.removeprefix("transformer."), name.removeprefix("model."), f"model.{name}"


class BaseModel:
    """A base model's config and what it implies.

    Args:
        name: a local folder, a ``config.json``, or a repository on the Hub. A repository's config is downloaded on
            first use.
    """

    def __init__(self, name: str | Path):
        self.name = str(name)

    @functools.cached_property
    def folder(self) -> Path | None:
        """``name`` if it is a local folder, the parent folder if it is a file; None for a repository."""
        path = Path(self.name).expanduser()
        if path.is_dir():
            return path
        return path.parent if path.is_file() else None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` with the fields of transformers 4 and 5, and whether the head is tied. Raises: ModelError."""
        config = read_config(Path(self.name).expanduser() if self.folder else Path(self._download()))
        config = {**config, **missing_fields(config)}
        return {**config, **tie_fields(config, self._files)}

    def _download(self) -> str:
        from huggingface_hub import hf_hub_download

        try:
            return hf_hub_download(self.name, "config.json")
        except Exception as error:  # huggingface_hub raises its own errors, httpx's and OSError
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"{self.name}: no such folder, and its config cannot be downloaded ({first[0][:200]})",
                download_hint(error),
            ) from None

    @functools.cached_property
    def known(self) -> bool:
        """Whether ``config`` can be read without a download."""
        if self.folder is None:
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.utils import HFValidationError

            try:
                if not isinstance(try_to_load_from_cache(self.name, "config.json"), str):
                    return False
            except HFValidationError:
                return False
        try:
            return bool(self.config)
        except ModelError:
            return False

    @property
    def text(self) -> dict[str, Any]:
        """The part of ``config`` that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def model_type(self) -> str:
        return self.text.get("model_type") or self.config["model_type"]

    def size(self, *names: str) -> int:
        """The first of the config's fields ``names`` that is set. Raises: ModelError."""
        for name in names:
            value = self.text.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        raise ModelError(
            f"{self.name}: its config has no {' and no '.join(names)}",
            "Name the model that the adapter was trained on, or download its config.json again.",
        )

    @property
    def heads(self) -> int:
        return self.size("num_attention_heads", "n_head", "n_heads")

    @property
    def kv_heads(self) -> int:
        return self.text.get("num_key_value_heads") or self.heads

    @property
    def hidden_size(self) -> int:
        return self.size("hidden_size", "n_embd", "d_model")

    @property
    def head_dim(self) -> int:
        return self.text.get("head_dim") or self.hidden_size // self.heads

    @property
    def num_experts(self) -> int:
        return self.size("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

    @property
    def tied(self) -> bool:
        """Whether the output head shares the embedding's weight."""
        return bool(stated_tie(self.config))

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        """The file that contains each tensor, by transformers' name."""
        return tensor_files(self.folder)

    @property
    def tensor_names(self) -> set[str]:
        """The checkpoint's tensor names."""
        return set(self._files)

    @functools.cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor, as safetensors names it ("BF16"), from the headers of the files.

        For a repository, only the headers are downloaded; it may have no safetensors. Raises: ModelError.
        """
        from safetensors import safe_open

        if self.folder is None:
            return _remote_dtypes(self.name)
        found: dict[str, str] = {}
        for file in set(self._files.values()):
            with safe_open(file, framework="numpy") as opened:
                found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        return found

    def tensor(self, name: str):
        """The checkpoint's tensor ``name``, or None."""
        import mlx.core as mx

        key = next((key for key in _spellings(name) if key in self._files), None)
        return None if key is None else mx.load(str(self._files[key]))[key]

    def embedding_weight(self):
        """The checkpoint's weight of the input embedding, or None."""
        name = next((name for name in sorted(self._files) if INPUT_EMBEDDING.search(name)), None)
        return None if name is None else self.tensor(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the checkpoint's tensor ``name``, from its file's header; None if it is not a float tensor."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="numpy") as opened:
            part = opened.get_slice(name)
            return tuple(part.get_shape()) if part.get_dtype() in ("F32", "F16", "BF16") else None

    def weight_name(self, path: str) -> str | None:
        """The checkpoint's name of the weight of the module that mlx-lm or transformers calls ``path``, or None."""
        names = [spelling for p in (self.to_hf(path), path) for spelling in _spellings(f"{p}.weight")]
        return next((name for name in names if name in self._files), None)

    @functools.cached_property
    def model(self):
        """The model built by mlx-lm's class, with weights that are never computed. Raises: ModelError."""
        # Building the model draws random weights. In its own thread this leaves the caller's random state alone.
        with Caller() as call:
            return call(self._build)

    def _build(self):
        from .classes import model_classes

        try:
            model_class, arguments = model_classes(self.config)
            return model_class(arguments.from_dict(self.config))
        except ModelError:
            raise
        except Exception as error:  # mlx-lm raises many kinds of errors on unknown configs
            raise ModelError(
                f"{self.name}: mlx-lm cannot build it ({type(error).__name__}: {error})",
                "Try a newer mlx-lm (pip install -U mlx-lm), or download the model's config.json again.",
            ) from None

    @functools.cached_property
    def modules(self) -> dict[str, tuple[str, int, int, int]]:
        """Adaptable modules by mlx-lm's path: (kind as in ``base.modules``, in, out, experts)."""
        found = {}
        for path, module in reversed(self.model.named_modules()):
            if which := kind(module):
                found[path] = (which, *dims(module), module.num_experts if which == "switch" else 0)
        return found

    # -- names -------------------------------------------------------------------------------------------------------

    @property
    def same_names(self) -> bool:
        """Whether mlx-lm has transformers' names and shapes for all weights."""
        return self.model_type in _SAME_NAMES and "text_config" not in self.config

    @property
    def moe_block(self) -> tuple[str, str]:
        """The name of a mixture-of-experts block in transformers and in mlx-lm."""
        return next((pair for pair in self._parts if pair[0] == "mlp"), ("mlp", "mlp"))

    @property
    def _parts(self) -> tuple[tuple[str, str], ...]:
        return _PARTS.get(self.model_type, ())

    @property
    def experts_name(self) -> str:
        """mlx-lm's name for the experts of a block: ``switch_mlp`` in most models, ``experts`` in some."""
        return next((path.split(".")[-2] for path, found in self.modules.items() if found[0] == "switch"), "switch_mlp")

    @property
    def experts_in_out(self) -> bool:
        """Whether transformers stores experts as [experts, in, out], and PEFT knows it."""
        return self.model_type in _EXPERTS_IN_OUT

    @property
    def experts_exchanged(self) -> bool:
        """Whether PEFT swaps the inputs and outputs of experts, as it does for Llama 4's [experts, in, out]."""
        return self.model_type in ("llama4", "llama4_text")

    def to_mlx(self, path: str) -> str:
        """mlx-lm's path of the module that transformers calls ``path``; ``path`` itself if there is none."""
        if self.same_names:
            return path
        return next((p for p in self._candidates(path) if p in self._every), path)

    def to_hf(self, path: str) -> str:
        """transformers' path (version 5) of the module that mlx-lm calls ``path``."""
        for theirs, ours in self._parts:
            path = _replaced(path, ours, theirs)
        if path.startswith("model.language_model.") and "text_config" not in self.config:
            return "model." + path.removeprefix("model.language_model.")
        if path.startswith("language_model."):
            rest = path.removeprefix("language_model.")
            # a separate text model, which mlx-lm has only as part of the whole model
            if "text_config" not in self.config:
                return rest
            return "model.language_model." + rest.removeprefix("model.") if rest.startswith("model.") else rest
        if "text_config" in self.config and path.startswith("model.layers."):
            return "model.language_model." + path.removeprefix("model.")
        if self.model_type in ("gpt2", "gptj"):
            return "transformer." + path.removeprefix("model.") if path.startswith("model.") else path
        if self.model_type == "gpt_neox" and path.startswith("model."):
            return "gpt_neox." + path.removeprefix("model.").replace("h.", "layers.", 1)
        return path

    @functools.cached_property
    def _every(self) -> set[str]:
        return {path for path, _ in self.model.named_modules()}

    def _candidates(self, path: str) -> list[str]:
        found = [path]
        for theirs, ours in _PREFIXES:
            if path.startswith(theirs):
                found.append(ours + path[len(theirs) :])
        for theirs, ours in self._parts:
            found += [new for p in found if (new := _replaced(p, theirs, ours)) != p]
        return found


def _remote_dtypes(name: str) -> dict[str, str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = HfApi().get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        return {}
    except Exception as error:  # huggingface_hub raises its own errors, httpx's and OSError
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name}: the headers of its weight files cannot be read ({first[0][:200]})", "Check the network."
        ) from None
    return {key: tensor.dtype for file in found.files_metadata.values() for key, tensor in file.tensors.items()}


def _replaced(path: str, old: str, new: str) -> str:
    """``path`` with ``old`` replaced by ``new``; each is one or more whole dotted parts."""
    return f".{path}.".replace(f".{old}.", f".{new}.")[1:-1]
