"""PEFT's "orthogonal" initialisation: B A = 0 although neither A nor B is zero.

A uses the even rows of one random orthogonal [r, r] matrix and B the odd rows, so the rank must be even.
"""

from __future__ import annotations

import numpy as np

from ..base.decompositions import Pair, normal
from ..errors import ConfigError
from .request import Request


def initial_pairs(request: Request) -> dict[str, Pair]:
    """Raises: ConfigError: an odd rank."""
    return {path: _pair(request.shape(path), rank) for path, rank in request.ranks.items()}


def _pair(shape: tuple[int, ...], rank: int) -> Pair:
    if rank % 2:
        raise ConfigError(f"init orthogonal needs an even rank, not {rank}", f"Use {rank + 1}.")
    *experts, rows, columns = shape
    q, _ = np.linalg.qr(normal((*experts, rank, rank)))
    even, odd = q[..., 0::2, :], q[..., 1::2, :]
    a = np.swapaxes(normal((*experts, columns, rank // 2)) @ even, -1, -2) / np.float32(10)
    return a, np.swapaxes(normal((*experts, rank // 2, rows)), -1, -2) @ odd / np.float32(10)
