"""MLPs that compute their activations again in the backward pass: the table of known classes, gradients, memory."""

from __future__ import annotations

import gc
import importlib
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, shake
from mlx_lora import AdapterConfig, fast
from mlx_lora.fast.mlp import KNOWN, FastMLP, form_of
from mlx_lora.kernels.recomputed import recomputed
from mlx_lora.training.recompute import recomputed_layers

MODELS = {
    "llama": LLAMA,
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16.0},
    "olmo2": {**LLAMA, "model_type": "olmo2"},
    "phi3": {**LLAMA, "model_type": "phi3"},
    "starcoder2": {**LLAMA, "model_type": "starcoder2"},
}
TOKENS = mx.array([[1, 5, 9, 33, 7, 60], [3, 2, 1, 17, 80, 0]])


# -- the table -------------------------------------------------------------------------------------------------------


def instance(kind: type) -> nn.Module:
    mlp = kind.__new__(kind)
    nn.Module.__init__(mlp)
    return mlp


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_class_computes_its_formula(name):
    """Over several tokens and dtypes, fine around zero and far beyond any bound: clamps, means and branches show."""
    module, _, kind = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError, SystemExit):
        pytest.skip("not in this mlx-lm, or needs a package that is not here")
    mlp, form = instance(kind), KNOWN[name]
    assert form_of(mlp) is form, f"this mlx-lm writes {name} differently: {kind.__call__.__code__.co_names}"
    fine, far = mx.linspace(-9, 9, 62), mx.array([-1e4, -2500.0, -60.0, 60.0, 2500.0, 1e4])
    values = mx.concatenate([fine, far]).reshape(1, 4, 17)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        given = [(values[:, ::-1] * 0.7**i + i / 3).astype(dtype) for i in range(len(form.first))]
        if form.f.__name__ == "_halves":
            given = [mx.concatenate([given[0], given[0][:, ::-1]], axis=-1)]
        projections = dict(zip(form.first, given, strict=True))
        for attribute, array in projections.items():
            object.__setattr__(mlp, attribute, lambda x, array=array: array)
        object.__setattr__(mlp, form.last, lambda y: y)
        got, expected = mlp(mx.zeros((1, 4, 8))), form.f(*given)
        assert got.dtype == expected.dtype
        finite = mx.isfinite(expected)
        assert mx.array_equal(finite, mx.isfinite(got)).item()
        assert_close(mx.where(finite, got, 0), mx.where(finite, expected, 0), 1e-6 if dtype == mx.float32 else 1e-2)


def test_a_class_that_says_more_is_not_known(monkeypatch):
    from mlx_lm.models import llama

    for body in (
        lambda self, x: self.down_proj(nn.silu(mx.minimum(self.gate_proj(x), 2000)) * self.up_proj(x)),
        lambda self, x: self.down_proj(nn.silu(self.gate_proj(x)).mean(axis=1) * self.up_proj(x)),
        lambda self, x: self.down_proj(self.gate_proj(x) if x.dtype == mx.float16 else self.up_proj(x)),
    ):
        changed = type("MLP", (llama.MLP,), {"__module__": llama.__name__, "__call__": body})
        assert form_of(instance(changed)) is None
    assert form_of(instance(llama.MLP)) is not None
    assert form_of(instance(type("Other", (llama.MLP,), {}))) is None, "a class of the user's own"


# -- gradients -------------------------------------------------------------------------------------------------------


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
        return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:]).sum()

    step = mx.value_and_grad(loss)
    return (mx.compile(step) if compiled else step), model.trainable_parameters()


def switch(model, how: str, monkeypatch) -> None:
    """Put acceleration with kernels on, or take everything off."""
    monkeypatch.setenv("MLX_LORA_KERNELS", how)
    fast.restore(model)
    if how == "on":
        fast.accelerate(model)


def both(model, monkeypatch, compiled=False) -> tuple[dict, dict]:
    """Gradients with recomputation and without, in the same random state. DoRA's norms would ask for Metal."""
    monkeypatch.setattr("mlx_lora.fast.dora.enabled", lambda *_: False)
    found = []
    for how in ("on", "off"):
        switch(model, how, monkeypatch)
        mx.random.seed(7)
        step, parameters = training(model, compiled)
        loss, gradients = step(parameters)
        found.append(dict(tree_flatten(gradients), loss=loss))
        mx.eval(found[-1])
        model.update(parameters)
    return tuple(found)


