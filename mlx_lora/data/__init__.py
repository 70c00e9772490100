"""Rows -> tokens and the mask of those to learn -> batches. Values only: nothing here prints, and MLX is not needed.

sources.py  reads files and the hub        rows.py     finds the kind of rows and checks them
chat.py     a row's tokens and mask        dataset.py  the rows in memory, their summary
batches.py  order, widths, batches
"""

from __future__ import annotations

from .batches import Batch, Dataset, Example, Summary, batches_per_epoch, eval_batches, train_batches
from .load import Splits, load_dataset, tokenize

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Splits",
    "Summary",
    "batches_per_epoch",
    "eval_batches",
    "load_dataset",
    "tokenize",
    "train_batches",
]
