"""MLPs that make their activations again in the backward pass: gradients, what is kept, what is left alone."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, shake, shake_layer
from mlx_lora import AdapterConfig
from mlx_lora.fast.activation import Shape, shape_of
from mlx_lora.fast.mlp import fuse_mlps
from mlx_lora.fast.shared_input import introduce
from mlx_lora.kernels.recomputed import recomputed
from mlx_lora.layers import METHODS
from mlx_lora.training.losses.cross_entropy import loss as loss_fn
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
    if config.get("num_experts") and version("mlx-lm").startswith("0.31"):
        pytest.skip("mlx-lm takes gradients of its experts' indices there, which MLX refuses")
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
        monkeypatch.setattr("mlx_lora.fast.dora.enabled", lambda: False)
    got, expected = both(adapted(MODELS[name][0], method, dropout=dropout), monkeypatch)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_experts(method, monkeypatch):
    if method == "dora":
        monkeypatch.setattr("mlx_lora.fast.dora.enabled", lambda: False)
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


def test_a_norm_that_others_read(monkeypatch):
    """Where the module beside it takes another array, its adapters make their products of that one."""
    model = adapted(LLAMA)
    for layer in model.layers:
        attention = type(layer.self_attn)
        doubled = {"__call__": lambda self, x, *rest, kind=attention, **more: kind.__call__(self, 2 * x, *rest, **more)}
        layer.self_attn.__class__ = type("Doubled", (attention,), doubled)
    got, expected = both(model, monkeypatch)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


def test_weights_of_the_mlp_itself_are_trained(monkeypatch):
    """Whole matrices beside adapters get their gradients too."""
    model = adapted(LLAMA, keys=["self_attn.q_proj"])
    model.layers[1].mlp.unfreeze()
    model.layers[1].input_layernorm.unfreeze()
    got, expected = both(model, monkeypatch)
    assert {"model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"} <= set(got)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 1e-5, path)


def test_gradients_of_frozen_weights(monkeypatch):
    """For whoever asks for those of every parameter: a norm's weight is an argument, not a constant."""
    model, found = adapted(LLAMA), []
    for how in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_KERNELS", how)
        step, _ = training(model)
        parameters = model.parameters()
        found.append(dict(tree_flatten(step(parameters)[1])))
        model.update(parameters)
    for path, gradient in found[1].items():
        assert_close(found[0][path], gradient, 1e-5, path)
    assert mx.abs(found[0]["model.layers.0.input_layernorm.weight"]).max().item() > 0


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
    mx.synchronize()
    found = mx.get_active_memory() - before
    mx.eval(gradients)  # which held it until now
    return found


def test_what_is_kept(monkeypatch):
    model, wide = adapted(WIDE), TOKENS[:, 1:].size * 1024 * 4
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    before = kept(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    saved = (before - kept(model)) / wide / 3
    assert saved > 3.4, f"{saved} arrays: sigmoid, its product with the gate, the result; two norms, a quarter as wide"


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
        self.acts, self.partial = [nn.PReLU()], functools.partial(mx.clip, a_min=-1.0, a_max=1.0)

    def scaled(self, y):
        return y * self.beta

    def note(self):
        self.count = 1


def calls(f):
    return type("MLP", (Base,), {"__call__": f})()


def in_training(self, x):
    y = nn.silu(self.up(x))
    return self.down(y * self.beta if self.training else y)


def leaves_something(self, x):
    self.last = nn.silu(self.up(x))
    return self.down(self.last)


def notes(self, x):
    self.note()
    return self.down(nn.silu(self.up(x)))


@pytest.mark.parametrize(
    ("f", "fits"),
    [
        (lambda self, x: self.down(self.act(self.up(x)) * self.limit), True),
        (lambda self, x: self.down(self.partial(self.up(x))), True),
        (lambda self, x: self.down(self.norm(self.up(x))), False),
        (lambda self, x: self.down(self.scaled(self.up(x))), False),
        (lambda self, x: self.down(self.acts[0](self.up(x))), False),
        (lambda self, x: self.down(self.up(x) * mx.random.bernoulli(0.5, (8,))), False),
        (in_training, False),
        (leaves_something, False),
        (notes, False),
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
    """What has parameters, draws numbers, differs in training or leaves something behind is no function of inputs."""
    mlp = calls(f)
    assert (shape_of(mlp, type(mlp).__call__) == Shape(("up",), "down")) == fits
    assert not hasattr(mlp, "count") and not hasattr(mlp, "last")


def test_other_arguments_reach_an_mlp():
    def optional(self, hidden_states, factor=1):
        return factor * self.down(nn.silu(self.up(hidden_states)))

    mlp, x = calls(lambda self, x: self.down(nn.silu(self.up(x)))), mx.random.normal((2, 4))
    type(mlp).__call__ = optional
    expected = mlp(x)
    fuse_mlps(mlp)
    assert hasattr(type(mlp), "_fused") is False  # f would scale what comes after
    type(mlp).__call__ = lambda self, hidden_states: self.down(nn.silu(self.up(hidden_states)))
    fuse_mlps(mlp)
    assert hasattr(type(mlp), "_fused")
    assert mx.array_equal(mlp(hidden_states=x), expected).item()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_models_can_be_copied(copied, monkeypatch):
    model = adapted(LLAMA, "dora")
    other = copied(model)
    assert_close(other(TOKENS), model(TOKENS), 1e-6)
    assert type(other.layers[0].mlp) is type(model.layers[0].mlp)
    mlx_lora.unmount(model)
    assert_close(copied(model)(TOKENS), model(TOKENS), 1e-6)


def test_an_mlp_whose_last_projection_has_a_sibling_by_name(monkeypatch):
    """By its name it reads what the first one reads; here it does not."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = (METHODS["lora"]["linear"](nn.Linear(8, 8), 2, 1.0) for _ in range(2))

        def __call__(self, x):
            return self.w3(nn.silu(self.w1(x)))

    mlp, x = Odd(), mx.random.normal((3, 8))
    shake_layer(mlp.w1, 0.5)
    expected = mlp(x)
    introduce({"mlp.w1": mlp.w1, "mlp.w3": mlp.w3})
    fuse_mlps(mlp)
    assert hasattr(type(mlp), "_fused")
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    assert_close(mlp.train()(x), expected, 1e-6)


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
