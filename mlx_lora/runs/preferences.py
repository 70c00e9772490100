"""The reference of a run's data sets, for losses of preferences: computed before training, kept in the checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import TOKENS, TrainConfig, preference_of
from ..data import Splits
from ..errors import ConfigError
from ..training import TrainingState, referenced
from .reports import Loading


def with_references(model: nn.Module, sets: Splits, config: TrainConfig, state: TrainingState | None):
    """Yield what is computed; return the data sets with the log-probabilities of their answers by ``model``.

    Args:
        model: as the run begins.
        state: of the run that is resumed; the log-probabilities are then those of its beginning.

    Raises: ConfigError: a test set that the run which is resumed did not have.
    """
    needs = preference_of(config.loss)
    if needs.rows == TOKENS:
        return sets
    found = {}
    for split in ("train", "valid", "test"):
        rows = getattr(sets, split)
        if rows is None or len(rows) == 0:
            continue
        known = state.reference.get(split) if state is not None else None
        if needs.reference and known is None:
            if state is not None:
                raise ConfigError(
                    f"test: {config.loss} compares with the model as the run began, which is not kept for the test set",
                    "Leave --test out, and measure the adapter with mlx-lora test afterwards (in Python runs.measure).",
                )
            yield Loading("reference", f"{len(rows):,} {split} rows")
        seed = config.seed if split == "train" else None
        found[split] = referenced(model, rows, config.loss, config.batch_size, seed, known)
    return replace(sets, **found)


def with_test_reference(state: TrainingState, sets: Splits) -> TrainingState:
    """The state with the log-probabilities of the test set beside those that ``train`` keeps."""
    known: Any = getattr(sets.test, "reference", None)
    return state if known is None else replace(state, reference={**state.reference, "test": mx.array(known)})
