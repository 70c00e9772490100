"""MLPs that make their activations again in the backward pass: gradients, what is kept, what is left alone."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, shake
from mlx_lora import AdapterConfig
from mlx_lora.kernels.recomputed import recomputed
from mlx_lora.layers.activation import Shape, shape_of
from mlx_lora.training.loss import loss_fn
from mlx_lora.training.recompute import recomputed_layers

GATED = Shape(("gate_proj", "up_proj"), "down_proj")
MODELS = {
    "llama": (LLAMA, GATED),
    "gemma2": ({**LLAMA, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16.0}, GATED),
    "olmo2": ({**LLAMA, "model_type": "olmo2"}, GATED),
    "phi3": ({**LLAMA, "model_type": "phi3"}, Shape(("gate_up_proj",), "down_proj")),
    "starcoder2": ({**LLAMA, "model_type": "starcoder2"}, Shape(("c_fc",), "c_proj")),
}
TOKENS = mx.array([[1, 5, 9, 33, 7, 60], [3, 2, 1, 17, 80, 0]])


def adapted(config, method="lora", **settings) -> nn.Module:
    model = make_model(config)
    mlx_lora.attach(model, AdapterConfig(method=method, rank=4, num_layers=-1, **settings))
    shake(model)
    return model.train()


def training(model, compiled=False):
    """(parameters) -> loss and gradients by path, and the parameters."""

    def loss(parameters):
        model.update(parameters)
        return loss_fn(model, TOKENS, mx.ones((2, 5), mx.bool_))[0]

    step = mx.value_and_grad(loss)
    return (mx.compile(step) if compiled else step), model.trainable_parameters()


def both(model, monkeypatch, compiled=False) -> tuple[dict, dict]:
    """Gradients with recomputation and without, in the same random state."""
    found = []
    for how in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_KERNELS", how)
        mx.random.seed(7)
        step, parameters = training(model, compiled)
        loss, gradients = step(parameters)
        found.append(dict(tree_flatten(gradients), loss=loss))
        mx.eval(found[-1])
        model.update(parameters)
    return tuple(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_shape_is_found(name):
    config, shape = MODELS[name]
    found = {type(m).__name__: s for m in make_model(config).modules() if (s := shape_of(m, type(m).__call__))}
    assert list(found.values()) == [shape], found


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name, method, dropout, monkeypatch):
    if method == "dora":  # its norms would ask for Metal
        monkeypatch.setattr("mlx_lora.layers.dora.enabled", lambda: False)
    got, expected = both(adapted(MODELS[name][0], method, dropout=dropout), monkeypatch)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_experts(method, monkeypatch):
    if method == "dora":
        monkeypatch.setattr("mlx_lora.layers.dora.enabled", lambda: False)
    model, other = adapted(QWEN3_MOE, method), make_model(QWEN3_MOE)
    got, expected = both(model, monkeypatch)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)
    first, theirs = model.layers[0].mlp.switch_mlp.activation, other.layers[0].mlp.switch_mlp.activation
    assert isinstance(first, type(theirs)) and type(first) is not type(theirs), "other models keep what they had"


@pytest.mark.parametrize("keys", [["self_attn.q_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]], ids=str)
def test_some_projections_adapted(keys, monkeypatch):
    got, expected = both(adapted(LLAMA, keys=keys), monkeypatch)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


def test_compiled_and_checkpointed(monkeypatch):
    model = adapted(LLAMA)
    _, expected = both(model, monkeypatch)
    with recomputed_layers(model):
        checkpointed, _ = both(model, monkeypatch)
        together, _ = both(model, monkeypatch, compiled=True)
    compiled, _ = both(model, monkeypatch, compiled=True)
    for got in (checkpointed, together, compiled):
        for path, gradient in expected.items():
            assert_close(got[path], gradient, 1e-5, path)


def test_weights_of_the_mlp_itself_are_trained(monkeypatch):
    """Whole matrices beside adapters get their gradients too."""
    model = adapted(LLAMA, keys=["self_attn.q_proj"])
    model.layers[1].mlp.unfreeze()
    got, expected = both(model, monkeypatch)
    assert "model.layers.1.mlp.down_proj.weight" in got
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024}


def active(model) -> int:
    """Bytes in use when nothing is left to be freed."""
    mx.eval(model.parameters())
    mx.synchronize()
    gc.collect()
    return mx.get_active_memory()


def kept(model) -> int:
    """Bytes that wait for the backward pass when the loss is there."""
    step, parameters = training(model)
    before = active(model)
    loss, gradients = step(parameters)
    mx.eval(loss)
    return mx.get_active_memory() - before if gradients else 0


def test_what_is_kept(monkeypatch):
    model, wide = adapted(WIDE), TOKENS[:, 1:].size * 1024 * 4
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    before = kept(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    saved = (before - kept(model)) / wide / 3
    assert 2.8 < saved < 3.2, f"{saved} arrays a layer: sigmoid, its product with the gate, the result"


def test_what_experts_keep(monkeypatch):
    model = adapted({**QWEN3_MOE, "moe_intermediate_size": 1024})
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    before = kept(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    saved = (before - kept(model)) / (TOKENS[:, 1:].size * 2 * 1024 * 4) / 2
    assert 1.8 < saved < 2.2, f"{saved} arrays a layer: sigmoid and its product with the gate, of two experts a token"


def test_what_a_compiled_step_keeps(monkeypatch):
    """A compiler must not find that what is made again is there already."""
    peaks = []
    for how in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_KERNELS", how)
        model = adapted({**WIDE, "num_hidden_layers": 8})
        step, parameters = training(model, compiled=True)
        before = active(model)
        mx.reset_peak_memory()
        mx.eval(step(parameters))
        peaks.append(mx.get_peak_memory() - before)
        model.update(parameters)
    saved = (peaks[1] - peaks[0]) / (TOKENS[:, 1:].size * 1024 * 4) / 8
    assert saved > 0.9, f"{saved} arrays a layer"


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.RMSNorm(8)
        self.dropout, self.beta, self.limit, self.act = nn.Dropout(0.1), mx.ones(8), 2.0, nn.GELU()


def calls(f):
    return type("MLP", (Base,), {"__call__": f})()


@pytest.mark.parametrize(
    ("f", "fits"),
    [
        (lambda self, x: self.down(self.act(self.up(x)) * self.limit), True),
        (lambda self, x: self.down(self.norm(self.up(x))), False),
        (lambda self, x: self.down(self.dropout(self.up(x))), False),
        (lambda self, x: self.down(self.up(x) * self.beta), False),
        (lambda self, x: self.down(self.up(x)) * 2, False),
        (lambda self, x: x + self.down(self.up(x)), False),
        (lambda self, x: self.down(self.up(2 * x)), False),
        (lambda self, x: self.down(self.up(self.up(x))), False),
        (lambda self, x: self.up(x), False),
        (lambda self, x, y: self.down(self.up(x)), False),
    ],
)
def test_what_fits(f, fits):
    mlp = calls(f)
    assert (shape_of(mlp, type(mlp).__call__) == Shape(("up",), "down")) == fits


def test_recomputed_alone():
    """One input and no matrices; and against autograd."""
    x, a = mx.random.normal((3, 4)), mx.random.normal((4, 2))
    assert_close(mx.grad(lambda x: recomputed(mx.exp, [x], [])[0].sum())(x), mx.exp(x), 1e-6)

    def loss(x, a):
        y, u = recomputed(mx.sin, [x], [a])
        return (y.square().sum() + 3 * u).sum()

    def plain(x, a):
        return (mx.sin(x).square().sum() + 3 * mx.sin(x) @ a).sum()

    for got, expected in zip(mx.grad(loss, (0, 1))(x, a), mx.grad(plain, (0, 1))(x, a), strict=True):
        assert_close(got, expected, 1e-5)
