"""Writing a merged model as a GGUF file, with mlx-lm's writer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.names import BaseModel
from ..errors import FormatError
from ..formats.files import write_file

_FAMILIES = ("llama", "mistral", "mixtral")  # those that mlx-lm's writer supports


def check_gguf(base: BaseModel, dtype: str | None) -> None:
    """Refuse a model or dtype that mlx-lm's writer does not support. Raises: FormatError."""
    family = base.config["model_type"]
    if family not in _FAMILIES or dtype not in (None, "float16"):
        raise FormatError(
            f"mlx-lm writes GGUF files of {', '.join(_FAMILIES)} in float16, not of {family} in {dtype or 'float16'}",
            "Write a folder, and convert it with llama.cpp's convert_hf_to_gguf.py.",
        )
    if base.config.get("attention_bias") or base.config.get("mlp_bias"):
        raise FormatError("mlx-lm's GGUF writer permutes the biases of q and k wrongly", "Write a folder instead.")


def write_gguf(target: Path, tensors: Iterable[tuple[str, mx.array]], config: dict[str, Any], tokenizer: Path) -> None:
    """Write ``tensors``, by transformers' names, in float16.

    Args:
        config: the model's ``config.json``.
        tokenizer: the folder with the tokenizer's files.

    Raises: FormatError: mlx-lm cannot write this model.
    """
    from mlx_lm.gguf import convert_to_gguf

    weights = {name: array.astype(mx.float16) for name, array in tensors}

    def write(temporary: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_gguf(tokenizer, weights, {**config, "quantization": None}, str(temporary))

    try:
        write_file(target, write)
    except (ValueError, KeyError, TypeError, AssertionError, NotImplementedError) as error:
        raise FormatError(f"mlx-lm cannot write this model as GGUF ({error})", "Write a folder instead.") from None