def assert_same(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for path, gradient in expected.items():
        assert_close(got[path], gradient, 3e-5, path)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name, method, dropout, monkeypatch):
    model = adapted(MODELS[name], method, dropout=dropout)
    assert_same(*both(model, monkeypatch))
    switch(model, "on", monkeypatch)
    assert isinstance(model.layers[0].mlp, FastMLP)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_experts(method, monkeypatch):
    model, other = adapted(QWEN3_MOE, method), make_model(QWEN3_MOE)
    assert_same(*both(model, monkeypatch))
    switch(model, "on", monkeypatch)
    own, theirs = model.layers[0].mlp.switch_mlp, other.layers[0].mlp.switch_mlp
    assert callable(own.activation) and isinstance(theirs.activation, nn.Module), "other models keep what they had"


@pytest.mark.parametrize("keys", [["self_attn.q_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]], ids=str)
def test_some_projections_adapted(keys, monkeypatch):
    assert_same(*both(adapted(LLAMA, keys=keys), monkeypatch))


def test_compiled_and_checkpointed(monkeypatch):
    model = adapted(LLAMA)
    _, expected = both(model, monkeypatch)
    compiled, _ = both(model, monkeypatch, compiled=True)
    assert_same(compiled, expected)
    switch(model, "on", monkeypatch)
    with recomputed_layers(model):
        for compiled in (False, True):
            step, parameters = training(model, compiled)
            loss, gradients = step(parameters)
            assert_same(dict(tree_flatten(gradients), loss=loss), expected)
            model.update(parameters)


def test_weights_of_the_mlp_itself_are_trained(monkeypatch):
    """Full matrices beside adapters get their gradients too."""
    model = adapted(LLAMA, keys=["self_attn.q_proj", "mlp.up_proj"])
    model.layers[1].mlp.unfreeze()
    got, expected = both(model, monkeypatch)
    assert "model.layers.1.mlp.down_proj.weight" in got
    assert_same(got, expected)


def test_gradients_of_frozen_weights(monkeypatch):
    """For a caller who asks for the gradients of every parameter."""
    model, found = adapted(LLAMA), []
    for how in ("on", "off"):
        switch(model, how, monkeypatch)
        step, _ = training(model)
        parameters = model.parameters()
        found.append(dict(tree_flatten(step(parameters)[1])))
        model.update(parameters)
    assert_same(*found)


# -- memory ----------------------------------------------------------------------------------------------------------

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
    model.update(parameters)
    return found


@pytest.mark.parametrize(
    ("config", "widest", "least"),
    [
        (WIDE, TOKENS[:, 1:].size * 1024 * 4 * 3, 2.9),  # sigmoid, its product with the gate, the result
        ({**QWEN3_MOE, "moe_intermediate_size": 1024}, TOKENS[:, 1:].size * 2 * 1024 * 4 * 2, 1.8),  # the first two
    ],
    ids=["mlp", "experts"],
)
def test_what_is_kept(config, widest, least, monkeypatch):
    model = adapted(config)
    switch(model, "off", monkeypatch)
    before = kept(model)
    switch(model, "on", monkeypatch)
    saved = (before - kept(model)) / widest
    assert saved > least, f"{saved} arrays a layer"


def test_what_a_compiled_step_keeps(monkeypatch):
    """`mx.compile` must not replace the recomputation by the stored result."""
    peaks = []
    for how in ("on", "off"):
        model = adapted({**WIDE, "num_hidden_layers": 8})
        switch(model, how, monkeypatch)
        step, parameters = training(model, compiled=True)
        before = active(model)
        mx.reset_peak_memory()
        mx.eval(step(parameters))
        peaks.append(mx.get_peak_memory() - before)
        model.update(parameters)
    saved = (peaks[1] - peaks[0]) / (TOKENS[:, 1:].size * 1024 * 4) / 8
    assert saved > 0.9, f"{saved} arrays a layer"


def test_recomputed_alone():
    """One input and no matrix; and against autograd."""
    x, a = mx.random.normal((3, 4)), mx.random.normal((4, 2))
    assert_close(mx.grad(lambda x: recomputed(mx.exp, [x])[0].sum())(x), mx.exp(x), 1e-6)

    def loss(x, a):
        y, u = recomputed(mx.sin, [x], a)
        return (y.square().sum() + 3 * u).sum()

    def plain(x, a):
        return (mx.sin(x).square().sum() + 3 * mx.sin(x) @ a).sum()

    for got, expected in zip(mx.grad(loss, (0, 1))(x, a), mx.grad(plain, (0, 1))(x, a), strict=True):
        assert_close(got, expected, 1e-5)
