"""What is measured: for each kernel the same work by the kernel, by plain operations, and as mlx-lm does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.nf4_linear import NF4Linear
from ..fast.mlp import fuse_mlps
from ..fast.shared_input import introduce, stored
from ..kernels import dora_norm, nf4_dequantize
from ..kernels.chunked_sum import chunked_sum
from ..layers import METHODS, MultiLoRALinear, Rows
from ..training.head import piece_rows
from ..training.losses.cross_entropy import token_losses

# Weights are read from memory in a decoding model: enough copies that no cache holds them.
_BEYOND_CACHE = 256e6  # bytes
_LoRA, _DoRA = METHODS["lora"]["linear"], METHODS["dora"]["linear"]
_SCALE = 2.0


@dataclass(frozen=True)
class Sizes:
    """Of the layer measured, and how.

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


class Path(NamedTuple):
    """One way to do the work."""

    calls: list[list[Callable]]  # groups of functions of x, one after the other; a group's do not wait for each other
    kernels: bool  # whether they may be used
    size: int  # bytes of weights and adapters in a group
    inlined: int  # launches too many in an export, which shows what a compiled function consists of


class Case(NamedTuple):
    """A part of a model, by name, on every path: "base", "kernels", "plain" and "mlx-lm", those that there are."""

    part: str
    x: mx.array
    paths: dict[str, Path]
    of_layer: bool = False  # one of the groups that make up a layer's linears
    counted: bool = True  # its launches can be


def cases(sizes: Sizes) -> Iterator[Case]:
    """One after the other, so that the weights of one are gone before the next."""
    hidden, keys, intermediate = sizes.hidden, sizes.keys, sizes.intermediate
    yield _linears(sizes, "q, k, v", hidden, [hidden, keys, keys], ("q_proj", "k_proj", "v_proj"))
    yield _linears(sizes, "o", hidden, [hidden], ("o_proj",))
    yield _linears(sizes, "gate, up", hidden, [intermediate, intermediate], ("gate_proj", "up_proj"))
    yield _linears(sizes, "down", intermediate, [hidden], ("down_proj",))
    yield _mlp(sizes)
    yield _one(sizes, "q, DoRA", lambda base: _DoRA(base, sizes.rank, _SCALE), _theirs_dora(sizes))
    yield _one(sizes, "q, 4 adapters", lambda base: _many(base, sizes))
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


def _bytes(calls: list[Callable]) -> int:
    return sum(a.nbytes for call in calls if isinstance(call, nn.Module) for _, a in tree_flatten(call.parameters()))


def _path(calls: list[list[Callable]], kernels: bool = False, size: int | None = None, inlined: int = 0) -> Path:
    for module in (call for group in calls for call in group if isinstance(call, nn.Module)):
        mx.eval(module.eval().parameters())
    return Path(calls, kernels, _bytes(calls[0]) if size is None else size, inlined)


def _compared(bases, ours, theirs=None, inlined: int = 0) -> dict[str, Path]:
    paths = {"base": _path(bases, inlined=inlined), "kernels": _path(ours, True), "plain": _path(ours, inlined=inlined)}
    return paths | ({"mlx-lm": _path(theirs, inlined=inlined)} if theirs else {})


def _linears(sizes: Sizes, part: str, inputs: int, outputs: list[int], names: tuple[str, ...]) -> Case:
    from mlx_lm.tuner.lora import LoRALinear

    bases, ours, theirs = [], [], []
    for _ in _copies(sizes, inputs * sum(outputs)):
        bases.append([_linear(sizes, inputs, n) for n in outputs])
        ours.append([_LoRA(base, sizes.rank, _SCALE) for base in bases[-1]])
        introduce({f"layer.{name}": layer for name, layer in zip(names, ours[-1], strict=True)})
        theirs.append([LoRALinear.from_base(base, sizes.rank, scale=_SCALE) for base in bases[-1]])
    return Case(part, _x(sizes, inputs), _compared(bases, ours, theirs), of_layer=True)


def _mlp(sizes: Sizes) -> Case:
    """All of an MLP: gate, up and SwiGLU are one launch of the kernels."""
    from mlx_lm.models.llama import MLP, ModelArgs
    from mlx_lm.tuner.lora import LoRALinear

    names = ("gate_proj", "up_proj", "down_proj")
    tiny = dict(model_type="llama", num_hidden_layers=1, num_attention_heads=1, rms_norm_eps=1e-5, vocab_size=1)
    args = ModelArgs.from_dict({**tiny, "hidden_size": 1, "intermediate_size": 1})

    def mlp(layers: dict[str, nn.Module]) -> nn.Module:
        made = MLP(args)
        made.update_modules(layers)
        return made

    bases, ours, theirs = [], [], []
    for _ in _copies(sizes, 3 * sizes.hidden * sizes.intermediate):
        shapes = [(sizes.hidden, sizes.intermediate)] * 2 + [(sizes.intermediate, sizes.hidden)]
        linears = {name: _linear(sizes, *shape) for name, shape in zip(names, shapes, strict=True)}
        adapted = {name: _LoRA(linear, sizes.rank, _SCALE) for name, linear in linears.items()}
        introduce({f"mlp.{name}": layer for name, layer in adapted.items()})
        lora = {name: LoRALinear.from_base(linear, sizes.rank, scale=_SCALE) for name, linear in linears.items()}
        bases.append([mlp(linears)])
        ours.append([mlp(adapted)])
        theirs.append([mlp(lora)])
        fuse_mlps(ours[-1][0])
    return Case("MLP", _x(sizes, sizes.hidden), _compared(bases, ours, theirs, inlined=2))


