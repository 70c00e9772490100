"""Train the trainable parameters of any `nn.Module` on batches of tokens.

This room knows no adapter method and no adapter format, and prints nothing: `train` yields the reports of `reports.py`.
"""

from __future__ import annotations

from .checkpoints import TrainingState
from .evaluation import evaluate
from .losses import LOSSES
from .optimizers import MasterWeights, build_optimizer
from .reference import referenced
from .reports import Checkpoint, Done, Evaluation, NewBest, Progress, Report, SkippedStep, TrainReport, ValReport
from .trainer import train

__all__ = [
    "LOSSES",
    "Checkpoint",
    "Done",
    "Evaluation",
    "MasterWeights",
    "NewBest",
    "Progress",
    "Report",
    "SkippedStep",
    "TrainReport",
    "TrainingState",
    "ValReport",
    "build_optimizer",
    "evaluate",
    "referenced",
    "train",
]
