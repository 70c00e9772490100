"""DoRA: a learned magnitude times the direction of the adapted weight (arXiv:2402.09353).

W' = m * (W + scale * BA) / ||W + scale * BA||, the norm taken over each output row and held constant in the backward
pass (section 4.3 of the paper). Its square is ||W||^2 + 2 scale <W, BA> + scale^2 ||BA||^2, so that W + scale * BA is
never materialised: ||W||^2 is computed once, <W, BA> takes one product of W with the r columns of A, through the
quantized base where it is quantized. Outside training the whole factor m / norm is kept until a parameter changes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..config import LEAVES
from ..kernels import dora_norm, enabled
from ..kernels.dora_norm import MAX_RANK
from .base import dense_weight, is_quantized, project
from .lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from .siblings import add_update, fused, product, stored

_ROWS = 1 << 24  # elements of W dequantized at once for ||W||^2: 64 MB of float32


def row_norms_squared(base: nn.Module) -> mx.array:
    """||W||^2 of every row in float32: [rows], or [experts, rows]. Evaluated piece by piece to stay small."""
    if enabled() and (known := stored(base)) is not None:
        return dora_norm(known)
    if hasattr(base, "unpacked"):
        return dense_weight(base).square().sum(axis=-1)
    names = [name for name in ("weight", "scales", "biases", "global_scale") if base.get(name) is not None]
    step = max(1, _ROWS // (base.weight[0].size * (32 // base.bits if is_quantized(base) else 1)))
    parts = []
    for start in range(0, base.weight.shape[0], step):
        piece = _Slice(base, {name: base[name][start : start + step] for name in names})
        parts.append(dense_weight(piece).square().sum(axis=-1))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


class _Slice(dict):
    """Some rows of a base layer, with what ``dense_weight`` asks of one."""

    def __init__(self, base: nn.Module, arrays: dict[str, mx.array]):
        super().__init__(arrays)
        for name in ("bits", "group_size", "mode"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))

    def __getattr__(self, name: str) -> mx.array:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Magnitude:
    """The part of DoRA that is the same for every kind of base: m, ||W||^2 and the factor m / norm."""

    method = "dora"
    leaves = LEAVES["dora"]

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dtype=mx.float32):
        super().__init__(base, rank, scale, dropout, dtype)
        squared = row_norms_squared(base)
        # Kept out of the module's dictionary: neither is a parameter. With the weight that the norms are of.
        object.__setattr__(self, "_squared", (base.weight, squared))
        object.__setattr__(self, "_kept", None)
        # float32 whatever the model's dtype, so that m / norm is exactly 1 at the start.
        self.m = mx.sqrt(squared)

    def inner_products(self) -> tuple[mx.array, mx.array]:
        """<W, BA> and ||BA||^2 of every row, float32, without the scale."""
        raise NotImplementedError

    def base_norms_squared(self) -> mx.array:
        """||W||^2 of every row, float32; anew where the base was given another weight."""
        weight, squared = self._squared
        if weight is self.base.weight:
            return squared
        try:
            mx.eval(self.base.weight)
        except ValueError:  # an argument of a function being traced
            if "weight" in self.base.trainable_parameters():
                return dense_weight(self.base).square().sum(axis=-1)
            return squared  # it stands for the weight that was there
        object.__setattr__(self, "_squared", (self.base.weight, row_norms_squared(self.base)))
        return self._squared[1]

    def norms_squared(self) -> mx.array:
        """||W + scale * BA||^2 of every row, float32."""
        cross, update = self.inner_products()
        return self.base_norms_squared() + 2 * self.scale * cross + self.scale**2 * update

    def gain(self) -> mx.array:
        """m / ||W + scale * BA||, float32, the norm without gradient. Shape of ``m``."""
        parameters = (self.lora_a, self.lora_b, self.m, self.scale, self.base.weight)
        if not self.training and self._kept is not None:
            *known, gain = self._kept
            if all(a is b for a, b in zip(parameters, known, strict=True)):
                return gain
        squared = self.norms_squared()
        # Rounding must not take the norm of a nearly cancelled row below zero; a padded vocabulary has zero rows.
        norm = mx.stop_gradient(mx.sqrt(mx.maximum(squared, 0)))
        gain = mx.where(norm > 0, self.m / mx.where(norm > 0, norm, 1), 1)
        if not self.training:
            object.__setattr__(self, "_kept", (*parameters, gain))
        return gain


class DoRALinear(_Magnitude, LoRALinear):
    """y = gain * (W x + scale * (x A) B) + b, ``m``: [out], ``gain = m / ||W + scale * BA||``.

    Dropout as in PEFT: with x~ the input after dropout, y = W x + (gain - 1) * W x~ + gain * scale * (x~ A) B + b.
    """

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        cross = (project(self.linear, a.T) * b).sum(axis=0)
        return cross, (((a.T @ a) @ b) * b).sum(axis=0)

    def norms_squared(self) -> mx.array:
        base = stored(self.linear) if enabled() and self.rank <= MAX_RANK else None
        if base is None:
            return super().norms_squared()
        return dora_norm(base, self.lora_a, self.lora_b, self.scale)

    def __call__(self, x: mx.array) -> mx.array:
        if (y := fused(self, x, self.gain)) is not None:
            return y
        gain = self.gain().astype(x.dtype)
        y, dropped = project(self.linear, x), self.dropout(x)
        low = product(self, x, dropped)
        if dropped is x:
            y = gain * add_update(self, y, low)
        else:
            update = add_update(self, project(self.linear, dropped), low)
            y = y - project(self.linear, dropped) + gain * update
        return y + self.linear.bias if "bias" in self.linear else y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[:, None] * super().merged_weight(weight)


class DoRAEmbedding(_Magnitude, LoRAEmbedding):
    """y = gain[x] * (W[x] + scale * A[x] B), ``m``: [vocabulary], one magnitude a token, as in mlx-lm.

    PEFT keeps one magnitude a dimension instead, over the whole vocabulary: the two cannot be converted.
    """

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        cross = (project(self.embedding, b).T * a).sum(axis=1)
        return cross, ((a @ (b @ b.T)) * a).sum(axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        return self.gain()[x][..., None].astype(y.dtype) * y

    def as_linear(self, x: mx.array) -> mx.array:
        y = super().as_linear(x)
        return self.gain().astype(y.dtype) * y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[:, None] * super().merged_weight(weight)


class DoRASwitchLinear(_Magnitude, LoRASwitchLinear):
    """DoRA of each expert's matrix; ``m``: [experts, out]. Dropout as in ``DoRALinear``."""

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        product = self._project(a, mx.arange(self.linear.num_experts))  # [experts, r, out]
        cross = (product.swapaxes(-1, -2) * b).sum(axis=-1)
        return cross, ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)

    def _project(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y - mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else y

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        gain = mx.expand_dims(self.gain()[indices], -2).astype(x.dtype)
        y, dropped = self._project(x, indices, sorted_indices), self.dropout(x)
        base = y if dropped is x else self._project(dropped, indices, sorted_indices)
        update = gain * (base + self.scale * self.low_rank(dropped, indices, sorted_indices))
        y = update if dropped is x else y - base + update
        return y + mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[..., None] * super().merged_weight(weight)
