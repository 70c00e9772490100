"""Starts from chance, or from the weight of the layer alone: gaussian, orthogonal, PiSSA, OLoRA.

Pairs are A [.., r, in] and B [.., out, r] in float32 NumPy; a leading axis is one of experts.

    gaussian     A ~ N(0, 1/r^2), B = 0
    orthogonal   A, B from the odd and the even rows of one orthogonal matrix: B A = 0, neither zero (r even)
    pissa        W = U S V^T: A = sqrt(S_r / scale) V_r^T, B = U_r sqrt(S_r / scale) (arXiv:2404.02948)
    pissa_niter_N  the same from a randomized SVD of N power iterations (arXiv:0909.4061)
    olora        W = Q R: A = R_r, B = Q_r (arXiv:2406.01775)
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import ConfigError

Pair = tuple[np.ndarray, np.ndarray]


def from_weight(init: str, weight: np.ndarray, rank: int, scale: float) -> Pair:
    """(A, B) for the start ``init`` of a layer with ``weight`` [.., out, in]."""
    *many, rows, columns = weight.shape
    if init == "gaussian":
        return normal((*many, rank, columns)) / rank, np.zeros((*many, rows, rank), np.float32)
    if init == "orthogonal":
        return _orthogonal(tuple(many), rows, columns, rank)
    if init == "olora":
        q, r = np.linalg.qr(weight)
        return r[..., :rank, :], q[..., :rank]
    if init == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = svd_lowrank(weight, rank, int(init.rpartition("_")[2]))
    if scale < 0:
        raise ConfigError(
            f"{init} starts from a positive multiple of W: the scale is {scale:g}", "Give a positive one."
        )
    root = np.sqrt(s[..., :rank] / np.float32(scale))
    return root[..., None] * v[..., :rank, :], u[..., :rank] * root[..., None, :]


def _orthogonal(many: tuple[int, ...], rows: int, columns: int, rank: int) -> Pair:
    if rank % 2:
        raise ConfigError(f"orthogonal wants an even rank, not {rank}", f"Use {rank + 1}.")
    q, _ = np.linalg.qr(normal((*many, rank, rank)))
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    a = np.swapaxes(normal((*many, columns, rank // 2)) @ odd, -1, -2) / np.float32(10)
    return a, np.swapaxes(normal((*many, rank // 2, rows)), -1, -2) @ even / np.float32(10)


def svd_lowrank(matrix: np.ndarray, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U [.., m, rank], S [.., rank], V^T [.., rank, n]), nearly those of the largest singular values.

    A random subspace, turned towards them by ``iterations`` rounds with the matrix and its transpose.
    """
    transposed = np.swapaxes(matrix, -1, -2)
    q, _ = np.linalg.qr(matrix @ normal((*matrix.shape[:-2], matrix.shape[-1], rank)))
    for _ in range(iterations):
        q, _ = np.linalg.qr(transposed @ q)
        q, _ = np.linalg.qr(matrix @ q)
    u, s, v = np.linalg.svd(np.swapaxes(q, -1, -2) @ matrix, full_matrices=False)
    return q @ u, s, v


def largest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``rank`` largest singular triples: exactly for small matrices, by ``svd_lowrank`` for large ones."""
    if min(matrix.shape[-2:]) <= max(512, 4 * rank):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = svd_lowrank(matrix, min(2 * rank, min(matrix.shape[-2:])), 4)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def normal(shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1), drawn from MLX's random state: the seed of a run holds for everything."""
    return np.array(mx.random.normal(shape))
