"""Training: whatever is trainable in an `nn.Module`, learned from batches of tokens.

Knows no adapter method and no file format of adapters, and prints nothing: `train` yields the reports of `reports.py`.
"""

from __future__ import annotations

from .checkpoints import TrainingState
from .loss import evaluate, loss_fn
from .optimizers import MasterWeights, build_optimizer
from .reports import Checkpoint, Done, Evaluation, Progress, Report, SkippedStep, TrainReport, ValReport
from .trainer import train

__all__ = [
    "Checkpoint",
    "Done",
    "Evaluation",
    "MasterWeights",
    "Progress",
    "Report",
    "SkippedStep",
    "TrainReport",
    "TrainingState",
    "ValReport",
    "build_optimizer",
    "evaluate",
    "loss_fn",
    "train",
]
