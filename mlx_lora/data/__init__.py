"""Rows -> tokens and the mask of those to learn -> batches. Values only: nothing here prints, and MLX is not needed.

sources.py  reads files and the hub        rows.py     finds the kind of rows and checks them
chat.py     a row's tokens and mask        dataset.py  the rows in memory, their summary
batches.py  order, widths, batches     questions.py  rows as questions with known answers
"""

from __future__ import annotations

from .batches import Batch, Dataset, Example, Summary, batches_per_epoch, eval_batches, train_batches
from .load import Splits, load_dataset, tokenize
from .questions import Question, questions

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Question",
    "Splits",
    "Summary",
    "batches_per_epoch",
    "eval_batches",
    "load_dataset",
    "questions",
    "tokenize",
    "train_batches",
]
