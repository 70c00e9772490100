"""State dicts in PyTorch's and safetensors files: their tensor names, tensors, and adapters made from them.

Formats are recognised by the names of their tensors. ``tensor_names`` gets them without reading an array.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, explicit_config, raise_faults
from ..config import AdapterConfig
from ..errors import ConfigError, FormatError
from .files import read_safetensors
from .options import ReadOptions
from .torch.read import is_pickle, peek_torch, read_torch
from .torch.tensors import TensorRef

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".lora")
# The keys under which training systems store the state dict in their files.
_CONTAINERS = ("state_dict", "model", "module", "model_state_dict")


def tensor_names(path: Path) -> tuple[str, frozenset[str]]:
    """(key of the state dict in the file, or ""; names of its tensors). No names for a file of another kind.

    Raises: FormatError: a PyTorch file that is damaged or would run code.
    """
    if not path.is_file():
        return "", frozenset()
    stat = path.stat()
    return _tensor_names(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)  # cached, because every format looks at the same file
def _tensor_names(path: Path, _modified: int, _size: int) -> tuple[str, frozenset[str]]:
    if path.suffix.lower() == ".safetensors":
        return "", frozenset(read_safetensors(path))
    if path.suffix.lower() not in SUFFIXES or not is_pickle(path):
        return "", frozenset()
    container, state = _find_state(peek_torch(path))
    return container, frozenset(k for k, v in state.items() if isinstance(k, str) and isinstance(v, TensorRef))


def _find_state(value: Any) -> tuple[str, dict]:
    if not isinstance(value, dict):
        return "", {}
    key = next((key for key in _CONTAINERS if isinstance(value.get(key), dict)), "")
    return key, value[key] if key else value


def read_state(path: Path) -> dict[str, mx.array]:
    """The tensors of the state dict in a file."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(the tensors of the state dict, everything in the file)."""
    if path.suffix.lower() == ".safetensors":
        return read_safetensors(path), {}
    value = read_torch(path)
    _, state = _find_state(value)
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, mx.array)}, value


def has_tensor(path: Path | None, pattern: re.Pattern) -> bool:
    """Whether a file has a tensor whose name contains ``pattern``."""
    return path is not None and any(pattern.search(name) for name in tensor_names(path)[1])


def only_file(path: Path, patterns: tuple[str, ...]) -> Path | None:
    """``path`` itself if it is a file, or the only file in folder ``path`` that matches a pattern."""
    if path.is_file():
        return path
    found = [file for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]
    return found[0] if len(found) == 1 else None


def low_rank_adapter(
    weights: dict[str, mx.array],
    source: Path,
    options: ReadOptions,
    *,
    alpha: float | None = None,
    scales: dict[str, float] | None = None,
    base: str | None = None,
    alpha_hint: str = "Give it: --alpha, or alpha= (scale * rank).",
    **settings: Any,
) -> Adapter:
    """An adapter from arrays with our names and layout. Their ranks are read from the arrays.

    Args:
        source: names the file in errors.
        alpha: the alpha of all modules (scale = alpha / rank); ``options.alpha`` by default. One of them is needed.
        scales: scales by module, in place of alpha.
        alpha_hint: hint if there is no alpha.
        settings: further fields of ``AdapterConfig``.
    """
    paths = sorted({name.removesuffix(".lora_b") for name in weights if name.endswith(".lora_b")})
    ranks = {path: weights[f"{path}.lora_b"].shape[-1 if weights[f"{path}.lora_b"].ndim == 3 else 0] for path in paths}
    empty = [f"{path}: empty arrays; gather sharded weights before saving" for path, rank in ranks.items() if not rank]
    nothing = [] if paths else [f"{source}: has no adapter"]
    raise_faults(empty or nothing, "Save it again, gathered and with its lora_A and lora_B.", FormatError)
    alpha = options.alpha if alpha is None else alpha
    unknown = ["scale"] if scales is None and alpha is None else []
    if unknown:
        options.need(f"{source}: does not store the adapter's alpha", alpha_hint)
    if scales is None:
        scales = {path: 1.0 if alpha is None else alpha / ranks[path] for path in paths}
    method = "dora" if any(name.endswith(".m") for name in weights) else "lora"
    try:
        config = explicit_config(
            AdapterConfig(method=method, num_layers=-1, **settings), ranks, scales, rank=max(ranks.values())
        )
    except ConfigError as error:
        raise FormatError(
            f"{source}: {error.message}", "Give the alpha that it was trained with, or save or download it again."
        ) from None
    name = base or (options.base.name if options.base else None)
    return Adapter(config, weights, base=name, metadata={"unknown": unknown} if unknown else {})
