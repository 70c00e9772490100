"""LoRA with a non-zero initial update over an unchanged base: PiSSA, OLoRA and LoRA-GA.

These initialisations start from a pair A0, B0 that is not zero, and their papers subtract it from the base, W - scale
B0 A0, so that the model first computes the same as before. A changed base would have to be distributed with the
adapter. Here W is unchanged, dense or quantized, and the frozen pair is subtracted in the forward pass:

    y = W x + b + scale (x A) B - scale (x A0) B0

The gradients are the same. The layer is saved as one plain LoRA adapter of rank 2 r, [A A0] and [B; -B0], over the
unchanged base, which every format can store and every loader can compute.
"""

from __future__ import annotations

import mlx.core as mx

from .lora import LoRALinear, LoRASwitchLinear


class _Difference:
    """The frozen pair ``frozen_a`` and ``frozen_b``, and the layer as a plain adapter of rank 2 r."""

    rank_axis = (1, 0)  # of lora_a and lora_b

    def start_from(self, a: mx.array, b: mx.array, frozen: tuple[mx.array, mx.array] | None = None) -> None:
        """Start from a pair in the shapes of ``lora_a`` and ``lora_b``, and subtract ``frozen``, or the pair itself.

        The pair is first rounded to the layer's dtype, so that the subtracted and the added pair are equal.
        """
        dtype = self.lora_a.dtype
        self.lora_a, self.lora_b = a.astype(dtype), b.astype(dtype)
        self.frozen_a, self.frozen_b = (mx.array(array.astype(dtype)) for array in frozen or (self.lora_a, self.lora_b))
        self.freeze(recurse=False, keys=["frozen_a", "frozen_b"])

    def unfreeze(self, *args, **kwargs):
        super().unfreeze(*args, **kwargs)
        return self.freeze(recurse=False, keys=["frozen_a", "frozen_b"])  # as MLX's quantized layers do

    def adapter_weights(self) -> dict[str, mx.array]:
        first, second = self.rank_axis
        return {
            "lora_a": mx.concatenate([self.lora_a, self.frozen_a], axis=first),
            "lora_b": mx.concatenate([self.lora_b, -self.frozen_b], axis=second),
        }

    def split(self, a: mx.array, b: mx.array) -> None:
        """The inverse of ``adapter_weights``: start from arrays of rank 2 r."""
        first, second = self.rank_axis
        (a, a0), (b, b0) = mx.split(a, 2, axis=first), mx.split(b, 2, axis=second)
        self.start_from(a, b, (a0, -b0))

    @property
    def rank(self) -> int:
        return 2 * self._rank


class DifferenceLinear(_Difference, LoRALinear):
    """``lora_a``: [in, r], ``lora_b``: [r, out], and the frozen pair in the same shapes."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        # Dropout applies only to the update: the frozen pair stands for a part of W.
        return mx.addmm(super().__call__(x), x @ self.frozen_a, self.frozen_b, alpha=-self.scale)

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.frozen_a.astype(mx.float32), self.frozen_b.astype(mx.float32)
        return mx.addmm(super().merged_weight(weight), b.T, a.T, alpha=-self.scale)


class DifferenceSwitchLinear(_Difference, LoRASwitchLinear):
    """The same for each expert: ``lora_a`` [experts, r, in], ``lora_b`` [experts, out, r]."""

    rank_axis = (1, 2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: [..., 1, in], indices: [..., k] -> [..., k, 1, out]; or mlx-lm's sorted form."""
        gather = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        u = mx.gather_mm(x, self.frozen_a.swapaxes(-1, -2), **gather)
        frozen = mx.gather_mm(u, self.frozen_b.swapaxes(-1, -2), **gather)
        return super().__call__(x, indices, sorted_indices) - self.scale * frozen

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.frozen_a.astype(mx.float32), self.frozen_b.astype(mx.float32)
        return super().merged_weight(weight) - self.scale * (b @ a)
