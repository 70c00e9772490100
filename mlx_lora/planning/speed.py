"""How fast this machine trains: the operations a second of its last runs, kept in the user's cache folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..device import cache_folder, chip, is_cpu

_FEWEST = 20  # iterations: in shorter runs compiling the step takes most of the time


def step_flops(forward: float, tokens: float, method: str, grad_checkpoint: bool) -> float:
    """Operations of a training step, without attention: forward, backward, and what is computed again.

    Args:
        forward: operations of a token's forward pass. tokens: of a batch, with padding.
    """
    passes = 2 + (method == "full") + grad_checkpoint  # the gradient of frozen weights is not computed
    return forward * tokens * passes


def measured() -> float | None:
    """Operations a second of the last run on this device; None where there was none."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8")).get(_device())
    except (OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, (int, float)) and found > 0 else None


def keep(flops_per_step: float, iterations: int, seconds: float) -> None:
    """Remember the speed of a run; of a short one nothing."""
    if iterations < _FEWEST or seconds <= 0 or flops_per_step <= 0:
        return
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    known[_device()] = flops_per_step * iterations / seconds
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(known, indent=1), encoding="utf-8")
    except OSError:  # a cache that cannot be written is no fault of the run
        return


def _file() -> Path:
    return cache_folder() / "training_speed.json"


def _device() -> str:
    return f"{chip()}, {'CPU' if is_cpu() else 'GPU'}"
