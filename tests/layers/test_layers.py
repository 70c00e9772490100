"""Adapter layers over every kind of base: identity, formula, gradients, launches, merged weights."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from conftest import assert_close, numbers, relative, shake_layer
from mlx_lora.base.modules import dense_weight, dims, kind
from mlx_lora.base.nf4_linear import NF4Linear
from mlx_lora.device import is_cpu
from mlx_lora.errors import AdapterError
from mlx_lora.fast import accelerate
from mlx_lora.layers import METHODS, check_rank

BASES = {
    "dense": None,
    **{f"affine{bits}": dict(group_size=64, bits=bits, mode="affine") for bits in (2, 3, 4, 5, 6, 8)},
    "affine4g32": dict(group_size=32, bits=4, mode="affine"),
    "mxfp4": dict(group_size=32, bits=4, mode="mxfp4"),
    "mxfp8": dict(group_size=32, bits=8, mode="mxfp8"),
    "nvfp4": dict(group_size=16, bits=4, mode="nvfp4"),
    "nf4": dict(double=False),
    "nf4double": dict(double=True),
}
EXPERTS = mx.array([[0, 2], [1, 1], [3, 0]])
# Tolerance by dtype, relative to the largest output.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def make_base(which: str, storage: str, dtype=mx.float32, bias: bool = True, seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    if which == "linear":
        base = nn.Linear(128, 192, bias=bias)
    elif which == "embedding":
        base = nn.Embedding(96, 128)
    else:
        base = SwitchLinear(128, 192, 4, bias=bias)
    if "bias" in base:
        base.bias = mx.random.normal(base.bias.shape)
    base.set_dtype(dtype)
    if storage.startswith("nf4"):
        return NF4Linear.from_linear(base, **BASES[storage])
    return base.to_quantized(**BASES[storage]) if BASES[storage] else base


def make_layer(method: str, which: str, base: nn.Module, rank=8, scale=2.0, dropout=0.0, shaken=True):
    layer = METHODS[method][which](base, rank, scale, dropout, mx.float32)
    if shaken:
        mx.random.seed(7)
        shake_layer(layer)
    mx.eval(layer.parameters())
    return layer


def apply(layer: nn.Module, which: str, x: mx.array) -> mx.array:
    return layer(x, EXPERTS) if which == "switch" else layer(x)


def make_input(which: str, dtype=mx.float32) -> mx.array:
    mx.random.seed(3)
    if which == "embedding":
        return mx.array([[1, 5, 95], [0, 7, 7]])
    shape = (3, 1, 1, 128) if which == "switch" else (2, 5, 128)
    return mx.random.normal(shape).astype(dtype)


def plain(method: str, which: str, layer, weight: np.ndarray, x: mx.array, bias) -> np.ndarray:
    """The formula in float64, with W' computed."""
    if method == "vera":
        a, b = (numbers(array).astype(np.float64) for array in layer.projections())
        d, scale = numbers(layer.vera_lambda_d), numbers(layer.vera_lambda_b)
        update = scale[..., None] * (b @ (d[..., None] * a))
    elif method == "ia3":
        update = weight * (numbers(layer.ia3_l).astype(np.float64) - 1)
        bias = layer.merged_bias()
    else:
        a, b = numbers(layer.lora_a).astype(np.float64), numbers(layer.lora_b).astype(np.float64)
        update = {"linear": lambda: (a @ b).T, "embedding": lambda: a @ b, "switch": lambda: b @ a}[which]()
    adapted = weight.astype(np.float64) + (1 if method == "vera" else layer.scale) * update
    if method == "dora":
        adapted *= (numbers(layer.m) / np.linalg.norm(adapted, axis=-1))[..., None]
    if which == "embedding":
        return adapted[np.array(x)]
    x = numbers(x).astype(np.float64)
    if which == "linear":
        return x @ adapted.T + (0 if bias is None else numbers(bias))
    out = np.einsum("tio,tkno->tkin", x[:, 0], adapted[np.array(EXPERTS)])
    return out + (0 if bias is None else numbers(bias)[np.array(EXPERTS)][:, :, None])


CASES = [(m, w, s) for m in METHODS for w in METHODS[m] for s in BASES if w == "linear" or not s.startswith("nf4")]
EMBEDDING = [m for m in METHODS if "embedding" in METHODS[m]]


