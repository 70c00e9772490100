"""``cache_prefix`` of a run: where the states of frozen layers are kept, their size, and whether they fit.

Nothing is written and no memory is used before the caller receives the report ``PrefixCache``; to decline, close the
run at that report. The file of a stopped or killed run is kept for resuming; a complete run deletes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import TrainConfig
from ..data import Splits
from ..errors import ConfigError
from ..training.prefix import FrozenPrefix
from ..training.prefix_checks import check_settings
from ..training.prefix_states import FileStates
from .reports import PrefixCache, Warned

FILE = "frozen_prefix.states"
_SHARE = 0.8  # share of the free memory that the states may use


def keep_prefix(model: nn.Module, sets: Splits, path: Path, identity: dict[str, Any], config: TrainConfig):
    """Yield the size and warnings; return the ``FrozenPrefix`` of the run in the folder ``path``, or None.

    Raises: ConfigError: the model does not allow it, or the states do not fit.
    """
    if config.cache_prefix == "none":
        return None
    check_settings(config.loss, mx.distributed.init().size())
    prefix = FrozenPrefix(model, sets.train, sets.valid if config.val_batches else None)
    needed, reused = prefix.expected(config.batch_size, config.seed, config.iters, config.val_batches)
    on_disk, file = config.cache_prefix == "disk", path / FILE
    free = _free_disk(path) if on_disk else _free_memory()
    owner = _owner(prefix, identity, config) if on_disk else None
    kept = file.stat().st_size if on_disk and file.exists() else 0  # replaced, or part of what is needed
    if needed > free + kept:
        raise ConfigError(
            f"cache_prefix: the states of the first {prefix.count} layers take about {needed / 1e9:,.3f} GB, and "
            f"{(free + kept) / 1e9:,.3f} GB are free {f'in {path}' if on_disk else 'in memory'}.",
            ("Free some space" if on_disk else "Set --cache-prefix to disk") + ", or leave --cache-prefix out.",
        )
    if reused is None:
        yield Warned("cache_prefix gains little: the run ends within its first epoch, which computes all layers")
    yield PrefixCache(prefix.count, len(prefix.layers), needed, free, str(file) if on_disk else "memory", reused)
    if on_disk:
        prefix.states = FileStates(file, owner, prefix.probe.itemsize)
    return prefix


def drop_states(path: Path) -> None:
    """Delete the file of a complete run in the folder ``path``, if there is one."""
    (path / FILE).unlink(missing_ok=True)


def _owner(prefix: FrozenPrefix, identity: dict[str, Any], config: TrainConfig) -> str:
    """The identity of the states. It includes the states of one row, to detect another device, dtype or library."""
    if None in (digests := [digest for rows, digest in identity["data"].values() if rows]):
        raise ConfigError(
            "cache_prefix 'disk' must know whether the data are the same, and a data set here has no digest.",
            "Give a mlx_lora.data.Dataset, or set cache_prefix to memory.",
        )
    facts = [identity["base"], digests, prefix.count, config.batch_size, prefix.exact, config.grad_checkpoint]
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    found.update(str(prefix.probe.dtype).encode() + np.array(prefix.probe.view(mx.uint8)).tobytes())
    return f"mlx-lora frozen prefix, version 1, {found.hexdigest()}"


def _free_disk(path: Path) -> int:
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _free_memory() -> int:
    """Bytes of memory that the states may use."""
    try:
        with open("/proc/meminfo") as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - mx.get_active_memory()
    return int(_SHARE * free)
