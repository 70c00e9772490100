"""`train`, a generator of reports: checks the arguments and runs the loop in loop.py. The caller saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten

from ..config import VAL_LOSS, TrainConfig
from ..data import Dataset, in_iterations
from ..data.packing import capacity
from ..errors import ConfigError, TrainingError
from .best import check_patience
from .checkpoints import TrainingState, check_fingerprint, fingerprint
from .evaluation import check_rows
from .loop import Loop
from .losses import check_takes_packed, loss_named
from .optimizers import MasterWeights
from .packing_checks import check_model
from .prefix import FrozenPrefix
from .prefix_checks import check_settings
from .reports import Report


def train(
    model: nn.Module,
    optimizer: opt.Optimizer,
    train_set: Dataset,
    valid_set: Dataset | None = None,
    config: TrainConfig | None = None,
    *,
    checkpoint: Callable[[TrainingState], Any] | None = None,
    resume: TrainingState | None = None,
    stop: Callable[[], bool] = lambda: False,
    metrics: Callable[[], dict[str, float]] | None = None,
    prefix: FrozenPrefix | None = None,
) -> Iterator[Report]:
    """Train the trainable parameters of `model`. The training happens while the caller iterates over the reports.

    Args:
        optimizer: one of MLX's, or from `build_optimizer`. Parameters in half precision are trained through float32
            master weights in its state.
        train_set, valid_set: datasets of `mlx_lora.data`. There is no validation if `valid_set` is None or empty, or if
            `val_batches` is 0.
        config: the loss, the number of iterations, the batch size and so on; `TrainConfig()` by default. The batches
            of its `epochs` are `mlx_lora.data.iterations(config, train_set)`.
        checkpoint: called with the state of the run every `save_every` iterations, at the end, on `stop`, after the
            best validation so far (`state.tally.best_iteration` is then its iteration), and before the error of a run
            that has diverged; in every process of a distributed run. Save the adapter from the model, and call
            `state.save(path)` to be able to resume.
        resume: a state to continue from. The parameters, the optimizer and the order of the data are restored exactly.
        stop: called after each iteration. When it returns True, the run saves and ends. The sums of an incomplete
            window of `grad_accumulation_steps` are then part of the state, and are not applied.
        metrics: called at every validation, with the model in evaluation mode; its values go into the report. It must
            return the same in every process.
        prefix: the frozen layers of `model` and where their states are kept, for `cache_prefix` "disk" (by
            default in memory, whatever their size: `prefix.expected` estimates it; `mlx_lora.run` refuses what does not
                fit).

    Yields: the reports of `reports.py`, in the order of the events; `Done` comes last.

    While it runs, the model is in training mode, MLX's random state is seeded from `config.seed`, and MLX's memory
    limits are set for training. When it ends (also by an error, or because the generator is closed), the model has
    evaluated parameters and its own layers, each module is back in its mode, and the memory limits are restored.

    Raises: on the call, ConfigError for an unknown loss or rows of another kind than it takes, and TrainingError if
        there is nothing to train, no training data, or `resume` is the state of another run. Before the first step,
        ConfigError if the model computes packed rows (`config.pack`) differently from single rows, and ModelError if
        training cannot compute what the model generates (see `base.forward_paths`). During the run, TrainingError
        after `max_skipped_steps` steps in a row with non-finite gradients.
    """
    config = config or TrainConfig()
    loss_named(config.loss)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    if not parameters:
        raise TrainingError(
            "There is nothing to train: the model has no trainable parameters.",
            "Attach an adapter first (mlx_lora.attach), or unfreeze the model.",
        )
    if integers := [path for path, p in parameters.items() if not mx.issubdtype(p.dtype, mx.floating)]:
        raise TrainingError(
            f"Only floating-point parameters can be trained, not {', '.join(integers)}.", "Freeze these parameters."
        )
    if len(train_set) == 0:
        raise TrainingError("The training set is empty.", "Check that train.jsonl in the data folder has rows.")
    config = in_iterations(config, train_set)
    for rows in (train_set, valid_set):
        if rows is not None:
            check_rows(rows, config.loss)
    if config.pack:
        check_takes_packed(config.loss)
        check_model(model, capacity(train_set))
    if config.cache_prefix != "none":
        check_settings(config.loss, mx.distributed.init().size())
        if prefix is None and config.cache_prefix == "disk":
            raise ConfigError("cache_prefix 'disk' needs a file", "Call mlx_lora.run, or set cache_prefix='memory'.")
        prefix = prefix or FrozenPrefix(model, train_set, valid_set)
    group = mx.distributed.init()
    settings = fingerprint(config, config.loss, MasterWeights(optimizer).name, train_set, group.size(), parameters)
    if resume is not None:
        check_fingerprint(resume.fingerprint, settings)
        if resume.iteration > config.iters:
            raise TrainingError(
                f"The checkpoint is at iteration {resume.iteration}, but iters is {config.iters}.",
                "Set a larger iters, or start a new run.",
            )
    if config.val_batches == 0 or valid_set is None or len(valid_set) == 0:
        valid_set = None
    check_validated(config, valid_set)
    check_patience(config, config.iters)
    loop = Loop(
        *(model, MasterWeights(optimizer), train_set, valid_set, config),
        *(checkpoint, stop, metrics, settings, group, prefix),
    )
    return loop.reports(resume)


def check_validated(config: TrainConfig, valid_set: Dataset | None) -> None:
    """Refuse settings that need a validation set if there is none. Raises: ConfigError."""
    given = {"patience": config.patience, "best_by": config.best_by != VAL_LOSS, "metric": config.metric}
    if names := [name for name, value in given.items() if value and not valid_set]:
        raise ConfigError(f"{', '.join(names)}: there is no validation set", "Add one, or leave these options out.")
