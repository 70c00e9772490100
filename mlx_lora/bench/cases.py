"""The measured cases: the same work with each kernel, with plain operations, and with mlx-lm's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.nf4_linear import NF4Linear
from ..fast.dora import KeptNorms
from ..fast.stored import stored
from ..fast.swap import is_swapped, swap
from ..kernels import dora_norm, nf4_dequantize
from ..kernels.chunked_sum import chunked_sum
from ..layers import METHODS, MultiLoRALinear, Rows
from ..training.head import piece_rows
from ..training.losses.cross_entropy import token_losses

# A decoding model reads its weights from memory, so there are more copies than a cache can hold.
_BEYOND_CACHE = 256e6  # bytes
_LoRA, _DoRA = METHODS["lora"]["linear"], METHODS["dora"]["linear"]
_SCALE = 2.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured layer, and how it is measured.

    Args:
        hidden, keys, intermediate, vocabulary: widths. rank: of the adapters. bits: of the base, 16 for a dense one.
        rows: tokens at once. dtype: of x. cached: one copy of the weights is enough.
    """

    hidden: int
    keys: int
    intermediate: int
    vocabulary: int
    rank: int
    bits: int
    rows: int
    dtype: mx.Dtype
    cached: bool


class Way(NamedTuple):
    """One way to do the work."""

    calls: list[Callable]  # functions of x, one after the other; a module may return several arrays
    kernels: bool  # whether they may be used
    size: int  # bytes of weights and adapters that one call reads
    inlined: int  # launches to subtract: an export shows a compiled function's operations one by one


class Case(NamedTuple):
    """A part of a model, computed by each available path: "base", "kernels", "plain" and "mlx-lm"."""

    part: str
    x: mx.array
    ways: dict[str, Way]
    of_layer: bool = False  # one of the three that make up a layer's linears and SwiGLU
    counted: bool = True  # its launches can be counted


class Linears(nn.Module):
    """Linears that read the same input, as in attention or an MLP."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        dict.update(self, layers)

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [layer(x) for layer in self.values()]


def cases(sizes: Sizes) -> Iterator[Case]:
    """The cases one after the other, so that the weights of one are freed before the next."""
    hidden, keys, intermediate = sizes.hidden, sizes.keys, sizes.intermediate
    yield _linears(sizes, "q, k, v", hidden, {"q_proj": hidden, "k_proj": keys, "v_proj": keys}, of_layer=True)
    yield _linears(sizes, "o", hidden, {"o_proj": hidden}, of_layer=True)
    yield _mlp(sizes)
    yield _linears(sizes, "gate, up", hidden, {"gate_proj": intermediate, "up_proj": intermediate})
    yield _linears(sizes, "down", intermediate, {"down_proj": hidden})
    yield _one(sizes, "q, DoRA", lambda base: _DoRA(base, sizes.rank, _SCALE), _theirs_dora(sizes))
    yield _one(sizes, "q, 4 adapters", lambda base: _multi(base, sizes))
    yield _one(sizes, "q, NF4", lambda base: _LoRA(base, sizes.rank, _SCALE), nf4=True)
    yield _norms(sizes)
    yield _dequantize(sizes)
    yield _cross_entropy(sizes)


def _x(sizes: Sizes, width: int) -> mx.array:
    return mx.random.normal((1, sizes.rows, width)).astype(sizes.dtype)


def _linear(sizes: Sizes, inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.set_dtype(sizes.dtype)
    layer = layer.to_quantized(64, sizes.bits) if sizes.bits < 16 else layer
    mx.eval(layer.parameters())
    return layer


def _copies(sizes: Sizes, numbers: int) -> range:
    size = numbers * min(sizes.bits, 8 * sizes.dtype.size) / 8
    return range(1 if sizes.cached else min(64, math.ceil(_BEYOND_CACHE / size)))


def _bytes(call: Callable) -> int:
    return sum(a.nbytes for _, a in tree_flatten(call.parameters())) if isinstance(call, nn.Module) else 0


def _way(calls: list[Callable], kernels: bool = False, size: int | None = None, inlined: int = 0) -> Way:
    for module in (call for call in calls if isinstance(call, nn.Module)):
        mx.eval(module.eval().parameters())
    return Way(calls, kernels, _bytes(calls[0]) if size is None else size, inlined)


def _compared(make: Callable, base: list, ours: Callable, theirs: Callable | None = None, inlined: int = 0) -> dict:
    """The ways of modules made from base layers. make: {name: layer} -> module. base: a dict of layers for each copy.

    ours, theirs: base layer -> adapted layer.
    """

    def adapted(adapt: Callable) -> list[nn.Module]:
        return [make({name: adapt(layer) for name, layer in layers.items()}) for layers in base]

    ways = {
        "base": _way([make(layers) for layers in base], inlined=inlined),
        "kernels": _way(adapted(ours), True),
        "plain": _way([_with_norms_kept(module) for module in adapted(ours)], inlined=inlined),
    }
    return ways | ({"mlx-lm": _way(adapted(theirs), inlined=inlined)} if theirs else {})


def _with_norms_kept(module: nn.Module) -> nn.Module:
    """DoRA's norms are kept between calls on every device, kernels or not."""
    for layer in module.modules():
        if isinstance(layer, _DoRA):
            if not is_swapped(layer):
                swap(layer, KeptNorms)
            layer.eval().gain()
    return module


