"""Models into folders that mlx-lm loads, whole or not at all. Transformers' folders are ``exporting.py``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import ModelError
from .modules import is_quantized
from .nf4_checkpoint import nf4_config, stored_names
from .nf4_linear import NF4Linear
from .origin import base_of

# What a model folder needs besides its weights; copied as they are when a model is saved.
BESIDE = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


def write_model(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write ``model``, which has no adapters on it, as a model folder with its tokenizer files. Raises: ModelError."""
    base, folder = base_of(model), Path(path)
    if base is None:
        raise ModelError(
            "the model was not loaded by mlx_lora.load: its config and tokenizer are not known",
            "Load it with mlx_lora.load(path_or_repo).",
        )
    from mlx_lm.utils import save_config, save_model

    def fill(temporary: Path) -> None:
        save_model(temporary, stored_names(model))
        save_config(saved_config(model, base.config), temporary / "config.json")

    return write_model_folder(folder, base.folder, fill, overwrite)


def write_model_folder(folder: Path, base: Path, fill: Callable[[Path], None], overwrite: bool = False) -> Path:
    """A folder with what ``fill`` writes into it and the tokenizer's and other small files of the folder ``base``.

    It appears whole or not at all. Raises: ModelError.
    """
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ModelError(f"{folder}: is there already", "Choose another folder, or add --force.")
    if folder.exists() and base.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder}: the base model itself lies there", "Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for pattern in BESIDE:
            for file in base.glob(pattern):
                if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, temporary / file.name)
        fill(temporary)
        os.chmod(temporary, 0o755)
        if folder.exists():
            # Renamed before it is deleted: whatever fails, the old or the new folder is whole.
            os.replace(folder, old := temporary.with_name(temporary.name + "-old"))
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
        raise ModelError(
            f"{folder}: cannot be written ({error})", "Free some space, or choose another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def saved_config(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its quantization section telling what the modules of ``model`` are now."""
    config = dict(config)
    settings, nf4 = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            nf4[path] = module
        elif is_quantized(module):
            settings[path] = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            if module.get("global_scale") is not None:
                settings[path]["global_scale"] = True
    foreign = config.get("quantization_config", {}).get("quant_method") == "bitnet"  # layers that mlx-lm makes itself
    if not foreign:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    if settings:
        common = Counter(json.dumps(s, sort_keys=True) for s in settings.values()).most_common(1)[0][0]
        default = json.loads(common)
        config["quantization"] = {**default, **{path: s for path, s in settings.items() if s != default}}
        config["quantization_config"] = config["quantization"]
    if nf4:
        config["quantization_config"] = nf4_config(model, nf4)
    return config
