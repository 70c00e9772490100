"""The best validation of a run so far, and the number of validations since. Both are kept in the run's tally.

A validation before the first step is not counted: a run that only makes a model worse has no best adapter.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

from ..config import METRIC_ROWS, VAL_LOSS, TrainConfig, metric_name
from ..errors import ConfigError, MLXLoRAWarning
from .checkpoints import Tally
from .reports import ValReport

_FIELDS = ("best_by", "best_value", "best_iteration", "not_better", "unmeasured", "first_loss", "lowest_loss")


def is_best(tally: Tally, report: ValReport, config: TrainConfig) -> bool:
    """Count a validation in `tally`; return whether it is the best of the run so far.

    A lower loss is better; for other metrics, higher is better. A non-finite value is never the best.

    Raises: ConfigError: nothing called `config.best_by` was measured.
    """
    values = {VAL_LOSS: report.val_loss, **report.metrics}
    if config.best_by not in values:
        known = ", ".join(values)
        raise ConfigError(f"best_by: {config.best_by!r} is not measured in this run", f"Choose one of: {known}.")
    if report.iteration == 0:
        tally.first_loss = report.val_loss
        return False
    tally.lowest_loss = min(report.val_loss, tally.lowest_loss if tally.lowest_loss is not None else math.inf)
    value, best = values[config.best_by], tally.best_value
    better = best is None or (value < best if config.best_by == VAL_LOSS else value > best)
    if not (better and math.isfinite(value)):
        tally.not_better += 1
        return False
    tally.best_value, tally.best_iteration, tally.not_better = value, report.iteration, 0
    return True


def made_worse(tally: Tally) -> str | None:
    """A warning if no validation of a complete run had a lower loss than the one before the first step."""
    first, lowest = tally.first_loss, tally.lowest_loss
    if first is None or lowest is None or lowest < first:
        return None
    return (
        f"training made the model worse: the validation loss was {first:.3f} before it, and never below {lowest:.3f} "
        "after; lower the learning rate, or look at the data"
    )


def out_of_patience(tally: Tally, config: TrainConfig) -> bool:
    """Whether `config.patience` validations in a row were not better than the best one."""
    return 0 < config.patience <= tally.not_better


def check_patience(config: TrainConfig, iters: int) -> None:
    """Refuse a patience that is too large for the run's number of validations. Raises: ConfigError."""
    before_end = (iters - 1) // config.steps_per_eval
    if config.patience and before_end <= config.patience:
        raise ConfigError(
            f"patience {config.patience} cannot end this run early: it has {before_end} validations before its last "
            f"iteration ({iters}), and the first of them is the best so far",
            "Lower steps_per_eval or patience, or leave patience out.",
        )


def measured_by(config: TrainConfig) -> str:
    """A description of the value that chooses the best validation. Only values with equal descriptions are compared."""
    if config.best_by in map(metric_name, config.metric or ()):
        rows = config.metric_rows or METRIC_ROWS
        return f"{config.best_by} of {rows} answers of at most {config.metric_max_tokens} tokens"
    return f"{config.best_by} of {'all' if config.val_batches < 0 else config.val_batches} batches"


def continued(tally: Tally, config: TrainConfig) -> Tally:
    """A copy of a resumed run's tally. If `best_by` has changed, the next validation is the best so far."""
    now = measured_by(config)
    if not config.val_batches:
        return replace(tally)
    if tally.best_value is None or tally.best_by == now:
        return replace(tally, best_by=now)
    text = f"The best validation is now chosen by {now} instead of {tally.best_by}: the next validation is the best"
    warnings.warn(text, MLXLoRAWarning, stacklevel=2)
    return replace(tally, best_by=now, best_value=None, not_better=0)


def with_validation_of(tally: Tally, other: Tally) -> Tally:
    """`tally` with the validation results of `other`."""
    return replace(tally, **{name: getattr(other, name) for name in _FIELDS})
