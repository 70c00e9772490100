"""The length of a run, its batches and its reports."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from .options import check_types, common, option, raise_all, without_effect
from .preference import PREFERENCES, TOKENS, PreferenceOptions, preference_of

REPORTERS = ("tensorboard", "trackio", "wandb", "swanlab")
ITERS = 1000  # where neither iters nor epochs is given
RHYTHM = {"steps_per_eval": 200, "save_every": 100}  # with iters, and at most with epochs, see ``rhythm_of``
METRIC_ROWS = 32  # where metric_rows is not given
VAL_LOSS = "val_loss"
PREFIX_PLACES = ("none", "memory", "disk")


@dataclass(frozen=True)
class TrainConfig(PreferenceOptions):
    """The length of a run, its batches and its reports. One iteration is one batch."""

    help_section = "Run"

    iters: int | None = common(None, f"Iterations (batches) to train for (default: {ITERS}).")
    epochs: float | None = common(
        None,
        "Train for this many passes over the training rows instead, such as 3 or 0.5; the run ends with the epoch.",
    )
    batch_size: int = common(4, "Rows per batch.")
    pack: bool = option(
        False,
        "Place several rows in each sequence of --max-seq-length tokens; every row attends only to itself, "
        "and none is cut to fit. --batch-size then counts sequences.",
    )
    loss: str = option("cross_entropy", f"cross_entropy; or, to learn from preferences: {', '.join(PREFERENCES)}.")
    grad_accumulation_steps: int = option(1, "Batches per optimizer step; every token has the same weight.")
    max_grad_norm: float | None = option(None, "Clip the gradient to this global norm.")
    val_batches: int = option(25, "Validation batches; -1 for the whole set.")
    patience: int = option(0, "End the run after this many validations in a row without an improvement; 0: never.")
    best_by: str = option(
        VAL_LOSS,
        "How to choose the best validation: val_loss, or one of --metric (higher is better). Its adapter is kept "
        "in the folder best.",
    )
    metric: tuple[str, ...] | None = option(
        None,
        "Also score the generated answers to some validation rows: exact_match, rouge_l, matthews_correlation, or "
        "FILE.py:FUNCTION, a function of the given and the expected answers (two lists of text) that returns a number.",
    )
    metric_rows: int | None = option(
        None,
        f"With --metric: rows to answer, spread over the set; -1: all (default: {METRIC_ROWS}; in test, all).",
    )
    metric_max_tokens: int = option(128, "With --metric: longest answer.")
    steps_per_report: int = option(10, "Iterations between reports of the training loss.")
    steps_per_eval: int | None = option(
        None,
        f"Iterations between validations (default: {RHYTHM['steps_per_eval']}; with --epochs at most that, and four "
        "validations an epoch).",
    )
    save_every: int | None = option(
        None,
        f"Iterations between checkpoints (default: {RHYTHM['save_every']}; with --epochs at most that, and one "
        "checkpoint an epoch).",
        section="Output",
    )
    keep: int | None = option(
        None,
        "Keep the weights of the newest N checkpoints, and of the best one (default: of all).",
        section="Output",
    )
    report_prompts: int = option(
        10, "Validation rows whose prompts are answered for report.html; 0 for none.", section="Output"
    )
    grad_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")
    cache_prefix: str = option(
        "none",
        "With adapters on the last layers only: compute the layers before them once for each row and keep their "
        "output, in memory or in a file in the adapter's folder, which is deleted when the run is complete and used "
        "again when a stopped run is resumed. The losses stay the same.",
        choices=PREFIX_PLACES,
    )
    clear_cache_threshold: int | None = option(
        None,
        "Empty MLX's cache of freed memory after a step that leaves it larger than this "
        "(default: keep it, up to a quarter of the GPU's working set).",
    )
    max_skipped_steps: int = option(10, "Stop after this many steps in a row with non-finite gradients.")
    peer_timeout: float = option(
        30.0, "Several machines: end the run if one has not answered for this many seconds; 0: do not watch them."
    )
    seed: int = option(0, "Seed of the initialisation, dropout and the order of the data.")

    def defaults(self) -> dict[str, Any]:
        """Defaults of the fields that are None until they are filled in; see ``is_set``."""
        return RHYTHM

    def rhythm_of(self, iters: int) -> dict[str, int]:
        """The fields of ``RHYTHM`` for a run of ``iters`` iterations: as given, or else fractions of an epoch."""
        epoch = iters / max(1, self.epochs or 1)
        found = {"steps_per_eval": round(epoch / 4), "save_every": math.ceil(epoch)}
        if not self.val_batches:
            found.pop("steps_per_eval")
        return {n: getattr(self, n) or max(1, min(most, found.get(n, most))) for n, most in RHYTHM.items()}

    def __post_init__(self):
        if isinstance(self.metric, str):
            object.__setattr__(self, "metric", self.metric.split(","))
        check_types(self)
        faults = []
        if self.iters is None and self.epochs is None:
            object.__setattr__(self, "iters", ITERS)
        if self.epochs is None:  # else they follow from the data
            for name, value in RHYTHM.items():
                object.__setattr__(self, name, value if getattr(self, name) is None else getattr(self, name))
        elif self.iters is not None:
            faults.append(f"iters ({self.iters}) and epochs ({self.epochs}) contradict each other: give one of the two")
        if self.metric is not None:
            named = tuple(name.strip() if isinstance(name, str) else name for name in self.metric)
            object.__setattr__(self, "metric", named or None)
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                faults.append(f"{name} must be an integer of at least {least}, not {value!r}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            faults.append(f"epochs must be a number above 0, not {self.epochs!r}")
        if self.metric_rows is not None and (isinstance(self.metric_rows, bool) or not _is_count(self.metric_rows)):
            faults.append(f"metric_rows must be -1 (all) or at least 1, not {self.metric_rows!r}")
        if faulty := [name for name in self.metric or () if not isinstance(name, str) or not name]:
            faults.append(f"metric must be names, not {faulty[0]!r}")
        if not isinstance(self.val_batches, int) or self.val_batches < -1:
            faults.append(f"val_batches must be -1 (all), 0 (none) or more, not {self.val_batches!r}")
        most = self.clear_cache_threshold
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            faults.append(f"clear_cache_threshold must be a number of bytes, not {most!r}")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
            faults.append(f"max_grad_norm must be a positive number, not {norm!r}")
        shown = self.report_prompts
        if isinstance(shown, bool) or not isinstance(shown, int) or shown < 0:
            faults.append(f"report_prompts must be 0 (none) or more, not {shown!r}")
        if not isinstance(self.max_skipped_steps, int) or self.max_skipped_steps < 1:
            faults.append(f"max_skipped_steps must be at least 1, not {self.max_skipped_steps!r}")
        if not 0 <= self.peer_timeout < math.inf:
            faults.append(f"peer_timeout must be 0 (do not watch) or a number of seconds, not {self.peer_timeout!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            faults.append(f"seed must be an integer from 0 to 2^32 - 1, not {self.seed!r}")
        names = [metric_name(name) for name in self.metric or () if isinstance(name, str)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            faults.append(f"metric names {', '.join(twice)} twice")
        if taken := sorted({*names} & _TAKEN):
            faults.append(f"metric {', '.join(taken)}: a loss measures something of this name; rename your function")
        known = (VAL_LOSS, *names, *preference_of(self.loss).measures)
        if self.val_batches and self.loss in ("cross_entropy", *PREFERENCES) and self.best_by not in known:
            faults.append(f"best_by must be {' or '.join(known)}, not {self.best_by!r}: add it to metric")
        if self.cache_prefix not in PREFIX_PLACES:
            faults.append(f"cache_prefix must be one of {', '.join(PREFIX_PLACES)}, not {self.cache_prefix!r}")
        if self.cache_prefix != "none" and self.pack:
            faults.append(
                "cache_prefix cannot be used with pack, because a row's states round differently at each position"
            )
        if self.cache_prefix != "none" and preference_of(self.loss).rows != TOKENS:
            faults.append(f"cache_prefix cannot be used with the loss {self.loss}, which reads two answers per row")
        raise_all(faults + self.preference_faults() + without_effect(self, _TRAIN_RULES), self)


def no_effect(values: dict[str, Any], given: Collection[str]) -> list[str]:
    """Names of ``values`` for a TrainConfig, except those ``given``, that have no effect with the others."""
    defaults = {known.name: known.default for known in fields(TrainConfig)} | RHYTHM
    values, found = {**defaults, **values}, []
    for names, acts, _ in _TRAIN_RULES:
        if not acts(SimpleNamespace(**values)):
            dropped = [n for n in names if n not in given and values[n] not in (None, (), [], defaults[n])]
            values |= {name: defaults[name] for name in dropped}
            found += dropped
    return found


def metric_name(metric: str) -> str:
    """A metric's name in reports; for a function in a file, the function's name."""
    return metric.rpartition(":")[2]


def _is_count(value: int) -> bool:
    return isinstance(value, int) and (value == -1 or value >= 1)


_TAKEN = {VAL_LOSS, *(name for needs in PREFERENCES.values() for name in needs.measures)}
_COUNTS = {  # the least value of each
    **dict.fromkeys(("iters", "batch_size", "grad_accumulation_steps", "steps_per_report", "steps_per_eval"), 1),
    **dict.fromkeys(("save_every", "keep", "metric_max_tokens"), 1),
    "patience": 0,
}
_MAY_BE_NONE = ("iters", "keep", *RHYTHM)
_VALIDATION = ("steps_per_eval", "patience", "best_by", "metric")
_TRAIN_RULES = (
    (_VALIDATION, lambda c: c.val_batches != 0, "has no effect where val_batches is 0"),
    (("metric_rows", "metric_max_tokens"), lambda c: c.metric, "has no effect without metric"),
)
