"""Learning rate schedules: a name, whose arguments follow from the run, or mlx-lm's mapping with mlx-lm's meaning."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as opt

from ..errors import ConfigError

Schedule = Callable[[mx.array], mx.array]


def constant(init: float) -> Schedule:
    """The rate `init` at every step."""
    return lambda step: mx.array(init)


# name: (function that makes it, its default arguments for a learning rate and a number of steps)
SHAPES: dict[str, tuple[Callable[..., Schedule], Callable[[float, int], list]]] = {
    "constant": (constant, lambda rate, steps: [rate]),
    "linear_schedule": (opt.linear_schedule, lambda rate, steps: [rate, 0.0, steps]),
    "cosine_decay": (opt.cosine_decay, lambda rate, steps: [rate, steps]),
    "exponential_decay": (opt.exponential_decay, lambda rate, steps: [rate, 0.01 ** (1 / steps)]),  # to 1 %
    "step_decay": (opt.step_decay, lambda rate, steps: [rate, 0.1, math.ceil(steps / 3)]),  # a tenth at each third
}
_NAME_ALONE = "Give only a name, such as cosine_decay: its arguments then follow from learning_rate and iters."
_KEYS = ("name", "arguments", "warmup", "warmup_init")


def build_schedule(spec: Any, learning_rate: float, steps: int, warmup: int = 0) -> float | Schedule:
    """The learning rate of each optimizer step, counted from 0.

    Args:
        spec: None (constant), a name of `SHAPES` (its arguments follow from `learning_rate` and `steps`; linear and
            cosine end at 0), or mlx-lm's mapping `{name, arguments, warmup, warmup_init}`. In the mapping the first
            argument is the initial rate and `learning_rate` is not used, as in mlx-lm; without `arguments` it is.
        steps: optimizer steps in the run.
        warmup: steps of a linear rise from 0 before the schedule. The rise takes `warmup + 1` steps, the first at rate
            0, and the schedule starts after it, as in mlx-lm.

    Returns: the rate itself if it never changes, else a function of the step. Raises: ConfigError.
    """
    mapping = spec if isinstance(spec, dict) else {"name": "constant" if spec is None else spec}
    name, given = mapping.get("name"), mapping.get("arguments")
    faults = [f"lr_schedule: unknown key {key!r}, known are {', '.join(_KEYS)}" for key in mapping if key not in _KEYS]
    if not isinstance(name, str) or name not in SHAPES:
        faults.append(f"lr_schedule must be one of {', '.join(SHAPES)}, not {name!r}")
    if warmup and mapping.get("warmup"):
        faults.append("warmup is given twice: as an option, and in lr_schedule")
    rise = warmup or number(mapping.get("warmup") or 0, "lr_schedule: warmup", faults, whole=True)
    start = number(mapping.get("warmup_init", 0.0), "lr_schedule: warmup_init", faults)
    if faults:
        raise ConfigError("\n".join(faults), _NAME_ALONE)

    make, defaults = SHAPES[name]
    if given is None:
        given = defaults(learning_rate, max(1, steps - (rise + 1 if rise else 0)))
    arguments = _arguments(name, make, given)
    try:
        schedule = make(*arguments)
        if rise:
            climb = opt.linear_schedule(start, arguments[0], rise)
            return opt.join_schedules([climb, schedule], [rise + 1])
    except ValueError as error:
        raise ConfigError(f"lr_schedule: {error}", _NAME_ALONE) from error
    return arguments[0] if name == "constant" else schedule


def _arguments(name: str, make: Callable, given: Any) -> list:
    """The arguments of the schedule `name` as numbers. Raises: ConfigError, with all faults."""
    parameters = list(inspect.signature(make).parameters.values())
    wanted = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    needed = sum(p.default is p.empty for p in parameters)
    if not isinstance(given, (list, tuple)) or not needed <= len(given) <= len(parameters):
        raise ConfigError(f"lr_schedule: the arguments of {name} are [{wanted}], not {given!r}", _NAME_ALONE)
    faults: list[str] = []
    pairs = zip(parameters, given, strict=False)  # the last ones may have defaults
    made = [number(value, f"lr_schedule: {p.name} of {name}", faults, p.annotation is int) for p, value in pairs]
    if faults:
        raise ConfigError("\n".join(faults), _NAME_ALONE)
    return made


def number(value: Any, what: str, faults: list[str], whole: bool = False) -> Any:
    """`value` as a number, also from text (YAML reads 1e-5 as text). `faults` receives what is not a number."""
    try:
        made = float(value) if isinstance(value, str) else value
    except ValueError:
        made = None
    if isinstance(made, bool) or not isinstance(made, (int, float)) or not math.isfinite(made):
        faults.append(f"{what} must be a number, not {value!r}")
    elif whole and made != int(made):
        faults.append(f"{what} must be a whole number, not {value!r}")
    else:
        return int(made) if whole else made
    return 0
