"""How a base layer stores its weight, as a value of arrays and numbers: what the kernels know of a layer."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

MODES = ("dense", "affine", "mxfp4", "mxfp8", "nvfp4", "nf4")  # the numbers of metal/weights.metal
# QLoRA's code (arXiv:2305.14314): quantiles of a normal distribution, scaled to [-1, 1].
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Stored(NamedTuple):
    """A weight W [N, K].

    ``dense``: ``weight`` [N, K] itself. MLX's modes: packed ``weight`` [N, K * bits / 32] uint32, ``scales`` and
    (affine) ``biases`` [N, K / group_size]. ``nf4``: ``weight`` [N, K / 2] uint8, two codes a byte, the first one high,
    ``scales`` [N, K / group_size] float32.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.weight.shape
        if self.mode != "dense":
            columns = columns * 8 * self.weight.itemsize // self.bits
        return rows, columns

    def arrays(self) -> dict[str, mx.array]:
        """The arrays there are, by the names the kernels know."""
        named = {"w": self.weight, "scales": self.scales, "biases": self.biases}
        return {name: array for name, array in named.items() if array is not None}

    def dequantized(self) -> mx.array:
        """W in float32, differentiable in whatever of it is float."""
        if self.mode == "dense":
            return self.weight.astype(mx.float32)
        if self.mode == "nf4":
            codes = mx.stack([self.weight >> 4, self.weight & 15], axis=-1).reshape(self.shape[0], -1, self.group_size)
            return (mx.array(NF4)[codes] * self.scales.astype(mx.float32)[..., None]).reshape(self.shape)
        scales, biases = self.scales, self.biases
        if biases is not None:  # widened first: mx.dequantize rounds to the dtype of the scales
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            self.weight,
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )
