"""Low-rank factors of a weight matrix, in NumPy: the pairs of PiSSA and OLoRA, and truncated SVDs.

A pair is (A [.., r, in], B [.., out, r]) for a weight [.., out, in]; a leading axis counts experts. Used by the
initialisations that start from the weight and by the readers of adapters that started that way.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def pissa_pair(weight: np.ndarray, rank: int, scale: float, iterations: int | None = None) -> Pair:
    """PiSSA (arXiv:2404.02948): the pair for which scale B A is the best approximation of ``weight`` at this rank.

    With W = U S V^T: A = sqrt(S_r / scale) V_r^T, B = U_r sqrt(S_r / scale).

    Args:
        scale: above 0.
        iterations: use a randomized SVD with this many power iterations; the exact SVD by default.
    """
    if iterations is None:
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = randomized_svd(weight, rank, iterations)
    root = np.sqrt(s[..., :rank] / np.float32(scale))
    return root[..., None] * v[..., :rank, :], u[..., :rank] * root[..., None, :]


def olora_pair(weight: np.ndarray, rank: int) -> Pair:
    """OLoRA (arXiv:2406.01775): with W = Q R, A = the first rows of R and B = the first columns of Q."""
    q, r = np.linalg.qr(weight)
    return r[..., :rank, :], q[..., :rank]


def randomized_svd(matrix: np.ndarray, rank: int, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Approximate (U [.., m, rank], S [.., rank], V^T [.., rank, n]) of the largest singular values (arXiv:0909.4061).

    A random subspace is improved by ``iterations`` multiplications with the matrix and its transpose.
    """
    transposed = np.swapaxes(matrix, -1, -2)
    q, _ = np.linalg.qr(matrix @ normal((*matrix.shape[:-2], matrix.shape[-1], rank)))
    for _ in range(iterations):
        q, _ = np.linalg.qr(transposed @ q)
        q, _ = np.linalg.qr(matrix @ q)
    u, s, v = np.linalg.svd(np.swapaxes(q, -1, -2) @ matrix, full_matrices=False)
    return q @ u, s, v


def largest_singular(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, V^T) of the ``rank`` largest singular values: exact for small matrices, randomized for large ones."""
    if min(matrix.shape[-2:]) <= max(512, 4 * rank):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = randomized_svd(matrix, min(2 * rank, min(matrix.shape[-2:])), 4)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def normal(shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) from MLX's random state, so that a run's seed covers it."""
    return np.array(mx.random.normal(shape))
