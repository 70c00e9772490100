"""LoftQ: an adapter that makes up for what quantizing loses (arXiv:2310.08659).

Alternately Q = quantize(W - scale B A) and the best scale B A of rank r for W - Q. Unlike PEFT's, the pair is divided
by the scale, so that Q + scale B A is near W for every scale. Q belongs to the pair: after one round it is the plain
quantization of W, after more it is another and must be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapter import Adapter
from ..base.modules import dense_weight
from ..base.nf4 import dequantize_nf4, quantize_nf4
from ..base.quantizing import Quantized, check_mode, check_model, quantize
from ..config import AdapterConfig
from ..errors import ConfigError
from ..layers import check_rank
from .weights import largest

Pair = tuple[np.ndarray, np.ndarray]


def loftq_pair(
    weight: np.ndarray, quantized: Callable[[np.ndarray], np.ndarray], rank: int, scale: float, iterations: int = 1
) -> tuple[Pair, np.ndarray]:
    """((A [.., r, in], B [.., out, r]), the matrix that was quantized last).

    Args:
        weight: [.., out, in] float32.
        quantized: a matrix -> the numbers that are left of it when it is quantized.
    """
    target = weight
    for last in range(iterations, 0, -1):
        u, s, v = largest(weight - quantized(target), rank)
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
    """``quantize``, and a LoftQ adapter (scale 1) over ``modules`` that goes with the result.

    Args:
        modules: the linears and experts of ``model`` to adapt, by path.
        rank: of the adapter.
        iterations: rounds of quantizing and fitting; with more than one the weights quantized are not ``model``'s own.

    Raises: as ``quantize``.
    """
    bits, group_size = check_mode(mode, bits, group_size, double_quant)
    if rank < 1 or iterations < 1:
        raise ConfigError(
            "LoftQ wants a rank and a number of rounds of at least 1",
            "Give a rank such as 16, and 1 to 5 rounds: each fits the adapter to what the last one left.",
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
        if mode != "nf4" and weight.shape[-1] % group_size:  # stays as it is: a start as of any LoRA
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
