"""Writing model folders that mlx-lm loads. Folders for transformers are written by ``merge/export.py``."""

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

from ..errors import MLXLoRAError, ModelError
from .locking import check_unlocked
from .modules import is_quantized, total_bytes
from .nf4_checkpoint import CheckpointView, nf4_config
from .nf4_linear import NF4Linear
from .origin import base_of
from .writing import existing, failed_write, writing

# Files of a model folder besides its weights; copied unchanged when a model is saved.
SMALL_FILES = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


def check_target(
    path: str | Path, overwrite: bool = False, error: type[MLXLoRAError] = ModelError, *, model: bool = False
) -> None:
    """Refuse a target folder that is a file, that cannot be created, or that is not empty (unless ``overwrite``).

    Args:
        model: whether a model is written, which replaces the whole folder; then refuse a folder with an adapter.

    Raises: ``error``.
    """
    path = Path(path)
    if model and Path.cwd().resolve().is_relative_to(path.resolve()):
        raise error(f"{path}: is the current folder, or contains it", "Name a new folder, such as my_model.")
    if path.exists() and not (path.is_dir() and (overwrite or not any(path.iterdir()))):
        raise error(f"{path}: already exists", "Choose another folder, or add --force to replace a folder.")
    if model and path.is_dir() and any([*path.glob("adapter*"), *path.glob("*/adapter*")]):
        raise error(f"{path}: holds an adapter, which the model would replace", "Choose another folder.")
    check_writable(path, error)
    check_unlocked(path, error)


def check_writable(path: Path, error: type[MLXLoRAError] = ModelError) -> None:
    """Refuse a folder if nothing can be created in it or in its first existing parent. Raises: ``error``."""
    try:
        tempfile.TemporaryDirectory(prefix=".mlx-lora-", dir=existing(path)).cleanup()
    except OSError as problem:
        raise failed_write(path, problem, error) from None


def write_model(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write ``model``, which must have no adapter, as a model folder with its tokenizer files. Raises: ModelError."""
    base, folder = base_of(model), Path(path)
    if base is None:
        raise ModelError(
            "the model was not loaded by mlx_lora.load, so its config and tokenizer are unknown",
            "Load it with mlx_lora.load(path_or_repo).",
        )
    from mlx_lm.utils import save_config, save_model

    def fill(temporary: Path) -> None:
        save_model(temporary, CheckpointView(model))
        save_config(saved_config(model, base.config), temporary / "config.json")

    return write_model_folder(folder, base.folder, fill, overwrite, needed=total_bytes(model))


def write_model_folder(
    folder: Path, base: Path, fill: Callable[[Path], None], overwrite: bool = False, *, needed: int | None = None
) -> Path:
    """Make ``folder`` from what ``fill`` writes and the small files (tokenizer, license) of the folder ``base``.

    A failure leaves ``folder`` as it was.

    Args:
        needed: approximate bytes that ``fill`` writes.

    Raises: ModelError.
    """
    check_target(folder, overwrite, model=True)
    if folder.exists() and base.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder}: contains the base model itself", "Choose another folder.")
    kept = f"{folder} is unchanged." if folder.exists() else ""
    with writing(folder, ModelError, needed=needed, kept=kept):
        _replace_folder(folder, base, fill)
    return folder


def _replace_folder(folder: Path, base: Path, fill: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for pattern in SMALL_FILES:
            for file in base.glob(pattern):
                if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, temporary / file.name)
        fill(temporary)
        os.chmod(temporary, 0o755)
        if folder.exists():
            # Rename the old folder before deleting it: after any failure, the old or the new folder is then complete.
            os.replace(folder, old := temporary.with_name(temporary.name + "-old"))
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def saved_config(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with a quantization section for the current modules of ``model``."""
    config = {name: value for name, value in config.items() if name != "_name_or_path"}  # often a path of this machine
    settings, nf4 = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            nf4[path] = module
        elif is_quantized(module):
            settings[path] = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            if module.get("global_scale") is not None:
                settings[path]["global_scale"] = True
    bitnet = config.get("quantization_config", {}).get("quant_method") == "bitnet"  # mlx-lm builds these layers itself
    if not bitnet:
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
