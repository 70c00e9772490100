"""Decode kernels: one launch for x A, and one for the layer with its update.

Storage, launch settings and scale are determined at the first call and kept until one of the layer's attributes is set.
In training, with more than ``MAX_ROWS`` rows, or in another dtype the layer computes by its formula. There is no
backward pass: MLX refuses to differentiate a kernel.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import dims
from ..kernels import MAX_RANK, MAX_ROWS, base_qmv
from ..kernels.lora_qmv import qmv_launch
from ..kernels.lora_shrink import shrink_launch, splits
from ..kernels.registry import Launch, maker
from ..layers import MultiLoRALinear
from ..layers.dora import DoRALinear
from ..layers.lora import LoRALinear
from .dora import KeptNorms
from .stored import computes_in, reader, stored
from .swap import GROUP, Changes, keep, kept, plain_class


def obstacle(layer: nn.Module) -> str | None:
    """Why the kernels cannot decode this adapter layer; None if they can."""
    kind = plain_class(layer)
    if kind not in MIXINS:
        return f"{kind.__name__} has no kernel"
    base = stored(layer.base)
    if base is None:
        return f"the kernels do not know {plain_class(layer.base).__name__}, or its shape"
    if layer.rank > MAX_RANK:
        return f"rank {layer.rank} is above {MAX_RANK}"
    dtypes = {layer.lora_a.dtype, layer.lora_b.dtype, computes_in(base) or layer.lora_a.dtype}
    bias = layer.base.get("bias")
    if len(dtypes | ({bias.dtype} if bias is not None else set())) > 1:
        return "the adapter and its base have different dtypes"
    return None


class Decoder:
    """The launch settings of a layer, determined once.

    Args:
        scale: float32 [1], or [adapters].
        more: names of further inputs of ``lora_qmv``.
    """

    def __init__(self, layer: nn.Module, scale: mx.array, *more: str):
        base = stored(layer.base)
        self.dtype = layer.lora_a.dtype
        self.inputs, self.outputs = dims(layer.base)
        self.most = MAX_ROWS * self.inputs  # numbers in x
        self.rank, self.form, self.base = layer.rank, base.form(), reader(layer.base, base)
        self.bias, self._splits = "bias" in layer.base, splits(self.inputs)
        self.names = ("x", *base.arrays(), "u", "b", "scale", "offset", *(("bias",) if self.bias else ()), *more)
        self.scale = scale
        self._shrink: dict[tuple[int, ...], Launch] = {}
        self._qmv: dict[int, Launch] = {}

    def shrink(self, x: mx.array, a: list[mx.array], *index: mx.array) -> mx.array:
        """The product of x [..., in] with matrices [in, rank] that read it: u [splits, rows, sum of ranks]."""
        rows, widths = x.size // self.inputs, [m.shape[-1] for m in a]
        launch = self._shrink.get((rows, *widths))
        if launch is None:
            launch = shrink_launch(maker(), tuple(widths), bool(index), self.dtype, rows, self.inputs)
            self._shrink[(rows, *widths)] = launch
        return launch([x, *a, *index], (self._splits, rows, sum(widths)))

    def __call__(self, layer: nn.Module, x: mx.array, *index: mx.array, gain: mx.array | None = None) -> mx.array:
        """x: [..., in] -> [..., out]. index: of multi-LoRA, (adapter of each row, ranks). gain: DoRA's, [out]."""
        rows, group = x.size // self.inputs, layer.__dict__.get(GROUP)
        if group is not None and group[0].running and group[0].layers[group[1]] is layer:
            u, offset = group[0].part(group[1], x, index)
        else:
            u, offset = self.shrink(x, [layer["lora_a"]], *index), _ZERO
        launch = self._qmv.get(rows)
        if launch is None:
            sizes = rows, self.inputs, self.rank, self.outputs
            launch = self._qmv[rows] = qmv_launch(maker(), self.names, self.form, self.dtype, sizes, self._splits)
        inputs = [x, *self.base(), u, layer["lora_b"], self.scale, offset]
        if self.bias:
            inputs.append(layer.base["bias"])
        if gain is not None:
            inputs.append(gain)
        inputs += index
        return launch(inputs, (*x.shape[:-1], self.outputs))


_ZERO = mx.array([0], mx.int32)


class Decodes(Changes):
    """Mixin for adapter layers."""

    indexed = False

    def decoder(self) -> Decoder:
        return kept(self, "decoder") or keep(self, "decoder", self._decoder())

    def _decoder(self) -> Decoder:
        return Decoder(self, mx.array([self.scale], mx.float32))


class DecodesLoRA(Decodes):
    def __call__(self, x: mx.array) -> mx.array:
        if self._training:
            return trained(self, x, self.dropout(x) @ self.lora_a)
        decoder = kept(self, "decoder") or self.decoder()
        if not 0 < x.size <= decoder.most or x.dtype != decoder.dtype:
            return super().__call__(x)
        return decoder(self, x)


def trained(layer: LoRALinear, x: mx.array, low: mx.array) -> mx.array:
    """LoRA's formula, given x A: scaled before B, since autograd of a scaled ``addmm`` scales the whole gradient."""
    return mx.addmm(layer.linear(x), layer.scale * low, layer.lora_b)


class DecodesDoRA(Decodes, KeptNorms):
    def _decoder(self) -> Decoder:
        return Decoder(self, mx.array([self.scale], mx.float32), "gain")

    def __call__(self, x: mx.array) -> mx.array:
        decoder = kept(self, "decoder") or self.decoder()
        if self._training or not 0 < x.size <= decoder.most or x.dtype != decoder.dtype:
            return super().__call__(x)
        return decoder(self, x, gain=self.gain())


class DecodesMultiLoRA(Decodes):
    indexed = True

    def _decoder(self) -> Decoder:
        return Decoder(self, self._scale, "idx", "ranks")

    def __call__(self, x: mx.array) -> mx.array:
        decoder = kept(self, "decoder") or self.decoder()
        if self._training or not 0 < x.size <= decoder.most or x.dtype != decoder.dtype:
            return super().__call__(x)
        return decoder(self, x, self._rows.of(x), self._ranks)


class DecodesNF4(Changes):
    """Mixin for an NF4 layer without adapter."""

    def project(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if self._training or not 1 <= rows <= MAX_ROWS or (known := stored(self)) is None:
            return super().project(x)
        return base_qmv(x.reshape(rows, -1), known).reshape(*x.shape[:-1], -1)


MIXINS = {LoRALinear: DecodesLoRA, DoRALinear: DecodesDoRA, MultiLoRALinear: DecodesMultiLoRA}
