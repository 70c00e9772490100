"""State dicts in files: PyTorch's and safetensors, looked into before they are read.

What a file is shows in the names of its tensors; ``names`` tells them without reading an array.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults
from ..base.names import BaseModel
from ..config import AdapterConfig
from ..errors import ConfigError, FormatError
from .files import read_safetensors
from .options import Reading
from .torch.read import is_pickle, peek_torch, read_torch
from .torch.tensors import TensorRef

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".lora")
# Where training systems put the state dict in their files.
_CONTAINERS = ("state_dict", "model", "module", "model_state_dict")


def names(path: Path) -> tuple[str, frozenset[str]]:
    """(key of the state dict in the file, or ""; names of its tensors). Empty for a file of another kind.

    Raises: FormatError: a PyTorch file that is damaged or wants to run code.
    """
    if not path.is_file():
        return "", frozenset()
    stat = path.stat()
    return _names(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=32)  # every format looks at the same file
def _names(path: Path, _modified: int, _size: int) -> tuple[str, frozenset[str]]:
    if path.suffix == ".safetensors":
        return "", frozenset(read_safetensors(path))
    if path.suffix not in SUFFIXES or not is_pickle(path):
        return "", frozenset()
    value = peek_torch(path)
    container, state = _state(value)
    return container, frozenset(k for k, v in state.items() if isinstance(k, str) and isinstance(v, TensorRef))


def _state(value: Any) -> tuple[str, dict]:
    if not isinstance(value, dict):
        return "", {}
    for key in _CONTAINERS:
        if isinstance(value.get(key), dict):
            return key, value[key]
    return "", value


def read_state(path: Path) -> dict[str, mx.array]:
    """The tensors of a state dict, wherever in the file it lies."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(the tensors of the state dict, the whole of what the file holds)."""
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    value = read_torch(path)
    _, state = _state(value)
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, mx.array)}, value


def matching(path: Path, pattern: re.Pattern) -> bool:
    """Whether a file holds a tensor whose name ``pattern`` finds."""
    return any(pattern.search(name) for name in names(path)[1])


def sole_file(path: Path, *patterns: str) -> Path | None:
    """``path`` itself if it is a file, or the one file in folder ``path`` that fits a pattern."""
    if path.is_file():
        return path
    found = [file for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]
    return found[0] if len(found) == 1 else None


def low_rank(
    weights: dict[str, mx.array],
    source: Path,
    options: Reading,
    *,
    alpha: float | None = None,
    scales: dict[str, float] | None = None,
    base: str | None = None,
    **knobs: Any,
) -> Adapter:
    """An adapter from arrays named and turned as ours, its ranks read from them.

    Args:
        alpha: the alpha of all modules (scale = alpha / rank); ``options.alpha`` by default, else it is asked for.
        scales: scales by module, in place of alpha.
        knobs: further fields of ``AdapterConfig``.
    """
    missing = []
    if scales is None:
        alpha = options.alpha if alpha is None else alpha
        if alpha is None:
            options.need(f"{source}: does not tell the adapter's alpha", "Give it: --alpha, or alpha= (scale * rank).")
            missing = ["scale"]
    paths = sorted({name.removesuffix(".lora_b") for name in weights if name.endswith(".lora_b")})
    ranks = {path: weights[f"{path}.lora_b"].shape[-1 if weights[f"{path}.lora_b"].ndim == 3 else 0] for path in paths}
    empty = [f"{path}: empty arrays; gather sharded weights before saving" for path, rank in ranks.items() if not rank]
    nothing = [] if paths else [f"{source}: holds no adapter"]
    raise_faults(empty or nothing, "Save it again, gathered and with its lora_A and lora_B.", FormatError)
    if scales is None:
        scales = {path: (alpha if alpha is not None else ranks[path]) / ranks[path] for path in paths}
    rank, scale = max(ranks.values()), scales[paths[0]]
    method = "dora" if any(name.endswith(".m") for name in weights) else "lora"
    try:
        config = AdapterConfig(
            method=method,
            rank=rank,
            scale=scale,
            num_layers=-1,
            rank_pattern={f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
            scale_pattern={f"^{re.escape(p)}": s for p, s in scales.items() if s != scale},
            **knobs,
        )
    except ConfigError as error:
        raise FormatError(
            f"{source}: {error.message}", "Give the alpha that it was trained with, or save or download it again."
        ) from None
    name = base or (options.base.name if options.base else None)
    return Adapter(config, weights, base=name, metadata={"open": missing} if missing else {})


def translator(base: BaseModel | None):
    """transformers' path of a module -> mlx-lm's."""
    return base.to_mlx if base is not None and base.known else lambda path: path
