"""Whether a model's output head is tied to its embedding, according to its config and its checkpoint.

mlx-lm's classes drop a checkpoint's head where ``tie_word_embeddings`` is true or, for many classes, not stated.
transformers has other defaults, and since version 5 it keeps a head whose weight is not the embedding's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ModelError

FLAG = "tie_word_embeddings"
INPUT_EMBEDDING = re.compile(r"(^|\.)(wte|embed_tokens|embed_in|(word|tok)_embeddings|embeddings?)\.weight$")
# A head's name is not preceded by a layer number.
OUTPUT_HEAD = re.compile(r"^([a-z_]+\.)*(lm_head|embed_out|output|output_layer|head|ff_out)\.([a-z_]+\.)?weight$")
_VISION = re.compile(r"vision|visual|audio|image|multi_modal")
# Of mlx-lm's model types, those that transformers 5 ties by default.
_TIED = {"ernie4_5", "ernie4_5_moe", "falcon_mamba", "mamba", "minicpm3", "gpt2", "gpt_bigcode", "recurrent_gemma"}
_TIED |= {"cohere", "cohere2", "lfm2", "lfm2_moe", "lfm2_vl", "mistral3", "smollm3", "starcoder2", "kimi_k25"}
_TIED |= {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"}
_TIED |= {"gemma4_unified", "gemma4_unified_text"}


def tensor_files(folder: Path | None) -> dict[str, Path]:
    """The safetensors file in ``folder`` that contains each tensor, by name. Raises: ModelError."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder else []:
        try:
            with safe_open(file, framework="numpy") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({error})", "Download the model again.") from None
    return found


def stated_tie(config: dict[str, Any]) -> bool | None:
    """What ``config`` says about tying. Since version 5, transformers reads the top level, not the text part."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    newer = str(config.get("transformers_version", "")) >= "5"
    whole, part = config.get(FLAG), text.get(FLAG)
    return whole if whole is not None and (newer or part is None) else part


def is_tied(config: dict[str, Any], files: dict[str, Path]) -> bool:
    """Whether the head is the embedding. A checkpoint's head with its own weight is used even if the config ties it.

    Args:
        files: as ``tensor_files`` returns them; may be empty.
    """
    stated = stated_tie(config)
    tied = config.get("model_type") in _TIED if stated is None else bool(stated)
    head = next((name for name in sorted(files) if is_head(name)), None)
    if head is None:
        return tied or (bool(files) and stated is None)
    return tied and _same(files, head)


def tie_fields(config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """Config fields that state the result of ``is_tied``, if ``config`` contradicts it or does not say."""
    tied, text = is_tied(config, files), config.get("text_config")
    found: dict[str, Any] = {} if config.get(FLAG) is tied else {FLAG: tied}
    if isinstance(text, dict) and text.get(FLAG) is not tied:
        found["text_config"] = {**text, FLAG: tied}
    return found


def is_head(name: str) -> bool:
    """Whether a checkpoint's tensor ``name`` is the weight of the output head."""
    return bool(OUTPUT_HEAD.match(name)) and not _VISION.search(name)


def _same(files: dict[str, Path], head: str) -> bool:
    import mlx.core as mx

    embedding = next((name for name in sorted(files) if INPUT_EMBEDDING.search(name)), None)
    if embedding is None:
        return True
    one, other = (mx.load(str(files[name]))[name] for name in (head, embedding))
    return one.shape == other.shape and one.dtype == other.dtype and mx.array_equal(one, other).item()
