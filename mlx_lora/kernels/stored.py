"""How a base layer stores its weight, as a value of arrays and numbers: what the kernels know of a layer."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

MODES = ("dense", "affine", "mxfp4", "mxfp8", "nvfp4", "nf4")  # the numbers of metal/weights.metal


class Stored(NamedTuple):
    """A weight W [N, K].

    ``dense``: ``weight`` [N, K] itself. MLX's modes: packed ``weight`` [N, K * bits / 32] uint32, ``scales`` and (affine)
    ``biases`` [N, K / group_size]. ``nf4``: ``weight`` [N, K / 2] uint8, two codes a byte, the first one high, ``scales``
    [N, K / 64] float.
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
            return _nf4(self.weight, self.scales)
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
