"""Optimizers from their configuration, and float32 master weights for parameters in half precision."""

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
# Where our defaults are not MLX's. Adam without bias correction takes first steps 3 times the published size;
# Adafactor's own defaults ignore the learning rate.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}
_LEAVE_OUT = "Correct these arguments, or leave them out for the optimizer's own."
_HALF = (mx.float16, mx.bfloat16)


def build_optimizer(config: OptimizerConfig, steps: int, model: nn.Module | None = None) -> opt.Optimizer:
    """The optimizer that `config` describes.

    Args:
        steps: optimizer steps in the run (iters / grad_accumulation_steps, rounded up), which named schedules fill.
        model: what it is to train; LoRA+ sorts its parameters into groups (see `loraplus.py`).

    Adam and AdamW correct their bias unless `optimizer_config` says `bias_correction: false` (MLX's default is off).
    Adafactor follows the learning rate; with `relative_step: true` it makes its own, and a schedule is refused. Muon
    is for matrices: parameters of one dimension, and stacks of matrices such as those of experts, which Muon would
    flatten into one, go to AdamW with the same learning rate and the arguments given for `adamw`.
    """
    faults: list[str] = []
    arguments: dict[str, dict] = {name: {} for name in OPTIMIZERS}
    for name, given in config.optimizer_config.items():
        if name not in _CLASSES:
            faults.append(f"optimizer_config: {name!r} is no optimizer; known are {', '.join(OPTIMIZERS)}")
        else:  # all of them, not only the one in use: a typing error should not wait for its optimizer
            arguments[name] = _checked(name, given or {}, faults)
    own_rate = config.optimizer == "adafactor" and arguments["adafactor"].get("relative_step")
    if own_rate and (config.lr_schedule is not None or config.warmup):
        faults.append("adafactor with relative_step makes its own learning rate: leave lr_schedule and warmup out")
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
            raise ConfigError("LoRA+ sorts the parameters of the model", "build_optimizer(config, steps, model).")
        return loraplus_optimizer(config, model, rate, make)
    if config.optimizer == "muon":
        return opt.MultiOptimizer([make("muon"), make("adamw")], [lambda path, weight: weight.ndim == 2])
    return make(config.optimizer)


def _checked(name: str, given: Any, faults: list[str]) -> dict[str, Any]:
    """The arguments `given` for the optimizer `name` in the types of its constructor."""
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
    """An MLX optimizer (or `MultiOptimizer`) over a flat dict of parameters, in float32 whatever their dtype.

    At a learning rate of 1e-5 a step is smaller than half the distance of two bfloat16 numbers, and an update in
    bfloat16 rounds it away. So parameters in half precision have a float32 twin in the state (arXiv:1710.03740); the
    twin is updated, and rounded into the parameter. Parameters in float32 have no twin. Moments are always float32.

    Parameters and gradients are dicts `{path: array}`. This class hands each optimizer its share itself, because
    `MultiOptimizer`'s own merging of trees fails where one share ends in an earlier layer than another.

    state: `{"members": [state of each MLX optimizer], "masters": {path: float32 array}}`.
    """

    def __init__(self, optimizer: opt.Optimizer):
        many = isinstance(optimizer, opt.MultiOptimizer)
        self.members = list(optimizer.optimizers) if many else [optimizer]
        self._filters = list(optimizer.filters) if many else [lambda path, weight: True]
        self._masters: dict[str, mx.array] = {}

    def init(self, parameters: dict[str, mx.array]) -> None:
        """Make the state for `parameters`. Moments that a member already has for them are kept."""
        self._masters = {path: p.astype(mx.float32) for path, p in parameters.items() if p.dtype in _HALF}
        for member, share in self._shares({**parameters, **self._masters}):
            member.init(share)

    def apply_gradients(self, gradients: dict[str, mx.array], parameters: dict[str, mx.array]) -> dict[str, mx.array]:
        """The parameters after one step, each in its own dtype. The state moves on."""
        exact = {**parameters, **self._masters}
        updated: dict[str, mx.array] = {}
        for member, share in self._shares({path: g.astype(mx.float32) for path, g in gradients.items()}):
            updated |= member.apply_gradients(share, {path: exact[path] for path in share})
        self._masters = {path: updated[path] for path in self._masters}
        return {path: updated[path].astype(p.dtype) for path, p in parameters.items()}

    def _shares(self, arrays: dict[str, mx.array]) -> Iterator[tuple[opt.Optimizer, dict[str, mx.array]]]:
        """Each member with the arrays it is the first to accept."""
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
        """Of the last step; of the first member where there are several."""
        return self.members[0].learning_rate

    @property
    def name(self) -> str:
        return "+".join(type(member).__name__ for member in self.members)

    def restore(self, flat: dict[str, mx.array]) -> None:
        """Take over a flattened state of the same parameters.

        A learning rate on no schedule stays this optimizer's own, so that a run can be resumed with another.
        """
        own = {
            f"members.{i}.learning_rate"
            for i, member in enumerate(self.members)
            if "learning_rate" not in member._schedulers
        }
        here = {path: array.shape for path, array in tree_flatten(self.state)}
        there = {path: array.shape for path, array in flat.items()}
        if here != there:
            odd = sorted(path for path in {*here, *there} if here.get(path) != there.get(path))
            raise TrainingError(
                f"The checkpoint holds another optimizer's state: {', '.join(odd[:5])}" + (", ..." if odd[5:] else ""),
                "Resume with the optimizer and optimizer_config of the run.",
            )
        self.state = tree_map_with_path(lambda path, old: old if path in own else flat[path], self.state)
