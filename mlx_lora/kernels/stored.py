"""How a base layer stores its weight, as a value: everything that the kernels know about a layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

MODES = ("dense", "affine", "mxfp4", "mxfp8", "nvfp4", "nf4")  # an index here is MODE in metal/weights.metal
_NESTED = ("nested_absmax", "nested_map", "nested_offset")
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
    (affine) ``biases`` [N, K / group_size]. ``nf4``: ``weight`` [N * K / 2] uint8, two codes a byte, the first one
    high, ``scales`` float32, one for each ``group_size`` numbers of the whole matrix, row by row; or uint8 codes of
    them with ``nested``: (scales of ``nested_block`` scales each, values of the codes [256], offset [1]), float32.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "dense"
    nested: tuple[mx.array, mx.array, mx.array] | None = None
    nested_block: int = 256
    rows: int = 0  # N, where the weight is flat (nf4)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.mode == "nf4":
            return self.rows, 2 * self.weight.size // self.rows
        rows, columns = self.weight.shape
        if self.mode != "dense":
            columns = columns * 8 * self.weight.itemsize // self.bits
        return rows, columns

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that are present, by the names the kernels use."""
        named = {"w": self.weight, "scales": self.scales, "biases": self.biases}
        if self.nested is not None:
            named |= dict(zip(_NESTED, self.nested, strict=True))
        return {name: array for name, array in named.items() if array is not None}

    def dequantized(self) -> mx.array:
        """W in float32, differentiable with respect to its float arrays."""
        if self.mode == "dense":
            return self.weight.astype(mx.float32)
        if self.mode == "nf4":
            scales = self.scales
            if self.nested is not None:
                of_scales, values, offset = self.nested
                scales = values[scales] * mx.repeat(of_scales, self.nested_block)[: scales.size] + offset
            codes = mx.stack([self.weight >> 4, self.weight & 15], axis=-1).reshape(self.shape)
            groups = mx.arange(codes.size).reshape(self.shape) // self.group_size
            return mx.array(NF4)[codes] * scales[groups]
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

    @classmethod
    def of(cls, known: dict[str, mx.array], form: Form) -> Stored:
        """Rebuild the value from arrays under the kernels' names and its ``form``."""
        nested = tuple(known[name] for name in _NESTED) if _NESTED[0] in known else None
        sizes = form.group_size, form.bits, form.mode
        return cls(known["w"], known.get("scales"), known.get("biases"), *sizes, nested, form.nested_block, form.rows)

    def form(self) -> Form:
        """Everything but the arrays; hashable."""
        return Form(self.group_size, self.bits, self.mode, self.nested_block, self.rows)


class Form(NamedTuple):
    """How a weight is stored, without the arrays."""

    group_size: int
    bits: int
    mode: str
    nested_block: int
    rows: int

    def defines(self, names: Iterable[str]) -> list[str]:
        """Preprocessor definitions for a kernel that includes weights.metal. names: of the kernel's inputs."""
        nested = [f"NESTED {self.nested_block}"] if _NESTED[0] in names else []
        return [f"MODE {MODES.index(self.mode)}", *nested]

    def arrays(self, known: dict[str, mx.array]) -> dict[str, mx.array]:
        """The arrays ``known`` with NF4 codes viewed as 16-bit words, as the kernels read them."""
        if self.mode != "nf4":
            return known
        return known | {name: known[name].view(mx.uint16) for name in ("w", "w2") if name in known}