@pytest.mark.parametrize(("method", "which", "storage"), CASES)
def test_attach_is_identity_and_base_is_frozen(method, which, storage):
    base = make_base(which, storage)
    x = make_input(which)
    before = apply(base, which, x)
    layer = make_layer(method, which, base, shaken=False)
    assert mx.array_equal(apply(layer, which, x), before).item()
    assert {n for n, _ in tree_flatten(layer.trainable_parameters())} == set(layer.leaves)
    assert kind(base) == which


@pytest.mark.parametrize("blas", [False, True])
@pytest.mark.parametrize(("method", "which", "storage"), CASES)
def test_forward_is_the_formula(method, which, storage, blas):
    base = make_base(which, storage)
    layer = make_layer(method, which, base)
    if blas:
        accelerate(layer)
    x = make_input(which)
    expected = plain(method, which, layer, numbers(dense_weight(base)), x, base.get("bias"))
    assert_close(apply(layer, which, x), expected, TOLERANCE[mx.float32], "training")
    layer.eval()
    assert_close(apply(layer, which, x), expected, TOLERANCE[mx.float32], "evaluation")
    assert_close(apply(layer, which, x), expected, TOLERANCE[mx.float32], "evaluation, again")


@pytest.mark.parametrize("blas", [False, True])
@pytest.mark.parametrize(("method", "storage"), [(m, s) for m in EMBEDDING for s in BASES if "nf4" not in s])
def test_tied_head_is_the_formula(method, storage, blas):
    base = make_base("embedding", storage)
    layer = make_layer(method, "embedding", base)
    if blas:
        accelerate(layer)
    x = mx.random.normal((2, 128))
    merged = layer.merged_weight(dense_weight(base))
    assert_close(layer.as_linear(x), x @ merged.T, TOLERANCE[mx.float32])
    assert_close(layer(mx.arange(96)), merged, TOLERANCE[mx.float32])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "which"), [(m, w) for m in METHODS for w in METHODS[m]])
def test_half_precision(method, which, dtype):
    if which == "switch" and is_cpu():
        pytest.skip("MLX's gather_mm takes float32 only on a CPU, which is what load() gives it there")
    base = make_base(which, "dense", dtype)
    layer = make_layer(method, which, base)
    assert all(layer[leaf].dtype == dtype for leaf in layer.leaves if leaf != "m")
    x = make_input(which, dtype)
    got = apply(layer, which, x)
    assert got.dtype == dtype
    expected = plain(method, which, layer, numbers(base.weight), x, base.get("bias"))
    assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("blas", [True, False])
@pytest.mark.parametrize(
    ("method", "which", "storage"), [c for c in CASES if c[2] in ("dense", "affine4", "affine3", "mxfp4", "nf4double")]
)
def test_gradients_are_those_of_the_plain_formula(method, which, storage, blas):
    if not blas and storage not in ("dense", "nf4double"):
        pytest.skip("MLX's own quantized products are MLX's to test")
    base = make_base(which, storage)
    if blas:
        accelerate(base)
    layer, x = make_layer(method, which, base), make_input(which)
    weight, target = dense_weight(base), mx.random.normal(apply(layer, which, x).shape)

    def loss(parameters, x):
        layer.update(parameters)
        return (apply(layer, which, x) * target).sum()

    def reference(p, x):
        if method == "vera":
            a, b = layer.projections()
            adapted = weight + p["vera_lambda_b"][..., None] * (b @ (p["vera_lambda_d"][..., None] * a))
        elif method == "ia3":
            adapted = weight * p["ia3_l"]
        else:
            update = {"linear": lambda: (p["lora_a"] @ p["lora_b"]).T, "embedding": lambda: p["lora_a"] @ p["lora_b"]}
            update = update.get(which, lambda: p["lora_b"] @ p["lora_a"])()
            adapted = weight + layer.scale * update
        if method == "dora":
            norm = mx.stop_gradient(mx.linalg.norm(adapted, axis=-1, keepdims=True))
            adapted = p["m"][..., None] * adapted / norm
        if which == "embedding":
            y = adapted[x]
        elif which == "linear":
            y = x @ adapted.T
            if method == "ia3" and "bias" in layer.base:
                y = y + layer.base.bias * p["ia3_l"].reshape(-1)
        else:
            y = mx.einsum("tio,tkno->tkin", x[:, 0], adapted[EXPERTS])
        return (y * target).sum()

    parameters = layer.adapter_weights()
    got, expected = (mx.grad(f)(parameters, x) for f in (loss, reference))
    for name in layer.leaves:
        assert mx.abs(got[name]).max().item() > 0, f"{name} gets no gradient"
        assert_close(got[name], expected[name], 2e-5, name)
    if which != "embedding":
        got, expected = (mx.grad(f, argnums=1)(parameters, x) for f in (loss, reference))
        assert_close(got, expected, 2e-5, "x")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_gradients(dtype):
    base = make_base("linear", "dense", dtype)
    layer, x = make_layer("lora", "linear", base), make_input("linear", dtype)

    def loss(p, half):
        cast = (lambda a: a) if half else (lambda a: a.astype(mx.float32))
        y = cast(x) @ cast(base.weight).T + cast(base.bias)
        if half:
            layer.update(p)
            y = layer(x)
        else:
            y = y + layer.scale * (cast(x) @ cast(p["lora_a"])) @ cast(p["lora_b"])
        return y.astype(mx.float32).square().sum()

    p = layer.adapter_weights()
    got, expected = mx.grad(loss)(p, True), mx.grad(loss)(p, False)
    for name in p:
        assert_close(got[name], expected[name], 2 * TOLERANCE[dtype], name)


