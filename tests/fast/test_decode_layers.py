"""LoRA and DoRA layers through the kernels: whole models, launches counted, siblings, gradients, swapping."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import mlx_lora
import mslemu
from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, shake, shake_layer
from mlx_lora import AdapterConfig
from mlx_lora.fast.norms import recompute_norms
from mlx_lora.fast.shared_input import Siblings
from mlx_lora.kernels.counting import launches
from mlx_lora.layers import METHODS
from mlx_lora.model.attach import adapters_on

TOKENS = mx.array([[1, 5, 9, 33, 7]])
QUANTIZED = {"group_size": 32, "bits": 4}


def adapted(method="lora", quantize=QUANTIZED, config=LLAMA, **changes) -> nn.Module:
    model = make_model(config, quantize=quantize)
    mlx_lora.attach(model, AdapterConfig(**{"method": method, "rank": 4, "num_layers": -1, **changes}))
    shake(model)
    mx.eval(model.parameters())
    return model.eval()


def decoded(model) -> mx.array:
    """Logits of three tokens one by one, after a prompt."""
    cache = make_prompt_cache(model)
    out = [model(mx.array([[3, 4, 5, 6, 7, 8, 9, 10, 11]]), cache=cache)]
    return mx.concatenate(out + [model(TOKENS[:, i : i + 1], cache=cache) for i in range(3)], axis=1)


@pytest.mark.parametrize("quantize", [None, QUANTIZED, {"group_size": 16, "bits": 4, "mode": "nvfp4"}], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_whole_model(backend, method, quantize, monkeypatch):
    model = adapted(method, quantize)
    got = decoded(model)
    if backend == "emulated":
        decoding = [entry for entry in mslemu.log if "dora_norm" not in entry.name]
        linears = 6 if method == "lora" else 7  # gate and up, with SwiGLU, are one launch
        assert len(decoding) == 3 * 3 * (4 + linears), "three tokens, three layers, 4 shared launches"
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    assert_close(got, decoded(model), 2e-5 if quantize is None else 1e-4)


def test_mixture_of_experts(backend, monkeypatch):
    model = adapted(quantize=None, config=QWEN3_MOE)
    got = decoded(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    assert_close(got, decoded(model), 2e-5)


def count(model, monkeypatch) -> int:
    """Launches of a token, everything that is computed once being there already."""
    cache = make_prompt_cache(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    mx.eval(model(TOKENS, cache=cache), [c.state for c in cache])
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    found = launches(lambda t: model(t, cache=cache), TOKENS[:, :1]).total()
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4bit"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_launches_of_a_layer(method, quantize, dtype, monkeypatch):
    """All seven linears adapted: 4 more than the base, 2 where gate, up and SwiGLU are one.

    Plain operations take 14 more, mlx-lm's layers 28 to 42. An export counts SwiGLU, one compiled launch, as three.
    """
    base = make_model(LLAMA, quantize=quantize)
    base.set_dtype(dtype)
    plain = count(base, monkeypatch)
    mlx_lora.attach(base, AdapterConfig(method=method, rank=4, num_layers=-1))
    shake(base)
    assert count(base.eval(), monkeypatch) - plain == 3 * (2 - 2 if method == "lora" else 4)
    mlx_lora.unmount(base)
    assert count(base, monkeypatch) == plain

    from mlx_lm.tuner.utils import linear_to_lora_layers

    if method == "lora":
        theirs = make_model(LLAMA, quantize=quantize)
        theirs.set_dtype(dtype)
        linear_to_lora_layers(theirs, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        mx.eval(theirs.parameters())
        # In bfloat16 6 a linear, 42; the export merges the casts of q, k and v, and those of gate and up.
        assert count(theirs, monkeypatch) - plain == 3 * (39 if dtype == mx.bfloat16 else 28)


def test_bytes_of_a_model(backend):
    """Each byte of every W, A and b is read once a token."""
    if backend != "emulated":
        pytest.skip("counted by the emulator")
    model = adapted()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.arange(9)[None], cache=cache))
    mslemu.log.clear()
    mx.eval(model(TOKENS[:, :1], cache=cache))
    read: dict[str, int] = {}
    for entry in mslemu.log:
        for name, buffer in entry.buffers.items():
            name = name.removesuffix("2") if name in ("w2", "b2") else name
            if name in ("w", "b", "a0", "a1", "a2"):
                read[name] = read.get(name, 0) + buffer["read"]
    layers = adapters_on(model).values()
    assert read["w"] == sum(layer.linear.weight.nbytes for layer in layers)
    assert read["b"] == sum(layer.lora_b.nbytes for layer in layers)
    assert read["a0"] + read["a1"] + read["a2"] == sum(layer.lora_a.nbytes for layer in layers)


@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4bit"])
def test_nothing_is_copied_on_the_way(backend, quantize, tmp_path, monkeypatch):
    """Adapters of PEFT, whose matrices come transposed, and a base that was read so."""
    if backend != "emulated":
        pytest.skip("seen by the emulator")
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    model = adapted(quantize=quantize)
    mlx_lora.save_adapter(mlx_lora.extract(model), tmp_path, format="peft")
    mlx_lora.unmount(model)
    if quantize is None:
        for layer in model.layers:
            layer.mlp.down_proj.weight = mx.contiguous(layer.mlp.down_proj.weight.T).T
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    mlx_lora.mount(model, mlx_lora.load_adapter(tmp_path))
    decoded(model.eval())
    assert mslemu.log and not [(entry.name, entry.copied) for entry in mslemu.log if entry.copied]


def test_swapping_adapters(backend, monkeypatch):
    """Mounting, unmounting and changing arrays in place leave nothing behind."""
    model = adapted()
    first = mlx_lora.extract(model)
    before = decoded(model)
    for layer in adapters_on(model).values():
        layer.lora_a, layer.lora_b = 2 * layer.lora_a, 2 * layer.lora_b
    second, changed = mlx_lora.extract(model), decoded(model)
    mlx_lora.unmount(model)
    bare = decoded(model)
    for adapter, expected in ((first, before), (second, changed), (first, before)):
        mlx_lora.mount(model, adapter)
        assert_close(decoded(model.eval()), expected, 1e-5)
    mlx_lora.unmount(model)
    assert_close(decoded(model), bare, 1e-6)
    assert (mx.abs(changed - before).max() > 0.01).item()


def test_compiled(backend):
    attention = adapted().layers[0].self_attn
    step = mx.compile(lambda x: attention.q_proj(x) + attention.q_proj(2 * x))
    for rows in (2, 5, 2, 12):
        x = mx.random.normal((1, rows, 64))
        assert_close(step(x), attention.q_proj(x) + attention.q_proj(2 * x), 1e-5)


def test_gradient_of_a_frozen_adapter(backend):
    """With respect to the input, in evaluation mode: through the kernels' own backward passes."""
    layer = METHODS["lora"]["linear"](nn.Linear(64, 48), 4, 2.0)
    layer.lora_b = mx.random.normal((4, 48))
    layer.eval()
    x = mx.random.normal((1, 2, 64))
    plain = layer.linear.weight + 2.0 * (layer.lora_a @ layer.lora_b).T
    expected = mx.grad(lambda x: ((x @ plain.T + layer.linear.bias) ** 2).sum())(x)
    for f in (lambda f: f, mx.compile, mx.checkpoint):
        assert_close(mx.grad(f(lambda x: (layer(x) ** 2).sum()))(x), expected, 1e-5)


