"""A fine-tune in a folder, for the command line, Python and a server alike. Nothing here prints.

``run`` trains and keeps the folder; ``measure`` evaluates a model on a test set. Both are generators of frozen reports.
"""

from __future__ import annotations

from .evaluation import answers, measure
from .fine_tune import run
from .folder import RunFolder, is_main_process
from .reports import Answer, DataLoaded, EarlierRunMoved, Loading, PrefixCache, Started, TestReport, Warned

__all__ = [
    "Answer",
    "DataLoaded",
    "EarlierRunMoved",
    "Loading",
    "PrefixCache",
    "RunFolder",
    "Started",
    "TestReport",
    "Warned",
    "answers",
    "is_main_process",
    "measure",
    "run",
]
