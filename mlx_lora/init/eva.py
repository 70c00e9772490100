"""EVA: A from the directions of largest variance of a layer's inputs (arXiv:2410.07170). B = 0.

For each layer an incremental SVD of its inputs is updated batch by batch until its directions stop changing. Then the
total of all ranks is distributed over the layers: the directions that explain the largest shares of their layer's
variance are used, in whichever layer. A layer without such a direction gets no adapter.
"""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np

from ..base.decompositions import Pair
from ..base.modules import dims
from ..errors import DataError
from .inputs import record_inputs
from .request import Request

RHO, TAU, BATCHES = 2.0, 0.99, 32


class IncrementalSVD:
    """The ``size`` leading principal directions of rows that arrive in batches.

    ``components``: [size, in]; ``ratio``: [size], the share of the total variance that each explains.
    """

    def __init__(self, size: int):
        self.size, self.seen = size, 0
        self.components = self.values = self.mean = None
        self.total = 0.0  # sum of squared distances from the mean

    def add(self, rows: np.ndarray) -> None:
        """Update with ``rows`` [n, in]; n must be at least ``size``."""
        count, mean = len(rows), rows.mean(axis=0, dtype=np.float64)
        centred = (rows - mean).astype(np.float32)
        self.total += float(np.square(centred, dtype=np.float64).sum())
        if self.seen:
            shift = np.sqrt(self.seen * count / (self.seen + count)) * (self.mean - mean)
            self.total += float(np.square(shift).sum())
            stack = [self.values[:, None] * self.components, centred, shift[None].astype(np.float32)]
            centred = np.concatenate(stack)
            mean = (self.mean * self.seen + mean * count) / (self.seen + count)
        values, components = _directions(centred, self.size)
        # The sign of a direction is arbitrary; the largest entry is made positive.
        signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1))
        self.values, self.components = values, components * signs
        self.mean, self.seen = mean, self.seen + count

    @property
    def ratio(self) -> np.ndarray:
        return np.square(self.values, dtype=np.float64) / max(self.total, 1e-30)


def _directions(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(S [count], V^T [count, in]) of ``rows`` [n, in], from the eigenvectors of the smaller Gram matrix."""
    exact = rows.astype(np.float64)
    if len(rows) >= rows.shape[1]:
        square, vectors = np.linalg.eigh(exact.T @ exact)
        components = vectors[:, ::-1][:, :count].T
    else:
        square, vectors = np.linalg.eigh(exact @ exact.T)
        components = vectors[:, ::-1][:, :count].T @ exact
        components /= np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-30)
    return np.sqrt(np.maximum(square[::-1][:count], 0)).astype(np.float32), components.astype(np.float32)


def initial_pairs(request: Request) -> dict[str, Pair]:
    """Pairs of ranks that EVA chooses; modules that it leaves out are missing.

    ``config.eva_rho``: a layer gets at most rho times its configured rank. ``config.eva_tau``: a direction has
    converged when its cosine with its previous value is at least tau. Batches are read until all layers have converged.

    Raises: DataError: too few tokens.
    """
    modules, ranks = request.modules, request.ranks
    rho, tau = request.config.eva_rho or RHO, request.config.eva_tau or TAU
    limits = {path: min(round(rank * rho), dims(modules[path])[0]) for path, rank in ranks.items()}
    tracked: dict[str, _InputSVD] = {}
    groups: dict[str, str] = {}  # path -> the first path with the same input
    converged, counts = False, None
    for batch in request.first_batches(BATCHES):
        if converged:
            break
        inputs = record_inputs(request.model, modules, batch.tokens)
        if not tracked:
            groups = _first_with_same_input(inputs)
            for path, first in groups.items():
                limits[first] = max(limits[first], limits[path])
            tracked = {first: _InputSVD(limits[first]) for first in dict.fromkeys(groups.values())}
        needed = _needed(tracked, groups, counts, limits)
        counted = np.array(batch.mask).reshape(-1).astype(bool)
        for path, one in tracked.items():
            if not one.converged(needed[path], tau):
                x = inputs[path]
                one.add(np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32))[counted])
        if all(one.svd.seen for one in tracked.values()):
            counts = _distribute(tracked, groups, ranks, limits)
            needed = _needed(tracked, groups, counts, limits)
            converged = all(one.converged(needed[path], tau) for path, one in tracked.items())
    if counts is None:
        most = max(limits.values(), default=0)
        raise DataError(
            f"init eva needs at least {most} tokens to find {most} directions, and the data has fewer",
            "Use more data, a lower rank, or another init.",
        )
    return {
        path: (tracked[groups[path]].svd.components[:count], np.zeros((dims(modules[path])[1], count), np.float32))
        for path, count in counts.items()
        if count
    }


class _InputSVD:
    """The incremental SVD of one input; collects rows until there are enough for an update."""

    def __init__(self, size: int):
        self.svd, self.pending, self.cosines = IncrementalSVD(size), [], None

    def add(self, rows: np.ndarray) -> None:
        self.pending.append(rows)
        if sum(map(len, self.pending)) < self.svd.size:
            return
        before = self.svd.components
        self.svd.add(np.concatenate(self.pending))
        self.pending = []
        if before is not None:
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(self.svd.components, axis=1)
            self.cosines = (before * self.svd.components).sum(axis=1) / np.maximum(norms, 1e-30)

    def converged(self, count: int, tau: float) -> bool:
        """Whether the first ``count`` directions stayed the same in the last update."""
        return count == 0 or (self.cosines is not None and bool((self.cosines[:count] >= tau).all()))


def _first_with_same_input(inputs: dict[str, mx.array]) -> dict[str, str]:
    """Each path with the first path that received the same array object, as q, k and v do."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(x), path) for path, x in inputs.items()}


def _needed(tracked, groups, counts: dict[str, int] | None, limits: dict[str, int]) -> dict[str, int]:
    """How many directions of each tracked input must converge: the most that a layer with this input uses."""
    if counts is None:
        return {path: limits[path] for path in tracked}
    return {path: max(counts[p] for p, first in groups.items() if first == path) for path in tracked}


def _distribute(tracked, groups, ranks: dict[str, int], limits: dict[str, int]) -> dict[str, int]:
    """The rank of each layer: the total of ``ranks`` goes to the largest shares of variance over all layers."""
    shares = [
        (share, -i, path)
        for i, (path, first) in enumerate(groups.items())
        for share in tracked[first].svd.ratio[: limits[first]]
    ]
    best = sorted(shares, reverse=True)[: sum(ranks.values())]
    counts = Counter(path for *_, path in best)
    return {path: counts[path] for path in groups}
