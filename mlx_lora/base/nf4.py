"""NF4, the 4-bit type of QLoRA (arXiv:2305.14314), with double quantization; the same bits as bitsandbytes.

The weight is flattened. Every block of 64 values is divided by its largest magnitude, ``absmax``, and each value is
stored as the nearest of 16 quantiles of a normal distribution; at a tie the lower one. Two codes make a byte, the first
in the high half. Double quantization stores the absmax values in 8 bits: their mean is subtracted, and blocks of 256
are divided by their largest magnitude and coded in a signed, floating "dynamic" type. (torch's float32 mean depends on
the processor. If its last bit differs from ours, some nested codes differ by one.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..kernels import Stored, enabled, nf4_dequantize
from ..kernels.stored import NF4 as NF4_VALUES

BLOCK, NESTED_BLOCK = 64, 256
_PIECE = 1 << 24  # values quantized at once
_STEPS = 1 << 16


@dataclass(frozen=True)
class NF4:
    """A quantized weight.

    Args:
        codes: uint8 [ceil(values / 2)], two codes per byte.
        absmax: largest magnitude of each block: float32 [blocks], or uint8 codes if double quantized.
        nested: decodes those uint8 codes: (absmax float32 [ceil(blocks / 256)], map float32 [256], offset float32 []);
            None without double quantization.
        shape: of the weight.
        block: values per block.
        nested_block: absmax values per nested block.
    """

    codes: mx.array
    absmax: mx.array
    nested: tuple[mx.array, mx.array, mx.array] | None
    shape: tuple[int, ...]
    block: int = BLOCK
    nested_block: int = field(default=NESTED_BLOCK)


def quantize_nf4(weight: mx.array, double: bool = True, block: int = BLOCK) -> NF4:
    """Quantize ``weight`` (floats of any shape) to NF4; ``double`` quantizes the absmax values, too."""
    flat = weight.reshape(-1)
    step = _PIECE // (2 * block) * (2 * block)  # a multiple of the block, and an even number of codes
    codes, absmax = [], []
    for start in range(0, flat.size, step):
        scaled, largest = _scaled(flat[start : start + step].astype(mx.float32), block)
        if scaled.size % 2:
            scaled = mx.concatenate([scaled, mx.zeros((1,))])
        piece = _nearest(scaled)
        codes.append((piece[0::2] << 4) | piece[1::2])
        absmax.append(largest)
        mx.eval(codes[-1], absmax[-1])
    codes, absmax = mx.concatenate(codes), mx.concatenate(absmax)
    if not double:
        return NF4(codes, absmax, None, weight.shape, block)
    absmax = np.array(absmax)
    offset = np.float32(absmax.mean(dtype=np.float64))
    nested, largest = _nested_codes(absmax - offset)
    values = mx.array(dynamic_map())
    return NF4(codes, mx.array(nested), (mx.array(largest), values, mx.array(offset)), weight.shape, block)


def _nested_codes(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices into ``dynamic_map``, the largest magnitude of each block of 256)."""
    padded = np.pad(absmax, (0, -len(absmax) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = np.abs(padded).max(axis=1)
    scaled = padded * (np.float32(1) / np.maximum(largest, np.float32(1e-38)))[:, None]
    values, steps = dynamic_map(), np.float32(_STEPS - 1)
    # bitsandbytes looks codes up in a table of 2^16 steps from -1 to 1. The exact nearest code differs for about one
    # value in thousands.
    table = np.float32(-1) + np.arange(_STEPS, dtype=np.float32) * np.float32(2) / steps
    table = np.searchsorted((values[:-1] + values[1:]) * np.float32(0.5), table, side="left").astype(np.uint8)
    place = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5) * steps + np.float32(0.5)
    codes = np.where(largest[:, None] > 0, table[place.astype(np.uint16)], 0).astype(np.uint8)
    return codes.reshape(-1)[: len(absmax)], largest


def _scaled(flat: mx.array, block: int) -> tuple[mx.array, mx.array]:
    """(values divided by their block's largest magnitude, clipped to [-1, 1]; the magnitudes)."""
    full = flat.size // block * block
    parts, largest = [], []
    if full:
        blocks = flat[:full].reshape(-1, block)
        largest.append(mx.abs(blocks).max(axis=1))
        parts.append((blocks * (1 / mx.maximum(largest[0], 1e-38))[:, None]).reshape(-1))
    if full < flat.size:
        rest = flat[full:]
        largest.append(mx.maximum(mx.abs(rest).max(), 1e-38).reshape(1))
        parts.append(rest / largest[-1])
    return mx.clip(mx.concatenate(parts), -1, 1), mx.concatenate(largest)


def _nearest(scaled: mx.array) -> mx.array:
    """The index of the nearest of ``NF4_VALUES`` for each value, uint8; at a tie the lower one."""
    values = np.array(NF4_VALUES, np.float32)
    code = mx.zeros(scaled.shape, mx.uint8)
    for bound in ((values[:-1] + values[1:]) / np.float32(2)).tolist():
        code = code + (scaled > bound).astype(mx.uint8)
    return code


def dequantize_absmax(nf4: NF4) -> mx.array:
    """The absmax of each block, float32 [blocks]."""
    if nf4.nested is None:
        return nf4.absmax
    largest, values, offset = nf4.nested
    decoded = values[nf4.absmax]
    return decoded * mx.repeat(largest, nf4.nested_block)[: decoded.size] + offset


def nf4_stored(nf4: NF4) -> Stored | None:
    """A matrix as the Metal kernels read it; None if its row or block size is not a multiple of 16."""
    if len(nf4.shape) != 2 or nf4.shape[1] % 16 or nf4.block % 16:
        return None
    nested = None
    if nf4.nested is not None:
        largest, values, offset = nf4.nested
        nested = largest, values, offset.reshape(1)
    return Stored(nf4.codes, nf4.absmax, None, nf4.block, 4, "nf4", nested, nf4.nested_block, nf4.shape[0])


def dequantize_nf4(nf4: NF4, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The dequantized weight in ``nf4.shape``, computed in float32 and rounded to ``dtype``.

    Semantics: ``NF4_VALUES[code] * absmax[position // block]``
    """
    if enabled("nf4_dequantize") and (stored := nf4_stored(nf4)) is not None:
        return nf4_dequantize(stored, dtype).reshape(nf4.shape)
    table = mx.array(NF4_VALUES, mx.float32)
    codes = mx.stack([nf4.codes >> 4, nf4.codes & 15], axis=-1).reshape(-1)[: math.prod(nf4.shape)]
    absmax, full = dequantize_absmax(nf4), codes.size // nf4.block * nf4.block
    out = (table[codes[:full]].reshape(-1, nf4.block) * absmax[: full // nf4.block, None]).reshape(-1)
    if full < codes.size:
        out = mx.concatenate([out, table[codes[full:]] * absmax[-1]])
    return out.reshape(nf4.shape).astype(dtype)


def dynamic_map() -> np.ndarray:
    """The 256 sorted float32 values of the signed dynamic type (arXiv:1511.04561), rounded as in bitsandbytes."""
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        count = 2**exponent + 1
        # torch.linspace(0.1, 1, count) computes from both ends towards the middle and rounds each product and sum once.
        step, inwards = np.float64(np.float32((1 - 0.1) / (count - 1))), np.arange(count)
        low = np.float64(np.float32(0.1)) + step * inwards
        edges = np.where(inwards < count // 2, low, 1 - step * (count - 1 - inwards)).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def bits_per_parameter(double: bool = True, block: int = BLOCK) -> float:
    """4 bits per value plus the scales: 4.5 at block 64, 4.127 with double quantization."""
    return 4 + (8 / block + 32 / (block * NESTED_BLOCK) if double else 32 / block)