def test_one_launch_of_an_mlp(backend, monkeypatch):
    from mlx_lora.fast.mlp import swiglu

    mlp = adapted().layers[0].mlp
    x = mx.random.normal((1, 3, 64))
    if backend == "emulated":
        assert swiglu(mlp.gate_proj, mlp.up_proj, x) is not None
        assert swiglu(mlp.gate_proj, mlp.up_proj, mx.zeros((1, 9, 64))) is None
    got = mlp(x)
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    assert_close(got, mlp(x), 1e-5)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.limit = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4), 7.0


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda self, x: self.c(nn.silu(self.a(x)) * self.b(x)), ("a", "b")),
        (lambda self, x: self.c(self.a(x) * nn.silu(self.b(x))), ("b", "a")),
        (lambda self, x: self.c(nn.gelu(self.a(x)) * self.b(x)), None),
        (lambda self, x: self.c(nn.silu(mx.minimum(self.a(x), 100.0)) * self.b(x)), None),
        (lambda self, x: self.c(nn.silu(self.a(x)) * mx.clip(self.b(x), -self.limit, self.limit)), None),
        (lambda self, x: self.c(nn.silu(1.01 * self.a(x)) * self.b(x)), None),
        (lambda self, x: self.c(nn.silu(self.a(x)) * (self.b(x) + 1)), None),
    ],
)
def test_what_is_swiglu(f, found):
    """By its values, however it is written."""
    from mlx_lora.fast.activation import shape_of
    from mlx_lora.fast.mlp import _gate_and_up

    mlp = type("MLP", (GatedMLP,), {"__call__": f})()
    assert _gate_and_up(mlp, shape_of(mlp, f)) == found


# -- sharing ---------------------------------------------------------------------------------------------------------


