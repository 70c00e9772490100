"""Models with their adapters, from and to disk: the public ``load`` and ``save_model``. Nothing prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.loading import load_base, resolve
from ..base.saving import write_model
from ..errors import ModelError
from ..fast import accelerate
from ..formats import detect_format, load_adapter
from .attach import mount
from .state import state_of, wrappers


def load(
    path_or_repo: str | Path,
    adapter_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer through mlx-lm, and mount an adapter of any format.

    Args:
        path_or_repo: a local folder, or a repository on the Hugging Face Hub.
        adapter_path: folder of an adapter.
        dtype: ``auto``: as stored, but float32 on a CPU, where MLX computes half precision and quantized products some
            hundred times slower (quantized weights keep their values). ``stored``: as in the files on every device.
            Else ``float32``, ``float16`` or ``bfloat16``.
        revision: of the repository.
        trust_remote_code: run Python files of the model folder. Off unless asked for.
        lazy: leave weights on disk until they are used.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ModelError: no such model, damaged files, an unknown architecture. AdapterError, FormatError: the adapter.
    """
    if adapter_path is not None:
        detect_format(adapter_path)  # before a base is downloaded for it
    folder = resolve(path_or_repo, revision)
    adapter = load_adapter(adapter_path, base=folder) if adapter_path is not None else None
    model, tokenizer = load_base(
        path_or_repo, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, lazy=lazy
    )
    accelerate(model)
    if adapter is not None:
        mount(model, adapter)
    return model, tokenizer


def save_model(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write ``model``, loaded by ``load``, as a model folder that mlx-lm loads; its tokenizer files come along.

    Adapters must be fused or unmounted first. The folder appears complete or not at all.

    Raises: ModelError.
    """
    if wrappers(model) or (state_of(model) is not None and state_of(model).config.method != "full"):
        raise ModelError("the model has adapters on it", "Merge them with fuse(model), or call unmount(model).")
    return write_model(model, path, overwrite)
