"""Training data: rows -> tokens and a mask of the tokens to learn -> batches. Nothing here prints or needs MLX.

sources.py   where each split's rows are     files.py     the formats of files
shapes.py    which columns are read          messages.py  messages and tools, rewritten as OpenAI's
rows.py      rows to samples                 faults.py    what is wrong, as a short list
template.py  the chat template               left_out.py  what the template leaves out
chat.py      a sample's tokens and mask      load.py      data sets from sources or from rows in memory
batches.py   the data set, its batches       packing.py   batches with several rows in a sequence
numbered.py  whether a split is complete     questions.py rows as questions with known answers
epochs.py    the batches of a run's epochs
samples.py   a checked row, and its parts    preference_rows.py, preferences.py   rows with preferences, their batches
"""

from __future__ import annotations

from .batches import Batch, Dataset, Example, Summary, batches_per_epoch, eval_batches, train_batches
from .epochs import in_iterations, iterations
from .load import Splits, load_dataset, tokenize
from .packing import PackedBatch, packed_batches
from .questions import Question, questions

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "PackedBatch",
    "Question",
    "Splits",
    "Summary",
    "batches_per_epoch",
    "eval_batches",
    "in_iterations",
    "iterations",
    "load_dataset",
    "packed_batches",
    "questions",
    "tokenize",
    "train_batches",
]
