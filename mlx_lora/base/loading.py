"""Loading base models and their tokenizers from folders and the Hub, through mlx-lm's loader. Nothing prints."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..errors import ConfigError, MLXLoRAError, ModelError
from .classes import model_classes
from .config import missing_fields, read_config
from .differences import known_differences
from .downloads import download_hint
from .files import check_weight_files
from .heads import stated_tie, tensor_files, tie_fields
from .nf4_checkpoint import check_bitsandbytes
from .origin import Base, set_base
from .saving import SMALL_FILES
from .writing import WRITE_ERRORS, failed_write

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def check_dtype(dtype: str | None) -> None:
    """Refuse a name that is not in ``DTYPES``. None means the model's own dtype."""
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
            f"{path_or_repo}: needs to run its own code ({config['model_file']!r})",
            "If you have read the code and trust it, add --trust-remote-code.",
        )
    # Older versions of mlx-lm run such code without asking and lack this argument.
    supported = "trust_remote_code" in inspect.signature(utils.load_model).parameters
    options = {"trust_remote_code": True} if trust_remote_code and supported else {}
    check_bitsandbytes(path_or_repo, config)
    check_weight_files(path_or_repo, folder)
    fields = missing_fields(config)
    whole = {**config, **fields}
    ties = tie_fields(whole, tensor_files(folder))
    try:
        model, config = utils.load_model(
            folder, lazy=True, model_config={**fields, **ties}, get_model_classes=model_classes, **options
        )
        tokenizer = utils.load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # mlx-lm and transformers raise many kinds of errors on damaged or unknown folders
        reason = error.message if isinstance(error, MLXLoRAError) else _first_line(error)
        raise ModelError(f"{path_or_repo}: cannot be loaded ({reason})", _load_hint(error)) from error
    if stated_tie(whole) and ties:
        warnings.warn(
            f"{path_or_repo}: its config ties the output head to the embedding, but its checkpoint has a head with "
            "another weight, which is used",
            stacklevel=2,
        )
    for difference in known_differences(config):
        warnings.warn(f"{path_or_repo}: {difference}", stacklevel=2)
    if dtype in DTYPES or (dtype == "auto" and device.is_cpu()):
        model.set_dtype(DTYPES.get(dtype, mx.float32))
    set_base(model, Base(str(path_or_repo), folder, config))
    if not lazy:
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise ModelError(
                f"{path_or_repo}: its weights cannot be read ({_first_line(error)})",
                "Download its *.safetensors files again.",
            ) from error
    model.eval()
    return model, tokenizer


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model. A repository of the Hub is downloaded."""
    name = str(path_or_repo)
    if not name.strip():
        raise ModelError(f"{name!r}: no such folder", "Give a local folder, or a repository on the Hub.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{name}: is a file", "Name the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise ModelError(f"{name}: no such folder", "Give a local folder, or a repository such as Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download

    patterns = [p for p in SMALL_FILES if not p.startswith(("LICENSE", "NOTICE"))] + ["model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises its own errors, httpx's and OSError
        if getattr(error, "errno", None) in WRITE_ERRORS:
            raise failed_write(Path(error.filename or folder_of_downloads()), error, ModelError) from error
        raise ModelError(
            f"{name}: no such folder, and the repository cannot be downloaded ({_first_line(error)})",
            download_hint(error),
        ) from error


def folder_of_downloads() -> Path:
    """Where huggingface-hub keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _load_hint(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "The tokenizer needs to run its own code. If you trust it, add --trust-remote-code."
    if isinstance(error, MLXLoRAError):
        return error.hint
    return (
        "The files are complete: mlx-lm or the tokenizer's library does not read them. Try a newer mlx-lm "
        "(pip install -U mlx-lm) and transformers."
    )