def test_who_shares():
    model = adapted(keys=("q_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"))
    for i in range(3):
        layer = model.layers[i]
        assert layer.self_attn.q_proj.siblings is layer.self_attn.v_proj.siblings is not None
        assert layer.mlp.gate_proj.siblings is layer.mlp.up_proj.siblings is not layer.self_attn.q_proj.siblings
        assert layer.self_attn.o_proj.siblings is layer.mlp.down_proj.siblings is None


class Products:
    """Counts the products it makes."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x, a):
        self.sizes.append(len(a))
        return [x @ m for m in a]


def make_siblings(n=3) -> tuple[list, Siblings, Products]:
    layers = [METHODS["lora"]["linear"](nn.Linear(16, 16), 2, 1.0) for _ in range(n)]
    return layers, Siblings(layers), Products()


def test_one_product_for_all_that_come_with_the_same_array():
    layers, siblings, product = make_siblings()
    for _ in range(10):
        x = mx.random.normal((2, 16))
        for layer in layers:
            assert mx.array_equal(siblings.part(layer, x, product), x @ layer.lora_a).item()
    assert product.sizes == [3] * 10
    assert not siblings._for and not siblings._parts, "nothing is held"


def test_parts_are_of_the_matrices_at_hand():
    """A part that was not fetched is not given to a trace, nor after a matrix was changed, nor to a copy."""
    layers, siblings, product = make_siblings(3)
    for layer in layers:
        object.__setattr__(layer, "siblings", siblings)
        shake_layer(layer, 0.5)
    x = mx.random.normal((2, 16))
    for layer in layers:
        layer.train()
        gradients = nn.value_and_grad(layer, lambda layer=layer: layer(x).square().sum())()[1]
        expected = mx.grad(lambda a, layer=layer: (layer.linear(x) + (x @ a) @ layer.lora_b).square().sum())(
            layer.lora_a
        )
        assert_close(gradients["lora_a"], expected, 1e-5)
    siblings.part(layers[0], x, product)
    layers[1].lora_a = 3 * layers[1].lora_a
    assert mx.array_equal(siblings.part(layers[1], x, product), x @ layers[1].lora_a).item()
    assert mx.array_equal(siblings.part(copy.copy(layers[2]), x, product), x @ layers[2].lora_a).item()


def test_different_arrays_end_the_sharing():
    layers, siblings, product = make_siblings(2)
    for _ in range(10):
        for layer in layers:
            x = mx.random.normal((2, 16))
            assert mx.array_equal(siblings.part(layer, x, product), x @ layer.lora_a).item()
    assert product.sizes[-1] == 1 and sum(product.sizes) < 30


def test_an_interrupted_pass_does_not():
    layers, siblings, product = make_siblings(2)
    for i in range(20):
        x = mx.random.normal((2, 16))
        siblings.part(layers[0], x, product)
        if i % 5:
            siblings.part(layers[1], x, product)
    assert product.sizes == [2] * 20


@pytest.mark.parametrize(("method", "how"), [("lora", "plain"), ("dora", "plain"), ("lora", "checkpoint")])
def test_training_gradients_are_autograds(method, how, monkeypatch):
    """Of a whole model, shared products and own backward passes against plain operations."""
    from mlx_lora.kernels import registry
    from mlx_lora.training.losses.cross_entropy import loss as loss_fn
    from mlx_lora.training.recompute import recomputed_layers

    model = adapted(method, dropout=0.0)
    model.train()
    mask = mx.ones((1, 4), mx.bool_)

    def gradients():
        def loss(parameters):
            model.update(parameters)
            return loss_fn(model, TOKENS, mask)[0]

        kept = model.trainable_parameters()
        try:
            return dict(tree_flatten(mx.grad(loss)(kept)))
        finally:
            model.update(kept)

    if how == "checkpoint":
        with recomputed_layers(model):
            got = gradients()
    else:
        got = gradients()
    monkeypatch.setattr(registry, "_differentiable", False)
    for layer in adapters_on(model).values():
        object.__setattr__(layer, "siblings", None)
    expected = gradients()
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert_close(got[name], array, 2e-5, name)


def test_gifts_that_nobody_fetches_end(monkeypatch):
    """Of an attention that does not call all of its projections; nothing is held then, nor ever in a copy."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    layers, siblings, _ = make_siblings(2)
    for layer in layers:
        object.__setattr__(layer, "siblings", siblings)
        layer.train()
    block = nn.Module()
    block.input_layernorm, block.self_attn = nn.RMSNorm(16), nn.Module()
    block.self_attn.q_proj, block.self_attn.k_proj = layers
    recompute_norms(block)
    for i in range(8):
        y = block.input_layernorm.train()(mx.random.normal((2, 16)))
        assert_close(layers[0](y), layers[0].linear(y), 1e-6)
        assert (not copy.deepcopy(siblings)._parts) and bool(siblings._parts) == (i < 4)
    assert not siblings.wanted and not siblings._for
