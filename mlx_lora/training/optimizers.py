"""Optimizers made from an ``OptimizerConfig``, and float32 master weights for parameters in half precision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten, tree_map_with_path

from ..config import OPTIMIZERS, OptimizerConfig
from ..errors import ConfigError, TrainingError
from .loraplus import faults_of, loraplus_optimizer
from .schedules import build_schedule, number

_CLASSES = {
    "adam": opt.Adam,
    "adamw": opt.AdamW,
    "sgd": opt.SGD,
    "adafactor": opt.Adafactor,
    "muon": opt.Muon,
    "lion": opt.Lion,
}
# Defaults that differ from MLX's. Without bias correction, Adam's first steps have 3 times the published size.
# Adafactor's defaults ignore the learning rate.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}
_LEAVE_OUT = "Correct these arguments, or leave them out for the optimizer's defaults."
_HALF = (mx.float16, mx.bfloat16)


def build_optimizer(config: OptimizerConfig, steps: int, model: nn.Module | None = None) -> opt.Optimizer:
    """The optimizer that `config` describes.

    Args:
        steps: optimizer steps in the run (iters / grad_accumulation_steps, rounded up), the length of named schedules.
        model: the model to train; LoRA+ needs it to sort its parameters into groups (see `loraplus.py`).

    Adam and AdamW correct their bias unless `optimizer_config` has `bias_correction: false` (MLX's default).
    Adafactor uses the learning rate; with `relative_step: true` it chooses its own, and a schedule is refused. Muon is
    for matrices: AdamW, with the same learning rate and the arguments given for `adamw`, trains vectors and stacks of
    matrices (such as those of experts, which Muon would flatten into one matrix).

    Raises: ConfigError, with all faults.
    """
    faults: list[str] = []
    arguments: dict[str, dict] = {name: {} for name in OPTIMIZERS}
    for name, given in config.optimizer_config.items():
        if name not in _CLASSES:
            faults.append(f"optimizer_config: unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")
        else:  # also for optimizers that are not used, so that typing errors are found
            arguments[name] = _checked(name, given or {}, faults)
    own_rate = config.optimizer == "adafactor" and arguments["adafactor"].get("relative_step")
    if own_rate and (config.lr_schedule is not None or config.warmup):
        faults.append("adafactor with relative_step chooses its own learning rate: leave lr_schedule and warmup out")
    if config.loraplus_lr_ratio is not None:
        known = {kind: inspect.signature(_CLASSES[kind]).parameters for kind in _CLASSES}
        takes_decay = "weight_decay" in known[config.optimizer]
        faults += faults_of(config, takes_decay, "weight_decay" in arguments[config.optimizer], bool(own_rate))
    if faults:
        raise ConfigError("\n".join(faults), _LEAVE_OUT)
    rate = build_schedule(config.lr_schedule, config.learning_rate, steps, config.warmup)

    def make(name: str, rate: Any = rate, further: dict[str, Any] | None = None) -> opt.Optimizer:
        more = {k: v for k, v in (further or {}).items() if k in inspect.signature(_CLASSES[name]).parameters}
        try:
            return _CLASSES[name](learning_rate=rate, **{**_DEFAULTS.get(name, {}), **arguments[name], **more})
        except ValueError as error:
            raise ConfigError(f"optimizer_config: {name}: {error}", _LEAVE_OUT) from error

    if config.loraplus_lr_ratio is not None:
        if model is None:
            raise ConfigError("LoRA+ needs the model", "Call build_optimizer(config, steps, model).")
        return loraplus_optimizer(config, model, rate, make)
    if config.optimizer == "muon":
        return opt.MultiOptimizer([make("muon"), make("adamw")], [lambda path, weight: weight.ndim == 2])
    return make(config.optimizer)


def _checked(name: str, given: Any, faults: list[str]) -> dict[str, Any]:
    """The arguments `given` for the optimizer `name`, converted to the types of its constructor's."""
    known = dict(inspect.signature(_CLASSES[name]).parameters)
    known.pop("learning_rate")
    if not isinstance(given, Mapping):
        faults.append(f"optimizer_config: {name} must be a mapping of arguments, not {given!r}")
        return {}
    made = {}
    for key, value in given.items():
        what = f"optimizer_config: {key} of {name}"
        if key == "learning_rate":
            faults.append(f"{what}: set the option learning_rate instead")
        elif key not in known:
            faults.append(f"optimizer_config: {name} has no argument {key!r}; it has {', '.join(known)}")
        elif isinstance(default := known[key].default, bool):
            made[key] = value
            if not isinstance(value, bool):
                faults.append(f"{what} must be true or false, not {value!r}")
        elif isinstance(default, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(value) == len(default):
                made[key] = [number(item, what, faults) for item in value]
            else:
                faults.append(f"{what} must be {len(default)} numbers, not {value!r}")
        elif value is None and default is None:
            made[key] = None
        else:
            made[key] = number(value, what, faults, whole=type(default) is int)
    return made


class MasterWeights:
    """An MLX optimizer (or `MultiOptimizer`) that updates a flat dict of parameters of any dtype in float32.

    At a learning rate of 1e-5, a step is smaller than half the distance between two bfloat16 numbers, and bfloat16
    rounding would lose the update. So parameters in half precision have a float32 master copy in the state
    (arXiv:1710.03740). The copy is updated, then rounded into the parameter. Moments are always float32.

    Parameters and gradients are dicts `{path: array}`. This class distributes them to the optimizers itself, because
    `MultiOptimizer`'s merging of trees fails if one group ends in an earlier layer than another.

    state: `{"members": [state of each MLX optimizer], "masters": {path: float32 array}}`.
    """

    def __init__(self, optimizer: opt.Optimizer):
        several = isinstance(optimizer, opt.MultiOptimizer)
        self.members = list(optimizer.optimizers) if several else [optimizer]
        self._filters = list(optimizer.filters) if several else [lambda path, weight: True]
        self._masters: dict[str, mx.array] = {}

    def init(self, parameters: dict[str, mx.array]) -> None:
        """Make the state for `parameters`. Moments that a member optimizer already has for them are kept."""
        self._masters = {path: p.astype(mx.float32) for path, p in parameters.items() if p.dtype in _HALF}
        for member, share in self._shares({**parameters, **self._masters}):
            member.init(share)

    def apply_gradients(self, gradients: dict[str, mx.array], parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """The parameters after one step, each in its own dtype. Updates the state."""
        exact = {**parameters, **self._masters}
        updated: dict[str, mx.array] = {}
        for member, share in self._shares({path: g.astype(mx.float32) for path, g in gradients.items()}):
            updated |= member.apply_gradients(share, {path: exact[path] for path in share})
        self._masters = {path: updated[path] for path in self._masters}
        return {path: updated[path].astype(p.dtype) for path, p in parameters.items()}

    def _shares(self, arrays: dict[str, mx.array]) -> Iterator[tuple[opt.Optimizer, dict[str, mx.array]]]:
        """Each optimizer with its arrays: those that its filter is the first to accept."""
        shares: list[dict[str, mx.array]] = [{} for _ in self.members]
        for path, array in arrays.items():
            first = next(i for i, accepts in enumerate(self._filters) if accepts(path, array))
            shares[first][path] = array
        return zip(self.members, shares, strict=True)

    @property
    def state(self) -> dict[str, Any]:
        return {"members": [member.state for member in self.members], "masters": self._masters}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        for member, one in zip(self.members, state["members"], strict=True):
            member.state = one
        self._masters = state["masters"]

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate of the last step; of several optimizers, the first one's."""
        return self.members[0].learning_rate

    @property
    def name(self) -> str:
        return "+".join(type(member).__name__ for member in self.members)

    def restore(self, flat: dict[str, mx.array]) -> None:
        """Replace the state by a flattened state for the same parameters.

        A constant learning rate is not restored, so that a run can be resumed with another rate.
        """
        own = {
            f"members.{i}.learning_rate"
            for i, member in enumerate(self.members)
            if "learning_rate" not in member._schedulers
        }
        here = {path: array.shape for path, array in tree_flatten(self.state)}
        there = {path: array.shape for path, array in flat.items()}
        if here != there:
            differ = sorted(path for path in {*here, *there} if here.get(path) != there.get(path))
            raise TrainingError(
                f"The checkpoint has another optimizer's state: {', '.join(differ[:5])}" + (", ..." * bool(differ[5:])),
                "Resume with the optimizer and optimizer_config of the run.",
            )
        self.state = tree_map_with_path(lambda path, old: old if path in own else flat[path], self.state)