def _theirs(sizes: Sizes) -> Callable:
    from mlx_lm.tuner.lora import LoRALinear

    return lambda base: LoRALinear.from_base(base, sizes.rank, scale=_SCALE)


def _linears(sizes: Sizes, part: str, inputs: int, outputs: dict[str, int], of_layer: bool = False) -> Case:
    base = [
        {name: _linear(sizes, inputs, n) for name, n in outputs.items()}
        for _ in _copies(sizes, inputs * sum(outputs.values()))
    ]
    ways = _compared(Linears, base, lambda layer: _LoRA(layer, sizes.rank, _SCALE), _theirs(sizes))
    return Case(part, _x(sizes, inputs), ways, of_layer)


def _mlp(sizes: Sizes) -> Case:
    """All of an MLP: gate, up and SwiGLU are one launch of the kernels."""
    from mlx_lm.models.llama import MLP, ModelArgs

    tiny = dict(model_type="llama", num_hidden_layers=1, num_attention_heads=1, rms_norm_eps=1e-5, vocab_size=1)
    args = ModelArgs.from_dict({**tiny, "hidden_size": 1, "intermediate_size": 1})

    def make(layers: dict[str, nn.Module]) -> nn.Module:
        made = MLP(args)
        made.update_modules(layers)
        return made

    shapes = {"gate_proj": (sizes.hidden, sizes.intermediate), "up_proj": (sizes.hidden, sizes.intermediate)}
    shapes["down_proj"] = (sizes.intermediate, sizes.hidden)
    base = [
        {name: _linear(sizes, *shape) for name, shape in shapes.items()}
        for _ in _copies(sizes, 3 * sizes.hidden * sizes.intermediate)
    ]
    ways = _compared(make, base, lambda layer: _LoRA(layer, sizes.rank, _SCALE), _theirs(sizes), inlined=2)
    return Case("MLP", _x(sizes, sizes.hidden), ways, of_layer=True)


def _one(sizes: Sizes, part: str, ours: Callable, theirs: Callable | None = None, nf4: bool = False) -> Case:
    """A projection of hidden to hidden."""
    base = []
    for _ in _copies(sizes, sizes.hidden**2):
        if nf4:
            layer = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
            layer.set_dtype(sizes.dtype)
            base.append({"q_proj": NF4Linear.from_linear(layer)})
        else:
            base.append({"q_proj": _linear(sizes, sizes.hidden, sizes.hidden)})
    ways = _compared(Linears, base, ours, theirs)
    if nf4:  # MLX has no NF4 product, so the base without adapter also needs a kernel
        ways["base"] = ways["base"]._replace(kernels=True)
    return Case(part, _x(sizes, sizes.hidden), ways)


def _theirs_dora(sizes: Sizes) -> Callable | None:
    if sizes.bits not in (2, 4, 8, 16):  # mlx-lm's DoRA reads no others
        return None

    from mlx_lm.tuner.dora import DoRALinear

    return lambda base: DoRALinear.from_base(base, sizes.rank, scale=_SCALE)