def _one(sizes: Sizes, part: str, ours: Callable, theirs: Callable | None = None, nf4: bool = False) -> Case:
    """A projection of hidden to hidden."""
    bases = []
    for _ in _copies(sizes, sizes.hidden**2):
        if nf4:
            layer = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
            layer.set_dtype(sizes.dtype)
            bases.append([NF4Linear.from_linear(layer)])
        else:
            bases.append([_linear(sizes, sizes.hidden, sizes.hidden)])
    adapted = [[ours(base)] for (base,) in bases]
    paths = _compared(bases, adapted, [[theirs(base)] for (base,) in bases] if theirs else None)
    if nf4:  # which MLX has no product for: alone too it is a kernel's
        paths["base"] = _path(bases, True)
    return Case(part, _x(sizes, sizes.hidden), paths)


def _theirs_dora(sizes: Sizes) -> Callable | None:
    if sizes.bits not in (2, 4, 8, 16):  # mlx-lm's DoRA reads no others
        return None

    from mlx_lm.tuner.dora import DoRALinear

    return lambda base: DoRALinear.from_base(base, sizes.rank, scale=_SCALE)


def _many(base: nn.Module, sizes: Sizes, count: int = 4) -> nn.Module:
    """A different one of ``count`` adapters for each row, of ranks that differ."""
    ranks = mx.array([max(1, sizes.rank >> i) for i in range(count)], mx.int32)
    a = mx.random.normal((count, sizes.hidden, sizes.rank)).astype(sizes.dtype)
    b = mx.random.normal((count, sizes.rank, sizes.hidden)).astype(sizes.dtype)
    rows = Rows()
    layer = MultiLoRALinear(base, a, b, mx.full((count,), _SCALE), ranks, rows)
    index = mx.arange(sizes.rows, dtype=mx.int32) % count
    rows.of = lambda x: index  # rows of one sequence, told apart all the same
    mx.eval(index)
    return layer


def _norms(sizes: Sizes) -> Case:
    """DoRA's norms of W + scale * B A, once a training step; mlx-lm writes the sum out."""
    from mlx_lm.tuner.dora import DoRALinear

    base = _linear(sizes, sizes.hidden, sizes.hidden)
    layer = _DoRA(base, sizes.rank, _SCALE)
    weight = stored(base)

    def kernel(x: mx.array) -> mx.array:
        return dora_norm(weight, layer.lora_a, layer.lora_b, _SCALE)

    def plain(x: mx.array) -> mx.array:
        return layer.norms_squared()

    def theirs(x: mx.array) -> mx.array:
        whole = DoRALinear._dequantized_weight(them) + (_SCALE * them.lora_b.T) @ them.lora_a.T
        return mx.linalg.norm(whole, axis=1)

    size = _bytes([layer])
    paths = {"kernels": _path([[kernel]], True, size), "plain": _path([[plain]], size=size)}
    if make := _theirs_dora(sizes):
        them = make(base)
        paths["mlx-lm"] = _path([[theirs]], size=_bytes([them]))
    return Case("norms, DoRA", _x(sizes, 1), paths)


def _dequantize(sizes: Sizes) -> Case:
    linear = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
    layer = NF4Linear.from_linear(linear)
    weight = stored(layer)
    size = _bytes([layer]) + sizes.hidden**2 * sizes.dtype.size

    def kernel(x: mx.array) -> mx.array:
        return nf4_dequantize(weight, sizes.dtype)

    def plain(x: mx.array) -> mx.array:
        return layer.unpacked(sizes.dtype)

    paths = {"kernels": _path([[kernel]], True, size), "plain": _path([[plain]], size=size)}
    return Case("dequantize, NF4", _x(sizes, 1), paths)


def _cross_entropy(sizes: Sizes, tokens: int = 1024) -> Case:
    """The loss of a head and its gradient for the hidden states: some tokens at a time, at once, and mlx-lm's."""
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
    size = _bytes([head])
    paths = {"kernels": chunked, "plain": whole, "mlx-lm": theirs}
    return Case(
        "head and loss",
        x,
        {name: _path([[mx.grad(f)]], name == "kernels", size) for name, f in paths.items()},
        counted=False,
    )
