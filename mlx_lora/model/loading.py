"""Loading models with adapters, and saving models: the public ``load`` and ``save_model``. Nothing prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.loading import load_base, resolve
from ..base.saving import write_model
from ..errors import ConfigError, ModelError
from ..fast import accelerate
from ..formats import detect_format, load_adapter
from ..formats.checkpoints import choose
from .attach import mount
from .state import new_biases, refuse_biases, state_of, wrappers


def load(
    path_or_repo: str | Path,
    adapter_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
    checkpoint: str | int | None = None,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer through mlx-lm, and mount an adapter in any format.

    Args:
        path_or_repo: a local folder, or a repository on the Hugging Face Hub.
        adapter_path: an adapter's folder or file.
        dtype: ``auto``: as stored, but float32 on a CPU, because MLX's half-precision and quantized products are about
            a hundred times slower there (quantized weights keep their values). ``stored``: as in the files, on every
            device. Otherwise ``float32``, ``float16`` or ``bfloat16``.
        revision: of the repository.
        trust_remote_code: allow the model folder's Python files to run.
        lazy: read weights from disk only when they are used.
        checkpoint: if ``adapter_path`` is the folder of a run: ``last``, ``best`` or an iteration. The default is the
            best one, if any.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ModelError: there is no such model, its files are damaged, or its architecture is unknown.
        AdapterError, FormatError: the adapter cannot be read or mounted.
    """
    if not isinstance(adapter_path, (str, Path, type(None))):
        raise ConfigError(
            f"adapter_path must be one path, not a {type(adapter_path).__name__}",
            "Load one adapter, and change it with mount(model, path); merge_adapters combines several.",
        )
    if checkpoint is not None and adapter_path is None:
        raise ConfigError("checkpoint has no effect without adapter_path", "Name the folder of the run.")
    # Chosen and detected before the base is downloaded.
    adapter_path = None if adapter_path is None else choose(adapter_path, checkpoint)
    format = None if adapter_path is None else detect_format(adapter_path)
    folder = resolve(path_or_repo, revision)
    adapter = load_adapter(adapter_path, format, base=folder) if adapter_path is not None else None
    model, tokenizer = load_base(
        path_or_repo, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, lazy=lazy
    )
    accelerate(model)
    if adapter is not None:
        mount(model, adapter)
    return model, tokenizer


def save_model(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write ``model``, loaded by ``load``, and its tokenizer as a model folder that mlx-lm loads.

    Adapters must be fused or unmounted first. If writing fails, nothing is left behind.

    Raises: ModelError.
    """
    state = state_of(model)
    if wrappers(model) or (state is not None and state.config.method != "full"):
        raise ModelError("the model has an adapter", "Merge it with fuse(model), or call unmount(model).")
    refuse_biases(new_biases(model), ModelError)
    return write_model(model, path, overwrite)
