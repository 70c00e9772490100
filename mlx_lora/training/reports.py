"""The reports that a run yields: frozen, without arrays, ready for JSON.

Every loss is a mean over the learned tokens (those that the mask selects), in nats for cross entropy, or over the pairs
or answers for preference losses. In a distributed run, losses, token counts and rates are totals of all processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    loss: float  # mean over learned tokens
    tokens: int  # learned tokens
    perplexity: float | None  # exp(loss); None for preference losses
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)  # means of the loss's further metrics


@dataclass(frozen=True)
class Progress:
    """One iteration is done. Yielded after every iteration, for a progress bar."""

    iteration: int
    loss: float | None  # of this batch; None if it is not finite or there is no token to learn


@dataclass(frozen=True)
class TrainReport:
    """The last `steps_per_report` iterations (fewer at the end of the run). The rates exclude validation and saving."""

    iteration: int
    train_loss: float  # mean over the tokens of these iterations; nan if no batch was finite
    learning_rate: float  # of the last optimizer step
    iterations_per_second: float
    tokens_per_second: float  # learned tokens
    trained_tokens: int  # learned tokens since the start of the run, including those before a resume
    peak_memory: float  # GB, since the start of this call
    grad_norm: float | None  # of the last optimizer step, before clipping; None before the first
    metrics: dict[str, float] = field(default_factory=dict)  # means of the loss's further metrics, such as rewards


@dataclass(frozen=True)
class ValReport:
    """The loss on the validation set: before the first step, every `steps_per_eval` iterations, at the end."""

    iteration: int  # iterations done when measured
    val_loss: float
    val_time: float  # seconds
    val_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)  # of the loss and of generated answers


@dataclass(frozen=True)
class NewBest:
    """The last validation was the best of the run so far; its checkpoint was saved."""

    iteration: int
    name: str  # "val_loss" or a metric
    value: float


@dataclass(frozen=True)
class SkippedStep:
    """An optimizer step was skipped, because its loss or gradients were not finite. It changed nothing."""

    iteration: int
    in_a_row: int  # skipped steps since the last good one, including this one


@dataclass(frozen=True)
class Checkpoint:
    """The caller's `checkpoint` was called."""

    iteration: int
    path: Any  # what `checkpoint` returned


@dataclass(frozen=True)
class Done:
    """The last report of a run."""

    iteration: int
    trained_tokens: int
    seconds: float  # of this call, including validation and saving
    stopped: bool  # True if `stop` ended the run before it was complete
    peak_memory: float  # GB
    skipped_steps: int
    reason: str = "complete"  # why it ended: "complete" (all iterations), "patience" or "stopped"


Report = Progress | TrainReport | ValReport | NewBest | SkippedStep | Checkpoint | Done
