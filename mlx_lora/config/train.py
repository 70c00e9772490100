"""The length of a run, its batches and its reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .options import check_types, common, option, raise_all, without_effect
from .preference import PREFERENCES, PreferenceOptions

REPORTERS = ("wandb", "swanlab")


@dataclass(frozen=True)
class TrainConfig(PreferenceOptions):
    """The length of a run, its batches and its reports. One iteration is one batch."""

    help_section = "Run"

    iters: int = common(1000, "Iterations (batches) to train for.")
    batch_size: int = common(4, "Rows per batch.")
    pack: bool = option(
        False,
        "Place several rows side by side in each sequence of --max-seq-length tokens; every row attends to itself "
        "alone, and none is cut for it. --batch-size then counts sequences.",
    )
    loss: str = option("cross_entropy", f"cross_entropy; or, to learn from preferences: {', '.join(PREFERENCES)}.")
    grad_accumulation_steps: int = option(1, "Batches per optimizer step; every token has the same weight.")
    max_grad_norm: float | None = option(None, "Clip the gradient to this global norm.")
    val_batches: int = option(25, "Validation batches; -1 for the whole set.")
    steps_per_report: int = option(10, "Iterations between reports of the training loss.")
    steps_per_eval: int = option(200, "Iterations between validations.")
    save_every: int = option(100, "Iterations between checkpoints.", section="Output")
    grad_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")
    clear_cache_threshold: int | None = option(
        None,
        "Empty MLX's cache of freed memory after a step that leaves it larger than this "
        "(default: keep it, up to a quarter of the GPU's working set).",
    )
    max_skipped_steps: int = option(10, "Stop after this many steps in a row with non-finite gradients.")
    seed: int = option(0, "Seed of the initialisation, dropout and the order of the data.")

    def __post_init__(self):
        check_types(self)
        faults = []
        for name in (
            "iters",
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "save_every",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.append(f"{name} must be an integer of at least 1, not {value!r}")
        if not isinstance(self.val_batches, int) or self.val_batches < -1:
            faults.append(f"val_batches must be -1 (all), 0 (none) or more, not {self.val_batches!r}")
        most = self.clear_cache_threshold
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            faults.append(f"clear_cache_threshold must be a number of bytes, not {most!r}")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
            faults.append(f"max_grad_norm must be a positive number, not {norm!r}")
        if not isinstance(self.max_skipped_steps, int) or self.max_skipped_steps < 1:
            faults.append(f"max_skipped_steps must be at least 1, not {self.max_skipped_steps!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            faults.append(f"seed must be an integer from 0 to 2^32 - 1, not {self.seed!r}")
        raise_all(faults + self.preference_faults() + without_effect(self, _TRAIN_RULES), self)


_TRAIN_RULES = ((("steps_per_eval",), lambda c: c.val_batches != 0, "has no effect where val_batches is 0"),)
