"""PEFT's "gaussian" initialisation: A ~ N(0, 1/r^2), B = 0."""

from __future__ import annotations

import numpy as np

from ..base.decompositions import Pair, normal
from .request import Request


def initial_pairs(request: Request) -> dict[str, Pair]:
    pairs = {}
    for path, rank in request.ranks.items():
        *experts, rows, columns = request.shape(path)
        pairs[path] = normal((*experts, rank, columns)) / rank, np.zeros((*experts, rows, rank), np.float32)
    return pairs
