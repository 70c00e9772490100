"""OLoRA: A and B from the QR decomposition of W (arXiv:2406.01775)."""

from __future__ import annotations

from ..base.decompositions import Pair, olora_pair
from .request import Request


def initial_pairs(request: Request) -> dict[str, Pair]:
    return request.from_weights(lambda weight, rank, scale: olora_pair(weight, rank))
