"""PiSSA: A and B hold the largest singular values of W (arXiv:2404.02948).

``pissa`` computes the SVD exactly, ``pissa_niter_N`` by a randomized SVD with N power iterations.
"""

from __future__ import annotations

import functools

from ..adapter import raise_faults
from ..base.decompositions import Pair, pissa_pair
from ..errors import ConfigError
from .request import Request


def initial_pairs(request: Request) -> dict[str, Pair]:
    """Raises: ConfigError: a negative scale."""
    negative = {path: scale for path in request.modules if (scale := request.config.scale_of(path)) < 0}
    raise_faults(
        [f"{path}: init pissa needs a positive scale, not {scale:g}" for path, scale in negative.items()],
        "Use a positive scale, or another init.",
        ConfigError,
    )
    _, _, iterations = request.config.init.partition("_niter_")
    return request.from_weights(functools.partial(pissa_pair, iterations=int(iterations) if iterations else None))
