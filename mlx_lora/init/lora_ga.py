"""LoRA-GA: the first step follows the gradient of full fine-tuning (arXiv:2407.05000).

The gradient of W over some batches is U S V^T. A = the first r rows of V^T. B = the next r columns of U, times their
singular values and out^(1/4) / sqrt(gamma) (PEFT's "ArB2r" and "stable", gamma 16).
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..adapter import raise_faults
from ..base.decompositions import Pair, largest_singular
from ..base.modules import frozen_parameters, is_quantized, restore_frozen
from ..errors import DataError
from ..training.losses import cross_entropy
from .request import Request

GAMMA, BATCHES = 16, 8


def initial_pairs(request: Request) -> dict[str, Pair]:
    """Raises: AdapterError: a quantized layer, or a rank above half of its layer's; DataError: no tokens to learn."""
    modules, ranks = request.modules, request.ranks
    faults = [f"{path}: quantized weights have no gradient" for path, m in modules.items() if is_quantized(m)]
    faults += [
        f"{path}: rank {ranks[path]} is above half of {min(m.weight.shape)}, and lora_ga needs twice the rank"
        for path, m in modules.items()
        if 2 * ranks[path] > min(m.weight.shape)
    ]
    raise_faults(faults, "Use another init for these modules, a dense base, or a lower rank.")
    pairs = {}
    for path, gradient in _gradients(request.model, modules, request.first_batches(BATCHES)).items():
        rank = ranks[path]
        u, s, v = largest_singular(gradient, 2 * rank)
        scale = np.float32(gradient.shape[0] ** 0.25 / GAMMA**0.5)
        pairs[path] = v[:rank], u[:, rank:] * s[rank:] * scale
    return pairs


def _gradients(model: nn.Module, modules: dict[str, nn.Module], batches: Iterable) -> dict[str, np.ndarray]:
    """The mean gradient of each weight over all batches, float32 [out, in]."""
    frozen = frozen_parameters(model)
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
        restore_frozen(frozen)
    if not tokens:
        raise DataError(
            "init lora_ga needs the gradient of some tokens, and the data has none to learn",
            "Give rows with an answer, raise max_seq_length, or use another init.",
        )
    return {path: np.array(sums[f"{path}.weight"] / tokens) for path in modules}
