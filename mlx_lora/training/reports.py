"""The facts a run yields. Frozen, without arrays, ready for JSON; what to show of them is the caller's affair.

Every loss is in nats a learned token; "learned" tokens are those the mask counts. Of several processes a report speaks
for all: losses, token counts and rates are sums over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    loss: float  # nats a token
    tokens: int  # learned tokens the loss is the mean of
    perplexity: float  # exp(loss)
    seconds: float


@dataclass(frozen=True)
class Progress:
    """One iteration is over. For a live bar; yielded at every iteration."""

    iteration: int
    loss: float | None  # of this batch; None where it is not finite or the batch has nothing to learn


@dataclass(frozen=True)
class TrainReport:
    """The last `steps_per_report` iterations (fewer at the end of the run). Validation and saving are not timed."""

    iteration: int
    train_loss: float  # mean over the tokens of the window; nan where no batch of it was finite
    learning_rate: float  # of the last optimizer step
    iterations_per_second: float
    tokens_per_second: float  # learned tokens
    trained_tokens: int  # learned tokens since the start of the run, before a resume included
    peak_memory: float  # GB, since the start of this call
    grad_norm: float | None  # of the last optimizer step, before clipping; None before the first


@dataclass(frozen=True)
class ValReport:
    """The loss on the validation set: before the first step, every `steps_per_eval` iterations, at the end."""

    iteration: int  # iterations done when measured
    val_loss: float
    val_time: float  # seconds
    val_tokens: int


@dataclass(frozen=True)
class SkippedStep:
    """An optimizer step was left out, because its loss or gradients were not finite. Nothing was changed by it."""

    iteration: int
    in_a_row: int  # skipped steps since the last good one, this one included


@dataclass(frozen=True)
class Checkpoint:
    """The caller's `checkpoint` was called."""

    iteration: int
    path: Any  # what the callable returned; None where it returned nothing


@dataclass(frozen=True)
class Done:
    """The last report of a run."""

    iteration: int
    trained_tokens: int
    seconds: float  # of this call, validation and saving included
    stopped: bool  # True where `stop` ended the run before `iters`
    peak_memory: float  # GB
    skipped_steps: int


Report = Progress | TrainReport | ValReport | SkippedStep | Checkpoint | Done
