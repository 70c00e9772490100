"""Models from folders and the Hub, with their tokenizers: the one door to mlx-lm's loader. Nothing prints."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..errors import ConfigError, MLXLoRAError, ModelError
from .config import missing_fields
from .nf4_checkpoint import load_classes, refuse_foreign
from .origin import Base, set_base
from .saving import BESIDE

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def check_dtype(dtype: str | None) -> None:
    """Refuse a name that is not among ``DTYPES``; None stands for the model's own."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}", "Leave dtype out to keep the model's own."
        )


def load_base(
    path_or_repo: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, Any]:
    """A base model, in evaluation mode, and its tokenizer. Arguments and errors as in ``model.loading.load``."""
    if dtype not in ("auto", "stored", *DTYPES):
        raise ConfigError(
            f"dtype must be one of auto, stored, {', '.join(DTYPES)}, not {dtype!r}",
            "Leave dtype out for auto: as stored, but float32 on a CPU.",
        )
    folder = resolve(path_or_repo, revision)
    config = read_config(folder)

    from mlx_lm import utils

    if "model_file" in config and not trust_remote_code:
        raise ModelError(
            f"{path_or_repo}: wants to run its own code ({config['model_file']!r})",
            "If you have read and trust it: --trust-remote-code.",
        )
    # Older versions of mlx-lm run such code without asking, and know no such argument.
    knows = "trust_remote_code" in inspect.signature(utils.load_model).parameters
    options = {"trust_remote_code": True} if trust_remote_code and knows else {}
    refuse_foreign(path_or_repo, config)
    classes = {"get_model_classes": load_classes(utils._get_classes)}
    try:
        model, config = utils.load_model(folder, lazy=True, model_config=missing_fields(config), **classes, **options)
        tokenizer = utils.load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # whatever a damaged or foreign folder provokes in mlx-lm and transformers
        raise ModelError(f"{path_or_repo}: cannot be loaded ({_first_line(error)})", _load_hint(error)) from error
    if dtype in DTYPES or (dtype == "auto" and device.is_cpu()):
        model.set_dtype(DTYPES.get(dtype, mx.float32))
    set_base(model, Base(str(path_or_repo), folder, config))
    if not lazy:
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise ModelError(
                f"{path_or_repo}: its weights cannot be read ({_first_line(error)})",
                "Download its *.safetensors again.",
            ) from error
    model.eval()
    return model, tokenizer


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded from the Hub where the name is a repository's."""
    name = str(path_or_repo)
    if not name.strip():
        raise ModelError("no model is named: no such folder", "Give a local folder, or a repository of the Hub.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{name}: is a file", "Name the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise ModelError(f"{name}: no such folder", "Give a local folder, or a repository such as Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download

    patterns = [p for p in BESIDE if not p.startswith(("LICENSE", "NOTICE"))] + ["model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises its own, httpx's and OSError
        raise ModelError(
            f"{name}: no such folder, and the repository cannot be had ({_first_line(error)})",
            "Check the name and the network; a model that was downloaded before loads with HF_HUB_OFFLINE=1.",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: holds no config.json", "Name the folder of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})", "Download the file again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path}: names no model_type", "Name the folder of a Hugging Face language model.")
    return config


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _load_hint(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "The tokenizer wants to run its own code. If you trust it: --trust-remote-code."
    if isinstance(error, MLXLoRAError):
        return error.hint
    if "not supported" in text:
        return "This architecture is not in mlx-lm: try a newer one (pip install -U mlx-lm)."
    return "Download the model again; the folder needs config.json, *.safetensors and a tokenizer."
