"""The reference of losses such as DPO: log-probabilities of all answers, computed once with a model and kept.

No second model is needed: the reference of a run is its own model before the first step. This is the base model if the
new adapter has no effect yet, or else the base with the adapter that training continues.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.forward_paths import as_generated
from ..base.modes import mode
from ..config import TOKENS, TrainConfig, preference_of
from ..data.batches import eval_rows
from ..data.preferences import PairDataset
from ..errors import TrainingError
from .evaluation import check_rows
from .losses.answers import log_probabilities


def referenced(
    model: nn.Module,
    dataset: PairDataset,
    loss: str,
    batch_size: int = 4,
    seed: int | None = None,
    known: Any = None,
) -> PairDataset:
    """A copy of `dataset` with the log-probabilities that `model` gives its answers, for batches of `batch_size`.

    Args:
        seed: seed of the order in which `train` takes the rows; None for the batches of `evaluate`.
        known: [N, 2], the result of an earlier call for the same data set and batches; by default the one in `dataset`.

    Dropout is off. Several processes share the work. Raises: ConfigError: rows of another kind than the loss takes.
    """
    check_rows(dataset, loss)
    rows = eval_rows(dataset, batch_size) if seed is None else dataset.epoch(batch_size, seed, 0)
    dataset = dataset.with_batches(rows)
    known = dataset.reference if known is None else known
    if not preference_of(loss).reference:
        return dataset
    return dataset.with_reference(np.array(_compute(model, dataset, rows) if known is None else known))


def ready(
    model: nn.Module, dataset: Any, config: TrainConfig, name: str, kept: dict[str, mx.array] | None = None
) -> Any:
    """The data set that the config's loss needs: `referenced` for preferences, else unchanged (also None).

    Args:
        name: "train", "valid" or "test".
        kept: the `reference` of the resumed state; None in a new run, whose `model` is the reference.

    Raises: TrainingError: the resumed run did not have this set.
    """
    needs = preference_of(config.loss)
    if dataset is None or needs.rows == TOKENS:
        return dataset
    known = (kept or {}).get(name)
    if needs.reference and kept is not None and known is None and dataset.reference is None and len(dataset):
        raise TrainingError(
            f"{config.loss} compares with the model from the start of the run, and the run did not store its results "
            f"for the {name} set.",
            "Resume without this set, and measure the adapter with mlx-lora test afterwards.",
        )
    seed = config.seed if name == "train" else None
    return referenced(model, dataset, config.loss, config.batch_size, seed, known)


def stored(**sets: Any) -> dict[str, mx.array]:
    """The stored log-probabilities of these data sets, by the names of the sets."""
    found = {name: getattr(rows, "reference", None) for name, rows in sets.items()}
    return {name: mx.array(array) for name, array in found.items() if array is not None}


def _compute(model: nn.Module, dataset: PairDataset, batches: list[np.ndarray]) -> mx.array:
    """The log-probabilities [N, 2] float32 of each row's two answers."""
    group = mx.distributed.init()
    found = np.zeros((len(dataset), 2), np.float32)
    with as_generated(model, dataset[0].tokens), mode(model, training=False):
        for rows in batches:
            here = rows[group.rank() :: group.size()]
            if len(here):
                found[here] = np.array(_of_batch(model, dataset.collate(here, len(here))))[: len(here)]
    return mx.distributed.all_sum(mx.array(found), group=group) if group.size() > 1 else mx.array(found)


def _of_batch(model: nn.Module, batch: Any) -> mx.array:
    """The log-probabilities [B, 2] of a batch's answers."""
    first = log_probabilities(model, batch.tokens, batch.mask)
    if hasattr(batch, "other_tokens"):
        return mx.stack([first, log_probabilities(model, batch.other_tokens, batch.other_mask)], axis=1)
    return first.reshape(2, -1).T
