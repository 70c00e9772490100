"""EVA: A from the directions in which a layer's inputs vary most, ranks where they explain most (arXiv:2410.07170).

Each layer keeps an incremental SVD of the inputs it sees: the singular vectors so far, weighted by their singular
values, are stacked upon the new inputs and decomposed anew. When the vectors stop turning the layer is done. Then the
whole budget of ranks goes to the directions that explain the largest share of their layer's variance; a layer may end
with none. B is 0, the base is untouched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.modules import dims
from ..errors import DataError
from .inputs import recorded

RHO, TAU = 2.0, 0.99


@dataclass(frozen=True)
class Eva:
    """What EVA found for a layer."""

    rank: int  # 0: the layer is left out
    a: np.ndarray  # [rank, in]


class IncrementalSVD:
    """The ``size`` leading directions of rows seen in portions, about their mean.

    ``components``: [size, in]; ``ratio``: [size], the share of all variance that each explains.
    """

    def __init__(self, size: int):
        self.size, self.seen = size, 0
        self.components = self.values = self.mean = None
        self.total = 0.0  # sum of squared distances from the mean

    def add(self, rows: np.ndarray) -> None:
        """Take in ``rows`` [n, in], n at least ``size``."""
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
        # A direction and its opposite are one: fixed by the sign of the largest entry.
        signs = np.sign(np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1))
        self.values, self.components = values, components * signs
        self.mean, self.seen = mean, self.seen + count

    @property
    def ratio(self) -> np.ndarray:
        return np.square(self.values, dtype=np.float64) / max(self.total, 1e-30)


def _directions(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(S [count], V^T [count, in]) of ``rows`` [n, in] by the eigenvectors of the smaller of its two squares."""
    exact = rows.astype(np.float64)
    if len(rows) >= rows.shape[1]:
        square, vectors = np.linalg.eigh(exact.T @ exact)
        components = vectors[:, ::-1][:, :count].T
    else:
        square, vectors = np.linalg.eigh(exact @ exact.T)
        components = vectors[:, ::-1][:, :count].T @ exact
        components /= np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-30)
    return np.sqrt(np.maximum(square[::-1][:count], 0)).astype(np.float32), components.astype(np.float32)


def eva(
    model: nn.Module,
    modules: dict[str, nn.Module],
    ranks: dict[str, int],
    batches: Iterable,
    rho: float = RHO,
    tau: float = TAU,
) -> dict[str, Eva]:
    """Directions and ranks for ``modules``, the linears of ``model`` that will be adapted.

    Args:
        ranks: that each would have; their sum is the budget.
        batches: with ``tokens`` [B, T] and ``mask`` [B, T-1] (which predictions count: only their inputs are used);
            read until every layer is done, or to their end.
        rho: a layer may get up to so many times its rank.
        tau: a direction has stopped turning when its cosine with the last one is this.
    """
    limits = {path: min(round(rank * rho), dims(modules[path])[0]) for path, rank in ranks.items()}
    tracked: dict[str, _Tracked] = {}
    groups: dict[str, str] = {}  # path -> the path whose inputs it shares
    done, result = False, None
    for batch in batches:
        if done:
            break
        inputs = recorded(model, modules, batch.tokens)
        if not tracked:
            groups = _sharing(inputs)
            for path, first in groups.items():
                limits[first] = max(limits[first], limits[path])
            tracked = {first: _Tracked(limits[first]) for first in dict.fromkeys(groups.values())}
        counted = np.array(batch.mask).reshape(-1).astype(bool)
        for path, one in tracked.items():
            needed = result[path].rank if result else limits[path]
            needed = max([needed, *(result[p].rank for p, f in groups.items() if f == path)]) if result else needed
            if not one.settled(needed, tau):
                x = inputs[path]
                one.take(np.array(x.reshape(-1, x.shape[-1]).astype(mx.float32))[counted])
        if all(one.svd.seen for one in tracked.values()):
            result = _distribute(tracked, groups, ranks, limits)
            done = all(one.settled(max(result[p].rank for p, f in groups.items() if f == path), tau)
                       for path, one in tracked.items())  # fmt: skip
    if result is None:
        most = max(limits.values(), default=0)
        raise DataError(
            f"EVA needs at least {most} tokens to learn for {most} directions, and the data has fewer",
            "Use more data, a lower rank, or another init.",
        )
    return result


class _Tracked:
    """A layer's SVD, its rows that wait for more, and how far its vectors turned last."""

    def __init__(self, size: int):
        self.svd, self.waiting, self.turned = IncrementalSVD(size), [], None

    def take(self, rows: np.ndarray) -> None:
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) < self.svd.size:
            return
        before = self.svd.components
        self.svd.add(np.concatenate(self.waiting))
        self.waiting = []
        if before is not None:
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(self.svd.components, axis=1)
            self.turned = (before * self.svd.components).sum(axis=1) / np.maximum(norms, 1e-30)

    def settled(self, count: int, tau: float) -> bool:
        return count == 0 or (self.turned is not None and bool((self.turned[:count] >= tau).all()))


def _sharing(inputs: dict[str, mx.array]) -> dict[str, str]:
    """Each path with the first that was given the very same array: q, k and v see one input."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(x), path) for path, x in inputs.items()}


def _distribute(tracked, groups, ranks: dict[str, int], limits: dict[str, int]) -> dict[str, Eva]:
    """The budget of ranks goes to the largest shares of variance, over all layers."""
    shares = [
        (share, -i, path)
        for i, (path, first) in enumerate(groups.items())
        for share in tracked[first].svd.ratio[: limits[first]]
    ]
    best = sorted(shares, reverse=True)[: sum(ranks.values())]
    counts = Counter(path for *_, path in best)
    return {path: Eva(counts[path], tracked[first].svd.components[: counts[path]]) for path, first in groups.items()}
