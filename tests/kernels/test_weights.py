"""``dora_norm`` and ``nf4_dequantize`` against float64; DoRA layers through them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import mslemu
from conftest import assert_close
from kernel_cases import DTYPES, STORAGES, check_dequantize, check_norm, make_stored
from mlx_lora import fast
from mlx_lora.base.nf4_linear import NF4Linear
from mlx_lora.kernels import dora_norm, nf4_dequantize
from mlx_lora.kernels.registry import source
from mlx_lora.layers import METHODS


@pytest.mark.parametrize("storage", STORAGES)
def test_norm_of_every_storage(backend, storage):
    check_norm(6, 128, storage, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "r"), [(1, 1, 1), (17, 37, 5), (33, 600, 16), (3, 7, None), (18, 513, None)])
def test_norm_of_odd_shapes(backend, N, K, r, dtype):
    check_norm(N, K, "dense", r, dtype)


@pytest.mark.parametrize("storage", ["dense", "affine3g32", "nf4nested"])
def test_norm_of_the_base_alone(backend, storage):
    check_norm(21, 192, storage)


def test_norm_reads_each_weight_once(backend):
    if backend != "emulated":
        pytest.skip("counted by the emulator")
    check_norm(32, 1024, "affine4g64", 4)
    buffers = mslemu.log[-1].buffers
    assert buffers["w"]["read"] == buffers["w"]["nbytes"] and buffers["b"]["read"] == buffers["b"]["nbytes"]


def test_norm_is_a_constant_of_the_backward_pass(backend):
    base, a, b = make_stored("dense", 8, 8, mx.float32), mx.ones((8, 2)), mx.ones((2, 8))
    assert mx.abs(mx.grad(lambda a: dora_norm(base, a, b).sum())(a)).max().item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["nf4", "nf4nested"])
@pytest.mark.parametrize(("N", "K"), [(1, 32), (5, 192), (48, 160)])
def test_dequantize(backend, N, K, storage, dtype):
    check_dequantize(N, K, storage, dtype)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_over_nf4(backend, method, double, monkeypatch):
    """Decoding and dequantizing an ``NF4Linear`` through the kernels."""
    mx.random.seed(0)
    base = NF4Linear.from_linear(nn.Linear(96, 40), double)
    layer = METHODS[method]["linear"](base, 4, 2.0)
    layer.lora_b = mx.random.normal((4, 40))
    layer.eval()
    fast.accelerate(layer)
    x = mx.random.normal((1, 2, 96))
    got, weight = layer(x), base.unpacked()
    if backend == "emulated":
        assert {"shrink", "qmv", "dequantize"} <= {part for entry in mslemu.log for part in entry.name.split("_")}
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    fast.restore(layer)
    assert mx.array_equal(weight, base.unpacked()).item()
    assert_close(got, layer(x), 1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_without_adapter(backend, double, dtype, monkeypatch):
    """Decodes in one launch too; a prompt and training do not."""
    mx.random.seed(0)
    layer = NF4Linear.from_linear(nn.Linear(96, 40), double).eval()
    fast.accelerate(layer)
    x = mx.random.normal((2, 3, 96)).astype(dtype)
    got = layer(x)
    if backend == "emulated":
        assert [entry.name.split("_")[3] for entry in mslemu.log] == ["qmv"]
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    fast.restore(layer)
    assert got.dtype == layer(x).dtype
    assert_close(got, layer(x), 1e-5 if dtype == mx.float32 else 1e-2)


@pytest.mark.skipif(not mx.metal.is_available(), reason="an emulated kernel is a constant to MLX")
def test_what_is_frozen_refuses_gradients():
    base = make_stored("nf4", 4, 64, mx.float32)
    with pytest.raises(ValueError, match="vjp"):
        mx.grad(lambda s: nf4_dequantize(base._replace(scales=s)).sum())(base.scales)


@pytest.mark.parametrize("storage", [None, {"group_size": 32, "bits": 3}, {"group_size": 32, "mode": "mxfp4"}], ids=str)
def test_dora_gain(backend, storage, monkeypatch):
    """A layer's magnitudes, training and not, against plain operations."""
    mx.random.seed(0)
    base = nn.Linear(64, 40)
    layer = METHODS["dora"]["linear"](base.to_quantized(**storage) if storage else base, 4, 2.0)
    layer.lora_b = mx.random.normal((4, 40))
    fast.accelerate(layer)

    def gradient(parameters):
        layer.update(parameters)
        return (layer.gain() ** 2).sum()

    parameters = layer.trainable_parameters()
    got = layer.gain(), mx.grad(gradient)(parameters)["m"]
    layer.update(parameters)
    if backend == "emulated":
        assert {entry.name.split("_")[2] for entry in mslemu.log} == {"dora"}
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    fast.restore(layer)
    for g, e in zip(got, (layer.gain(), mx.grad(gradient)(parameters)["m"]), strict=True):
        assert_close(g, e, 1e-5)


@pytest.mark.parametrize("name", ["dora_norm", "nf4_dequantize"])
def test_lint(name):
    header, body = source(name)
    assert mslemu.lint(header + body) == []
