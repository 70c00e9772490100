"""Training data: rows -> tokens and a mask of the tokens to learn -> batches. Nothing here prints or needs MLX.

sources.py  rows from files and the Hub     rows.py       the kind of rows, checks
chat.py     a row's tokens and mask         load.py       data sets from sources or from rows in memory
batches.py  the data set, its batches       questions.py  rows as questions with known answers
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
