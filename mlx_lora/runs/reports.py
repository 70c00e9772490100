"""The reports of a run that are not in ``training.reports``. Frozen, without arrays, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Loading:
    """Something that takes a while begins."""

    what: str  # "model", "data", "reference", "init": an initialisation that reads training data, or "answers"
    name: str  # the model, the data set, the rows to compute the reference of, the initialisation, how many prompts


@dataclass(frozen=True)
class Warned:
    """A setting is valid but probably a mistake. The run goes on with it."""

    text: str


@dataclass(frozen=True)
class Planned:
    """The estimated memory and time of the run, before it starts."""

    peak: int | None  # bytes at the peak; None if no plan could be made
    limit: int  # bytes that MLX can use on this machine
    trainable: int | None = None  # parameters
    iters: int | None = None
    epochs: float | None = None
    padding: float | None = None  # share of the tokens computed
    seconds: float | None = None  # of the whole run; None if this machine has not been measured
    reason: str = ""  # why there is no plan


@dataclass(frozen=True)
class DataLoaded:
    """All sets are read, checked and tokenized."""

    rows: dict[str, int]  # by split: "train", "valid", "test"
    learned_tokens: int  # in one epoch of the training set; 0 without one
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()  # decisions made for the user, such as how the rows are read


@dataclass(frozen=True)
class PrefixCache:
    """The output of the frozen layers will be kept (``cache_prefix``). To decline, close the run at this report."""

    layers: int  # whose output is kept
    of: int  # layers of the model
    bytes: int  # approximate bytes that the states will take
    free: int  # bytes
    place: str  # "memory", or the file
    reused: float | None  # share of the rows read after the first epoch that need no computing; None: only one epoch


@dataclass(frozen=True)
class Started:
    """The adapter is attached to the model, and training begins."""

    iteration: int  # already done by the resumed run
    iters: int
    trainable: int  # parameters
    parameters: int  # of the model with its adapter; a quantized weight counts as one
    modules: int  # that hold trainable parameters
    steps_per_eval: int  # iterations between validations, if there is a validation set
    save_every: int  # iterations between checkpoints


@dataclass(frozen=True)
class EarlierRunMoved:
    """The folder held an earlier run. Its files were moved before the first checkpoint was written."""

    path: Path  # where they are now


@dataclass(frozen=True)
class Answer:
    """A greedy answer to a row of the test set. White space around the texts is removed."""

    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        return self.given == self.expected


@dataclass(frozen=True)
class TestReport:
    """The loss on the test set and, if requested, the share of exact answers."""

    loss: float  # nats per learned token
    tokens: int  # learned tokens in the mean
    perplexity: float | None  # exp(loss); None for preference losses
    seconds: float
    exact_match: float | None = None  # share of correct answers
    answered: int = 0  # rows answered for exact_match
    metrics: dict[str, float] = field(default_factory=dict)  # of the loss, such as rewards, and of the answered rows