def launches(f, *args) -> list[str]:
    """Names of the primitives in a function's graph that launch a kernel."""
    ops: list[str] = []

    def record(entry):
        if entry.get("type") == "primitive":
            ops.append(entry["name"])

    mx.export_function(record, f, *args)
    # Views and constants launch no kernel.
    free = {"Transpose", "Reshape", "Broadcast", "ExpandDims", "Squeeze", "Flatten", "Unflatten", "StopGradient"}
    return [op for op in ops if op not in free]


@pytest.mark.parametrize("storage", ["dense", "affine4"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_lora_linear_takes_three_launches(storage, dtype):
    base = make_base("linear", storage, dtype, bias=False)
    layer = make_layer("lora", "linear", base).eval()
    assert len(launches(lambda x: base(x), mx.zeros((1, 128), dtype))) == 1
    ops = launches(lambda x: layer(x), mx.zeros((1, 128), dtype))
    assert len(ops) <= 3, ops
    from mlx_lm.tuner.lora import LoRALinear

    theirs = LoRALinear.from_base(base)
    theirs.lora_b = theirs.lora_b + 1
    mx.eval(theirs.parameters())
    assert len(launches(lambda x: theirs(x), mx.zeros((1, 128), dtype))) == (7 if dtype == mx.bfloat16 else 5)


def test_dora_dropout_is_pefts():
    """y = W x + (g - 1) W x~ + g s (x~ A) B + b with x~ the dropped input: only the update sees the dropout."""
    layer = make_layer("dora", "linear", make_base("linear", "dense"), dropout=0.5)
    x = make_input("linear")
    mx.random.seed(11)
    got = layer(x)
    mx.random.seed(11)
    dropped = layer.dropout(x)
    gain, w = layer.gain(), layer.linear.weight
    expected = x @ w.T + (gain - 1) * (dropped @ w.T) + layer.linear.bias
    expected += gain * (layer.scale * (dropped @ layer.lora_a) @ layer.lora_b)
    assert_close(got, expected, 1e-5)
    assert relative(got, layer.eval()(x)) > 1e-3


def test_dora_gain_follows_changed_parameters():
    layer = make_layer("dora", "linear", make_base("linear", "affine4")).eval()
    x = make_input("linear")
    first = layer(x)
    layer.lora_b = layer.lora_b * 2
    again = layer(x)
    assert relative(again, first) > 1e-3
    fresh = make_layer("dora", "linear", make_base("linear", "affine4"))
    fresh.lora_b = fresh.lora_b * 2
    assert_close(again, fresh(x), 1e-6)


def test_a_rank_above_the_layer_is_refused():
    with pytest.raises(AdapterError, match="rank 129"):
        check_rank(make_base("linear", "dense"), 129)


@pytest.mark.parametrize(("which", "storage"), sorted({(w, s) for _, w, s in CASES}))
def test_dims_and_dense_weight(which, storage):
    base = make_base(which, storage)
    assert dims(base) == {"linear": (128, 192), "embedding": (96, 128), "switch": (128, 192)}[which]
    if storage.startswith("affine"):
        stored = mx.dequantize(base.weight, base.scales, base.biases, base.group_size, base.bits)
        assert_close(dense_weight(base), stored, 1e-6)
