"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .options import check_types, common, option, raise_all

OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon", "lion")
SCHEDULES = ("constant", "linear_schedule", "cosine_decay", "exponential_decay", "step_decay")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    help_section = "Optimizer"

    optimizer: str = option("adam", "Optimizer.", choices=OPTIMIZERS)
    optimizer_config: dict[str, dict] = option({}, "Arguments by optimizer, {adamw: {weight_decay: 0.1}}.")
    learning_rate: float = common(1e-5, "Learning rate.")
    lr_schedule: Any = option(None, f"{', '.join(SCHEDULES)}, or mlx-lm's {{name, arguments, warmup, warmup_init}}.")
    warmup: int = option(0, "Optimizer steps over which the learning rate rises from 0.")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+ (arXiv:2402.12354): learning rate of B and of vectors, as a multiple of A's, such as 16."
    )
    loraplus_lr_embedding: float | None = option(
        None, "LoRA+: learning rate of low-rank matrices of embeddings (default: 1e-6)."
    )
    loraplus_weight_decay: float | None = option(
        None, "LoRA+: weight decay of everything but biases and LayerNorms (default: 0)."
    )

    def __post_init__(self):
        check_types(self)
        faults = []
        if self.optimizer not in OPTIMIZERS:
            faults.append(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (0 < rate < math.inf):
            faults.append(f"learning_rate must be a positive number, not {rate!r}")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            faults.append(f"warmup must be a number of steps, not {self.warmup!r}")
        for name in ("loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "loraplus_weight_decay"):
                faults.append(f"{name} must be a positive number, not {value!r}")
            elif self.loraplus_lr_ratio is None:
                faults.append(f"{name} needs loraplus_lr_ratio (LoRA+)")
        known = (
            {self.optimizer, "adamw"} if self.optimizer == "muon" else {self.optimizer}
        )  # muon leaves vectors to adamw
        for name in sorted(self.optimizer_config.keys() - known) if self.optimizer in OPTIMIZERS else ():
            if name in OPTIMIZERS and self.optimizer_config[name]:
                faults.append(f"optimizer_config: {name} has no effect, the optimizer is {self.optimizer}")
        own_rate = chooses_own_rate(self.optimizer, self.optimizer_config)
        if self.learning_rate != OptimizerConfig.learning_rate and own_rate:
            faults.append(f"learning_rate {rate} has no effect: adafactor with relative_step chooses its own")
        first = first_rate(self.lr_schedule)
        if self.learning_rate not in (OptimizerConfig.learning_rate, first) and first is not None:
            faults.append(
                f"learning_rate {rate} has no effect: the arguments of lr_schedule begin with the rate {first}"
            )
        raise_all(faults, self)


def chooses_own_rate(optimizer: str, arguments: dict[str, Any]) -> bool:
    """Whether the optimizer takes no learning rate: adafactor with ``relative_step``."""
    own = arguments.get(optimizer)
    return optimizer == "adafactor" and isinstance(own, dict) and own.get("relative_step") is True


def first_rate(lr_schedule: Any) -> float | None:
    """The learning rate that the arguments of mlx-lm's schedule mapping begin with; None if they give none."""
    arguments = lr_schedule.get("arguments") if isinstance(lr_schedule, dict) else None
    try:
        return float(arguments[0])
    except (TypeError, ValueError, LookupError):
        return None
