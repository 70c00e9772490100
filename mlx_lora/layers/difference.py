"""LoRA that starts away from zero over a base that stays as it is: PiSSA, OLoRA and LoRA-GA without touching W.

These start from a pair A0, B0 that is not zero, and their papers subtract it from the base, W - scale B0 A0, so that
the model computes at first what it did. A changed base has to travel with the adapter, or the adapter means nothing.
Here W stays, dense or quantized, and the frozen pair is subtracted beside it:

    y = W x + b + scale (x A) B - scale (x A0) B0

The gradients are the same. What leaves the layer is one plain LoRA adapter of rank 2 r, [A A0] and [B; -B0], over the
untouched base: every format holds it, every loader computes it.
"""

from __future__ import annotations

import mlx.core as mx

from .lora import LoRALinear, LoRASwitchLinear


class _Difference:
    """The frozen pair, and the layer as a value of rank 2 r."""

    rank_axis = (1, 0)  # of lora_a and lora_b

    def start_from(self, a: mx.array, b: mx.array, frozen: tuple[mx.array, mx.array] | None = None) -> None:
        """Start from a pair in the shapes of ``lora_a`` and ``lora_b``, and subtract ``frozen``, or the pair itself.

        Rounded to the layer's dtype first: what is subtracted must be what is added.
        """
        self.lora_a, self.lora_b = a.astype(self._dtype), b.astype(self._dtype)
        # Arrays of their own: compiled functions put tracers into those that are parameters.
        pair = tuple(mx.stop_gradient(array).astype(self._dtype) for array in frozen or (self.lora_a, self.lora_b))
        mx.eval(pair)  # nobody else does: outside the module's dictionary, it is no parameter
        object.__setattr__(self, "frozen_pair", pair)

    def adapter_weights(self) -> dict[str, mx.array]:
        (a, b), (first, second) = self.frozen_pair, self.rank_axis
        return {
            "lora_a": mx.concatenate([self.lora_a, a], axis=first),
            "lora_b": mx.concatenate([self.lora_b, -b], axis=second),
        }

    def split(self, a: mx.array, b: mx.array) -> None:
        """The inverse of ``adapter_weights``: from arrays of rank 2 r."""
        (first, second) = self.rank_axis
        (a, a0), (b, b0) = mx.split(a, 2, axis=first), mx.split(b, 2, axis=second)
        self.start_from(a, b, (a0, -b0))

    @property
    def rank(self) -> int:
        return 2 * self._rank


class DifferenceLinear(_Difference, LoRALinear):
    """``lora_a``: [in, r], ``lora_b``: [r, out], and the frozen pair in the same shapes."""

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.frozen_pair
        # Dropout is of the update alone: the frozen pair stands for a part of W.
        return mx.addmm(super().__call__(x), x @ a, b, alpha=-self.scale)

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = (array.astype(mx.float32) for array in self.frozen_pair)
        return mx.addmm(super().merged_weight(weight), b.T, a.T, alpha=-self.scale)


class DifferenceSwitchLinear(_Difference, LoRASwitchLinear):
    """The same for each expert: ``lora_a`` [experts, r, in], ``lora_b`` [experts, out, r]."""

    rank_axis = (1, 2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        gather = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        a, b = self.frozen_pair
        u = mx.gather_mm(mx.gather_mm(x, a.swapaxes(-1, -2), **gather), b.swapaxes(-1, -2), **gather)
        return super().__call__(x, indices, sorted_indices) - self.scale * u

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = (array.astype(mx.float32) for array in self.frozen_pair)
        return super().merged_weight(weight) - self.scale * (b @ a)