def _multi(base: nn.Module, sizes: Sizes, count: int = 4) -> nn.Module:
    """``count`` adapters with different ranks, another one for each row."""
    ranks = mx.array([max(1, sizes.rank >> i) for i in range(count)], mx.int32)
    a = mx.random.normal((count, sizes.hidden, sizes.rank)).astype(sizes.dtype)
    b = mx.random.normal((count, sizes.rank, sizes.hidden)).astype(sizes.dtype)
    rows = Rows()
    layer = MultiLoRALinear(base, a, b, mx.full((count,), _SCALE), ranks, rows)
    index = mx.arange(sizes.rows, dtype=mx.int32) % count
    rows.only = None
    rows.of = lambda x: index  # one adapter per row, though all rows belong to one sequence
    mx.eval(index)
    return layer


def _norms(sizes: Sizes) -> Case:
    """DoRA's norms of W + scale * B A, once per training step; mlx-lm materialises the sum."""
    from mlx_lm.tuner.dora import DoRALinear

    base = _linear(sizes, sizes.hidden, sizes.hidden)
    layer = _DoRA(base, sizes.rank, _SCALE)
    weight = stored(base)
    mx.eval(layer.parameters())

    def kernel(x: mx.array) -> mx.array:
        return dora_norm(weight, layer.lora_a, layer.lora_b, _SCALE)

    def plain(x: mx.array) -> mx.array:
        return _with_norms_kept(layer).norms_squared()

    def theirs(x: mx.array) -> mx.array:
        whole = DoRALinear._dequantized_weight(them) + (_SCALE * them.lora_b.T) @ them.lora_a.T
        return mx.linalg.norm(whole, axis=1)

    ways = {"kernels": _way([kernel], True, _bytes(layer)), "plain": _way([plain], size=_bytes(layer))}
    if make := _theirs_dora(sizes):
        them = make(base)
        mx.eval(them.parameters())
        ways["mlx-lm"] = _way([theirs], size=_bytes(them))
    return Case("norms, DoRA", _x(sizes, 1), ways)


def _dequantize(sizes: Sizes) -> Case:
    linear = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
    layer = NF4Linear.from_linear(linear)
    weight = stored(layer)
    size = _bytes(layer) + sizes.hidden**2 * sizes.dtype.size

    def kernel(x: mx.array) -> mx.array:
        return nf4_dequantize(weight, sizes.dtype)

    def plain(x: mx.array) -> mx.array:
        return layer.unpacked(sizes.dtype)

    ways = {"kernels": _way([kernel], True, size), "plain": _way([plain], size=size)}
    return Case("dequantize, NF4", _x(sizes, 1), ways)


def _cross_entropy(sizes: Sizes, tokens: int = 1024) -> Case:
    """The loss of the output head and its gradient: in chunks of tokens, all at once, and as mlx-lm computes it."""
    if sizes.cached:
        tokens = 128
    head = _linear(sizes, sizes.hidden, sizes.vocabulary)
    targets = mx.random.randint(0, sizes.vocabulary, (tokens,))
    rows = min(piece_rows(sizes.vocabulary), tokens // 2)

    def losses(parameters: dict, hidden: mx.array, targets: mx.array) -> mx.array:
        return token_losses(head(hidden), targets)

    def chunked(hidden: mx.array) -> mx.array:
        return chunked_sum(losses, {}, hidden, targets, mx.ones(targets.shape, mx.bool_), rows, True)

    def whole(hidden: mx.array) -> mx.array:
        return losses({}, hidden, targets).sum()

    def theirs(hidden: mx.array) -> mx.array:
        return nn.losses.cross_entropy(head(hidden), targets).astype(mx.float32).sum()

    x = mx.random.normal((tokens, sizes.hidden)).astype(sizes.dtype)
    ways = {"kernels": chunked, "plain": whole, "mlx-lm": theirs}
    return Case(
        "head and loss",
        x,
        {name: _way([mx.grad(f)], name == "kernels", _bytes(head)) for name, f in ways.items()},
        counted=False,
    )
