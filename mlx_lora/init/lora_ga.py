"""LoRA-GA: start so that the first step follows the gradient of full fine-tuning (arXiv:2407.05000).

The gradient of W over some batches is U S V^T; A = the first r rows of V^T, B = the next r columns of U, times their
singular values and out^(1/4) / sqrt(gamma) (PEFT's "ArB2r" and "stable", gamma 16).
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..base.modules import is_quantized
from ..errors import AdapterError, DataError
from ..training.losses import cross_entropy
from .weights import largest

GAMMA = 16
Pair = tuple[np.ndarray, np.ndarray]


def lora_ga(
    model: nn.Module, modules: dict[str, nn.Module], ranks: dict[str, int], batches: Iterable
) -> dict[str, Pair]:
    """(A [r, in], B [out, r]) for ``modules``, the dense linears of ``model`` that will be adapted.

    Args:
        batches: with ``tokens`` [B, T] and ``mask`` [B, T-1]; all of them are read.

    Raises: AdapterError: a quantized layer, or a rank above half of its layer's.
    """
    faults = [f"{path}: quantized weights have no gradient" for path, m in modules.items() if is_quantized(m)]
    faults += [
        f"{path}: rank {ranks[path]} is above half of {min(m.weight.shape)}, and lora_ga starts from twice the rank"
        for path, m in modules.items()
        if 2 * ranks[path] > min(m.weight.shape)
    ]
    if faults:
        raise AdapterError("\n".join(faults[:12]), "Use another init there, or another base or rank.")
    pairs = {}
    for path, gradient in _gradients(model, modules, batches).items():
        rank = ranks[path]
        u, s, v = largest(gradient, 2 * rank)
        scale = np.float32(gradient.shape[0] ** 0.25 / GAMMA**0.5)
        pairs[path] = v[:rank], u[:, rank:] * s[rank:] * scale
    return pairs


def _gradients(model: nn.Module, modules: dict[str, nn.Module], batches: Iterable) -> dict[str, np.ndarray]:
    """The mean gradient of each weight, float32 [out, in]."""
    frozen = dict(tree_flatten(model.trainable_parameters()))
    model.freeze()
    for module in modules.values():
        module.unfreeze(recurse=False, keys="weight")
    sums: dict[str, mx.array] = {}
    tokens = 0.0
    try:
        for batch in batches:
            (_, count), gradients = nn.value_and_grad(model, cross_entropy.loss)(model, batch.tokens, batch.mask)
            flat = dict(tree_flatten(gradients))
            sums = {k: sums.get(k, 0) + g.astype(mx.float32) for k, g in flat.items()}
            mx.eval(sums, count)
            tokens += count.item()
    finally:
        model.freeze()
        modules_by_path = dict(model.named_modules())
        for name in frozen:
            path, _, leaf = name.rpartition(".")
            modules_by_path[path].unfreeze(recurse=False, keys=leaf)
    if not tokens:
        raise DataError(
            "lora_ga needs the gradient of some tokens, and the data has none to learn",
            "Give rows with an answer, raise max_seq_length, or use another init.",
        )
    return {path: np.array(sums[f"{path}.weight"] / tokens) for path in modules}
