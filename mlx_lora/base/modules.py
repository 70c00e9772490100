"""Properties of a base layer of any kind and storage: kind, sizes, dtype, dense weight, product.

There are three kinds: ``linear``, ``embedding`` (anything with ``as_linear``) and ``switch`` (one matrix per expert, in
mixtures of experts). They are recognised by their attributes, so nothing here imports mlx-lm. Each may be dense or
quantized in any of MLX's modes. Linears with another storage (NF4) define ``unpacked_shape`` and ``unpacked``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError

T = TypeVar("T")
_PIECE = 1 << 24  # values of a weight dequantized at once: 64 MB of float32


def kind(module: nn.Module) -> str | None:
    """``"linear"``, ``"embedding"``, ``"switch"``, or None for a module that cannot be adapted."""
    weight = module.get("weight")
    # QQLinear quantizes its input, too. A class with ``to_lora`` is not a plain nn.Linear.
    if not isinstance(weight, mx.array) or isinstance(module, nn.QQLinear) or hasattr(module, "to_lora"):
        return None
    if hasattr(module, "unpacked_shape"):
        return "linear"
    if weight.ndim == 3 and hasattr(module, "num_experts"):
        return "switch"
    if weight.ndim != 2 or (is_quantized(module) and weight.dtype != mx.uint32):
        return None
    if hasattr(module, "as_linear"):
        return "embedding"
    return "linear" if isinstance(module, (nn.Linear, nn.QuantizedLinear)) else None


def is_quantized(base: nn.Module) -> bool:
    """True if the weight is packed: MLX's quantized layers (``weight`` and ``scales``) and NF4."""
    return ("scales" in base and hasattr(base, "bits")) or hasattr(base, "unpacked_shape")


def dims(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear or switch layer; (vocabulary, dim) of an embedding."""
    rows, columns = getattr(base, "unpacked_shape", base.weight.shape)[-2:]
    if "scales" in base:
        columns = base.scales.shape[-1] * base.group_size
    return (rows, columns) if kind(base) == "embedding" else (columns, rows)


def base_dtype(base: nn.Module) -> mx.Dtype | None:
    """The float dtype the layer computes in; None if its storage does not determine one (mxfp4, mxfp8, nvfp4)."""
    stored = base.get("scales", base.weight).dtype
    return stored if mx.issubdtype(stored, mx.floating) else None


def dense_weight(base: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The layer's weight, dequantized if needed: [..., rows, columns] in ``dtype``."""
    if not is_quantized(base):
        return base.weight.astype(dtype)
    if hasattr(base, "unpacked"):
        return base.unpacked(dtype)

    def dequantize(weight, scales, biases, global_scale=None):
        # Cast first: mx.dequantize rounds its products to the dtype of the scales.
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(
            weight,
            scales,
            biases,
            group_size=base.group_size,
            bits=base.bits,
            mode=base.mode,
            global_scale=global_scale,
            dtype=mx.float32,
        ).astype(dtype)

    if base.get("global_scale") is not None:  # nvfp4 experts, one global scale each
        experts = zip(base.weight, base.scales, base.global_scale, strict=True)
        return mx.stack([dequantize(weight, scales, None, scale) for weight, scales, scale in experts])
    return dequantize(base.weight, base.scales, base.get("biases"))


def some_rows(base: nn.Module, start: int, stop: int) -> mx.array:
    """Rows ``start`` to ``stop`` of the weight in float32 (of the first expert): [stop - start, columns]."""
    if hasattr(base, "unpacked"):
        return dense_weight(base)[start:stop]
    arrays = {name: base[name] for name in ("weight", "scales", "biases", "global_scale") if base.get(name) is not None}
    if kind(base) == "switch":
        arrays = {name: array[:1] for name, array in arrays.items()}
        return dense_weight(_Rows(base, {n: a[:, start:stop] if a.ndim == 3 else a for n, a in arrays.items()}))[0]
    return dense_weight(_Rows(base, {n: a[start:stop] if a.ndim == 2 else a for n, a in arrays.items()}))


def project(base: nn.Module, x: mx.array) -> mx.array:
    """``x W^T`` without the bias, for linears and embeddings. x: [..., columns] -> [..., rows]."""
    if hasattr(base, "project"):  # the layer defines its own product: NF4, or a class from fast/
        return base.project(x)
    if kind(base) == "embedding":
        return base.as_linear(x)
    if not is_quantized(base):
        return x @ base.weight.T
    return mx.quantized_matmul(
        x,
        base.weight,
        scales=base.scales,
        biases=base.get("biases"),
        transpose=True,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


def squared_row_norms(base: nn.Module) -> mx.array:
    """||W||^2 of every row in float32: [rows], or [experts, rows]."""
    if hasattr(base, "unpacked"):
        return dense_weight(base).square().sum(axis=-1)
    # In pieces, so that the whole weight is never dequantized at once.
    names = [name for name in ("weight", "scales", "biases", "global_scale") if base.get(name) is not None]
    step = max(1, _PIECE // (base.weight[0].size * (32 // base.bits if is_quantized(base) else 1)))
    pieces: list[mx.array] = []
    for start in range(0, base.weight.shape[0], step):
        arrays = {name: base[name][start : start + step] for name in names}
        if pieces:  # wait for the previous piece, whose floats are then freed
            arrays["weight"] = mx.depends([arrays["weight"]], [pieces[-1]])[0]
        pieces.append(dense_weight(_Rows(base, arrays)).square().sum(axis=-1))
    return mx.concatenate(pieces)


class _Rows(dict):
    """Some rows of a base layer, with the attributes that ``dense_weight`` reads."""

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


def model_dtype(model: nn.Module) -> mx.Dtype:
    """The most common dtype of the model's float parameters, counted in values."""
    count: Counter = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            count[array.dtype] += array.size
    return count.most_common(1)[0][0] if count else mx.float32


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the transformer layers, first to last."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ModelError(
            f"{type(model).__name__} has no list of layers",
            "Give a language model loaded by mlx_lora.load or mlx-lm.",
        )
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers if id(layer) in names]


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of ``model`` has an adapter, or an embedding has trained rows."""
    return any(hasattr(module, "merged_weight") for module in model.modules())


def unique(items: Iterable[T]) -> list[T]:
    """``items`` without repetitions of the same object, such as an array or module that several modules share."""
    return list({id(item): item for item in items}.values())


def total_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters; an array that several modules share counts once."""
    return sum(array.nbytes for array in unique(array for _, array in tree_flatten(model.parameters())))


Frozen = list[tuple[nn.Module, set[str]]]


def frozen_parameters(model: nn.Module) -> Frozen:
    """The names of the parameters that each module has frozen, for ``restore_frozen``."""
    return [(module, set(module._no_grad)) for module in model.modules()]


def restore_frozen(frozen: Frozen) -> None:
    """Freeze and unfreeze parameters as they were when ``frozen_parameters`` was called."""
    for module, names in frozen:
        module._no_grad.clear()  # in place: setting an attribute drops the data that fast/ keeps with a module
        module._no_grad.update(names)
