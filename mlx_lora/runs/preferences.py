"""The reference of a run's data sets for preference losses: computed before training, kept in the checkpoints."""

from __future__ import annotations

from dataclasses import replace

import mlx.nn as nn

from ..config import LABELS, TrainConfig, preference_of
from ..data import Splits
from ..data.preferences import LabelDataset
from ..training import TrainingState
from ..training.reference import ready, stored
from .reports import Loading, Warned


def with_references(model: nn.Module, sets: Splits, config: TrainConfig, state: TrainingState | None):
    """Yield a report; return the data sets with the log-probabilities that ``model`` gives their answers.

    Args:
        model: as the run begins.
        state: state of the resumed run; its log-probabilities, from before its first step, are used.

    Raises: TrainingError: a test set that the resumed run did not have.
    """
    if preference_of(config.loss).rows == LABELS and (text := _unbalanced(sets.train, config)):
        yield Warned(text)
    kept = state.reference if state is not None else None
    given = {split: getattr(sets, split) for split in ("train", "valid", "test")}
    if kept is None and preference_of(config.loss).reference:
        counts = [f"{len(rows):,} {split}" for split, rows in given.items() if rows is not None]
        yield Loading("reference", f"{', '.join(counts)} rows")
    return replace(sets, **{split: ready(model, rows, config, split, kept) for split, rows in given.items()})


def _unbalanced(rows: LabelDataset, config: TrainConfig) -> str | None:
    """A warning if the weights of good and bad answers differ too much (KTO's paper, arXiv:2402.01306, equation 8)."""
    good = sum(row.label for row in rows)
    bad = len(rows) - good
    by_good, by_bad = good * config.desirable_weight, bad * config.undesirable_weight
    if good == bad or by_bad <= by_good <= by_bad * 4 / 3:
        return None
    text = f"{good} good and {bad} bad answers, times their weights, are {by_good:g} to {by_bad:g}"
    if not (good and bad):
        return f"{text}: kto is made for data with both"
    low = by_bad / good
    return f"{text}: kto's authors advise 1 to 4/3 times, such as a desirable_weight of {low:.2f} to {low * 4 / 3:.2f}"


def keeping_references(state: TrainingState, sets: Splits) -> TrainingState:
    """The state with the log-probabilities of all sets, also of those that ``train`` did not use."""
    return replace(state, reference=stored(train=sets.train, valid=sets.valid, test=sets.test))
