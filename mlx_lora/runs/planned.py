"""The plan of a run before it starts: report it, and refuse a run that does not fit into memory."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.names import BaseModel
from ..base.origin import base_of
from ..config import DataConfig
from ..device import memory_limit
from ..errors import MLXLoRAError, TrainingError
from ..planning import speed
from ..planning.bare import base_named
from ..planning.machines import MARGIN
from ..planning.plan import Plan, suggestion
from ..planning.plan import plan_of as make_plan
from .reports import Planned, Warned
from .settings import Settings

_FORCE = "To train all the same, add --force (in Python force=True)."


def check_weights(settings: Settings) -> None:
    """Refuse a model whose weight files are larger than what MLX can use. Raises: TrainingError, unless forced."""
    if isinstance(settings.model, tuple) or settings.force:
        return
    try:
        folder = base_named(settings.model).folder
    except MLXLoRAError:  # loading reports what is wrong
        return
    if folder is None:  # loading downloads it
        return
    size, limit = sum(file.stat().st_size for file in folder.glob("model*.safetensors")), memory_limit()
    if size > limit:
        raise TrainingError(
            f"{settings.model}: its weights alone are {size / 1e9:.1f} GB, and MLX can use {limit / 1e9:.1f} GB here",
            f"Use a model with 4-bit weights, or a smaller one. {_FORCE}",
        )


def plan_run(settings: Settings, model: nn.Module, sets: Any):
    """Yield the plan; return it, or None if no plan could be made. Raises: TrainingError if the run does not fit."""
    limit, world = memory_limit(), mx.distributed.init().size()
    base = base_of(model)
    if base is None or base.folder is None:
        yield Planned(None, limit, reason="the model was not loaded from a folder")
        return None
    name = BaseModel(base.folder)
    length = settings.data.max_seq_length if isinstance(settings.data, DataConfig) else DataConfig.max_seq_length
    try:
        found = make_plan(name, base.name, sets, length, settings.adapter, settings.optimizer, settings.train, world)
    except MLXLoRAError as error:
        yield Planned(None, limit, reason=error.message.splitlines()[0][:200])
        return None
    except Exception as error:  # a failed plan must not prevent training
        if os.environ.get("MLX_LORA_DEBUG"):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield Planned(None, limit, reason=reason)
        yield Warned(f"the plan of this run failed ({reason}), which is a bug: please report it. The run goes on.")
        return None
    padding = found.epoch.padding if found.epoch else None
    limit = found.limit
    yield Planned(found.memory.peak, limit, found.trainable, found.iters, found.epochs, padding, found.seconds)
    if found.memory.peak > limit and not settings.force:
        flags = suggestion(name, settings.adapter, settings.optimizer, settings.train, found)
        advice = f"It fits with {', '.join(flags)}. " if flags else "No setting that was tried makes it fit here. "
        raise TrainingError(
            f"this run needs about {found.memory.peak / 1e9:.1f} GB at its peak, and MLX can use {limit / 1e9:.1f} GB "
            "here",
            advice + _FORCE,
        )
    if not found.fits and found.memory.peak <= limit:
        yield Warned(
            f"the peak is planned as {found.memory.peak / 1e9:.1f} GB of the {limit / 1e9:.1f} GB that MLX can use "
            f"here; a plan may be {100 * MARGIN:g} % too low"
        )
    return found


def keep_speed(plan: Plan | None, done: Any, state: Any) -> None:
    """Record how fast this machine trained, for the time estimate of the next plan."""
    if plan is None or plan.epoch is None:
        return
    iterations = done.iteration - (state.iteration if state is not None else 0)
    speed.keep(plan.flops_per_step, iterations, done.seconds)
