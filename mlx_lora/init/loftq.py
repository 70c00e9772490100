"""LoftQ: an adapter that compensates for the quantization error (arXiv:2310.08659).

Alternates between Q = quantize(W - scale B A) and the best scale B A of rank r for W - Q. Unlike in PEFT, the pair is
divided by the scale, so that Q + scale B A approximates W for every scale. After one iteration Q is the quantization of
W itself; after more it is another matrix, which must be saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapter import Adapter
from ..base.decompositions import Pair, largest_singular
from ..base.modules import dense_weight, dims, kind
from ..base.nf4 import dequantize_nf4, quantize_nf4
from ..base.quantizing import Quantized, check_mode, check_model, quantize
from ..config import AdapterConfig
from ..errors import AdapterError, ConfigError
from ..layers import check_rank
from .request import Request


def initial_pairs(request: Request) -> dict[str, Pair]:
    """Pairs for a model that is already quantized, from the reference model's weights.

    Raises: AdapterError: the reference model has no such layer.
    """
    pairs, originals = {}, dict(request.reference.named_modules())
    for path, module in request.modules.items():
        original = originals.get(path)
        if original is None or kind(original) != kind(module) or dims(original) != dims(module):
            raise AdapterError(
                f"{path}: the reference model has no such layer",
                "Pass the same model as it was before quantization.",
            )
        quantized, scale = np.array(dense_weight(module)), request.config.scale_of(path)
        pair, _ = loftq_pair(np.array(dense_weight(original)), lambda _, q=quantized: q, request.ranks[path], scale)
        pairs[path] = pair
    return pairs


def loftq_pair(
    weight: np.ndarray, quantized: Callable[[np.ndarray], np.ndarray], rank: int, scale: float, iterations: int = 1
) -> tuple[Pair, np.ndarray]:
    """((A [.., r, in], B [.., out, r]), the matrix to quantize).

    Args:
        weight: [.., out, in] float32.
        quantized: returns its argument after quantizing and dequantizing.
    """
    target = weight
    for last in range(iterations, 0, -1):
        u, s, v = largest_singular(weight - quantized(target), rank)
        root = np.sqrt(s / np.float32(abs(scale)))
        a, b = root[..., None] * v, u * root[..., None, :] * np.float32(np.sign(scale))
        if last > 1:
            target = weight - np.float32(scale) * (b @ a)
    return (a, b), target


def quantize_with_loftq(
    model: nn.Module,
    modules: dict[str, nn.Module],
    rank: int,
    iterations: int = 1,
    *,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    double_quant: bool = False,
) -> tuple[Quantized, Adapter]:
    """Quantize ``model`` in place, and compute the LoftQ adapter (scale 1) for the result.

    Args:
        modules: the linears and experts of ``model`` to adapt, by path.
        rank: of the adapter.
        iterations: LoftQ's alternations. With more than one, the quantized weights are not those of ``model``.

    Raises: as ``quantize``.
    """
    bits, group_size = check_mode(mode, bits, group_size, double_quant)
    if rank < 1 or iterations < 1:
        raise ConfigError(
            "LoftQ needs a rank and iterations of at least 1", "Use a rank such as 16, and 1 to 5 iterations."
        )
    check_model(model, mode)

    def through(weight: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
        exact = mx.array(weight).astype(dtype)
        if mode == "nf4":
            return np.array(dequantize_nf4(quantize_nf4(exact, double_quant, group_size)))
        settings = dict(group_size=group_size, bits=bits, mode=mode)
        packed = mx.quantize(exact, **settings)
        return np.array(mx.dequantize(*packed, **settings, dtype=mx.float32))

    weights = {}
    for path, module in modules.items():
        check_rank(module, rank)
        weight, dtype = np.array(dense_weight(module)), module.weight.dtype
        if mode != "nf4" and weight.shape[-1] % group_size:  # this layer stays dense: LoRA's default initialisation
            bound = 1 / math.sqrt(weight.shape[-1])
            a = np.array(mx.random.uniform(-bound, bound, (*weight.shape[:-2], rank, weight.shape[-1])))
            b = np.zeros((*weight.shape[:-1], rank), np.float32)
        else:
            (a, b), target = loftq_pair(weight, lambda w, dtype=dtype: through(w, dtype), rank, 1.0, iterations)
            module.weight = mx.array(target).astype(dtype)
        if a.ndim == 2:
            a, b = a.T, b.T
        weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = (mx.array(np.ascontiguousarray(x)) for x in (a, b))
    report = quantize(model, mode, bits=bits, group_size=group_size, double_quant=double_quant)
    return report, Adapter(AdapterConfig(rank=rank, scale=1.0, num_layers=-1), weights).check()
