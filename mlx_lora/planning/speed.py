"""How fast this machine trains: operations per second of its last runs, kept in the user's cache folder.

A small step takes longer than its operations suggest, because launching them takes most of the time. So runs are
stored by the size of their steps, and a plan uses the run whose steps are nearest in size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..device import cache_folder, chip, is_cpu

_FEWEST = 20  # iterations: in shorter runs, compiling the step takes most of the time


def step_flops(forward: float, tokens: float, method: str, grad_checkpoint: bool) -> float:
    """Operations of a training step, without attention: forward, backward, and recomputation.

    Args:
        forward: operations of a token's forward pass. tokens: number in a batch, with padding.
    """
    passes = 2 + (method == "full") + grad_checkpoint  # the gradient of frozen weights is not computed
    return forward * tokens * passes


def measured(flops_per_step: float) -> float | None:
    """Operations per second of this device's run with the most similar step size; None without any run."""
    rates = _known().get(_device())
    if not isinstance(rates, dict):
        return None
    rates = {int(size): rate for size, rate in rates.items() if size.isdecimal() and isinstance(rate, (int, float))}
    rates = {size: rate for size, rate in rates.items() if rate > 0}
    return float(rates[min(rates, key=lambda size: abs(size - _size(flops_per_step)))]) if rates else None


def keep(flops_per_step: float, iterations: int, seconds: float) -> None:
    """Store the speed of a run, unless the run is short."""
    if iterations < _FEWEST or seconds <= 0 or flops_per_step <= 0:
        return
    known = _known()
    rates = known.get(_device())
    rates = rates if isinstance(rates, dict) else {}
    known[_device()] = {**rates, str(_size(flops_per_step)): flops_per_step * iterations / seconds}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        _file().write_text(json.dumps(known, indent=1), encoding="utf-8")
    except OSError:  # a cache that cannot be written must not stop the run
        return


def _size(flops_per_step: float) -> int:
    """The power of ten nearest to the operations of a step."""
    return round(math.log10(max(flops_per_step, 1.0)))


def _known() -> dict:
    """The file's content: {device: {step size: operations per second}}. Empty if it is unreadable."""
    try:
        known = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _file() -> Path:
    return cache_folder() / "training_speed.json"


def _device() -> str:
    return f"{chip()}, {'CPU' if is_cpu() else 'GPU'}"
