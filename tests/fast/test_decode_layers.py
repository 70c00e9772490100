"""LoRA and DoRA layers through the kernels: whole models, launches counted, shared inputs, swaps, changes in place."""

from __future__ import annotations

import copy
import functools
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx_lm.models.cache import make_prompt_cache

import mlx_lora
import mslemu
from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, plainly, shake
from mlx_lora import AdapterConfig, fast
from mlx_lora.fast.dora import KeptNorms
from mlx_lora.fast.shared_input import families
from mlx_lora.kernels.counting import launches
from mlx_lora.model.attach import adapters_on

TOKENS = mx.array([[1, 5, 9, 33, 7]])
QUANTIZED = {"group_size": 32, "bits": 4}
GEMMA = {**LLAMA, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16.0}


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
        assert len(decoding) == 4 * 3 * (4 + linears), (
            "a short prompt and three tokens, three layers, 4 shared launches"
        )
    assert_close(got, decoded(plainly(model, monkeypatch)), 2e-5 if quantize is None else 1e-4)


def test_mixture_of_experts(backend, monkeypatch):
    model = adapted(quantize=None, config=QWEN3_MOE)
    got = decoded(model)
    assert_close(got, decoded(plainly(model, monkeypatch)), 2e-5)


def test_training_after_decoding(backend, monkeypatch):
    """Training uses the formula; decoding afterwards uses the updated weights."""
    model = adapted()
    first = decoded(model)
    for layer in adapters_on(model.train()).values():
        layer.update({"lora_b": 2 * layer.lora_b})
    got = decoded(model.eval())
    assert_close(got, decoded(plainly(model, monkeypatch)), 1e-4)
    assert (mx.abs(got - first).max() > 0.01).item()


def count(model, monkeypatch) -> int:
    """Launches of a token, everything that is computed once being there already."""
    cache = make_prompt_cache(model)
    mx.eval(plainly(model, monkeypatch)(TOKENS, cache=cache), [c.state for c in cache])
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    fast.accelerate(model)
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    for layer in model.modules():
        if isinstance(layer, KeptNorms):
            layer.gain()
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    found = launches(lambda t: model(t, cache=cache), TOKENS[:, :1]).total()
    plainly(model, monkeypatch)
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4bit"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_launches_of_a_layer(method, quantize, dtype, monkeypatch):
    """All seven linears adapted: 4 more than the base, 2 where gate, up and SwiGLU are one.

    Plain operations take 14 more, mlx-lm's layers 28 to 42. An export counts SwiGLU, one compiled launch, as three.
    """
    monkeypatch.setenv("MLX_LORA_FAST", "off")  # on a CPU it would compute quantized layers by BLAS
    base = make_model(LLAMA, quantize=quantize)
    base.set_dtype(dtype)
    bare = launches_of_base = count(base, monkeypatch)
    mlx_lora.attach(base, AdapterConfig(method=method, rank=4, num_layers=-1))
    shake(base)
    if method == "lora":
        assert count(base.eval(), monkeypatch) - bare == 3 * 14, "MLX_LORA_FAST=off"
    monkeypatch.setenv("MLX_LORA_FAST", "on")
    assert count(base.eval(), monkeypatch) - bare == 3 * (2 - 2 if method == "lora" else 4)
    mlx_lora.unmount(base)
    assert count(base, monkeypatch) == launches_of_base

    from mlx_lm.tuner.utils import linear_to_lora_layers

    if method == "lora":
        theirs = make_model(LLAMA, quantize=quantize)
        theirs.set_dtype(dtype)
        linear_to_lora_layers(theirs, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        mx.eval(theirs.parameters())
        # In bfloat16 6 a linear, 42; the export merges the casts of q, k and v, and those of gate and up.
        assert count(theirs, monkeypatch) - bare == 3 * (39 if dtype == mx.bfloat16 else 28)


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
    """PEFT's adapters, whose matrices come transposed, over a base that was read transposed."""
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


def test_swapping_adapters(backend):
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


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_changes_in_place_count(backend, method, monkeypatch):
    """Whatever is kept between calls goes when an array or the scale changes, of the adapter or of its base."""
    model = adapted(method)
    decoded(model)
    layers = adapters_on(model).values()

    def change_base():
        for layer in layers:
            layer.linear.scales *= 1.25

    def change(name, factor):
        for layer in layers:
            value = getattr(layer, name)
            value *= factor
            setattr(layer, name, value)

    changes = [lambda: change("lora_b", 1.5), lambda: change("scale", 2.0), change_base]
    if method == "dora":
        changes.append(lambda: change("m", 2.0))
    last = decoded(model)
    for how in changes:
        how()
        got = decoded(model)
        assert_close(got, decoded(plainly(copy.deepcopy(model), monkeypatch)), 1e-4)
        monkeypatch.setenv("MLX_LORA_KERNELS", "off" if backend == "reference" else "on")
        assert (mx.abs(got - last).max() > 1e-3).item()
        last = got


@pytest.mark.parametrize("quantize", [None, QUANTIZED], ids=["dense", "4bit"])
def test_changes_that_set_no_attribute_count(quantize, monkeypatch):
    """Elements, other names for the same array, and what a compiled training step writes."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    model = adapted("dora", quantize)
    layer = model.layers[0].self_attn.q_proj

    def by_element():
        layer.m[0:20] = 5.0

    def by_another_name():
        m = layer.m
        m *= 2

    def of_the_base():
        array = layer.linear["scales" if quantize else "weight"]
        array[3] = 0.3

    def by_a_compiled_step():
        optimizer = optim.Adam(1e-2)
        state = [model.state, optimizer.state]
        value_and_grad = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

        @functools.partial(mx.compile, inputs=state, outputs=state)
        def step(x):
            loss, gradients = value_and_grad(model, x)
            optimizer.update(model, gradients)
            return loss

        for _ in range(2):
            mx.eval(step(TOKENS), state)

    for change in (by_element, by_another_name, of_the_base, by_a_compiled_step):
        before = model.eval()(TOKENS)
        change()
        got, twin = model.eval()(TOKENS), copy.deepcopy(model)
        fast.restore(twin)
        assert_close(got, twin(TOKENS), 1e-5, change.__name__)
        assert (mx.abs(got - before).max() > 1e-4).item(), change.__name__


@pytest.mark.parametrize(("method", "quantize"), [("dora", None), ("lora", QUANTIZED)])
def test_what_is_kept_is_no_constant_of_a_compiled_function(method, quantize, monkeypatch):
    monkeypatch.setenv("MLX_LORA_KERNELS", "off")
    model, other = adapted(method, quantize), make_model(LLAMA, seed=7, quantize=quantize)
    mlx_lora.attach(other, AdapterConfig(method=method, rank=4, num_layers=-1))
    mx.eval(model(TOKENS))
    compiled = mx.compile(lambda x: model(x), inputs=model.state)
    mx.eval(compiled(TOKENS))
    model.update(other.parameters())
    assert_close(compiled(TOKENS), model(TOKENS), 1e-5)


class InPlace(nn.Module):
    """Changes its input between two projections of it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def __call__(self, x):
        q = self.q_proj(x)
        x += 1
        return q + 2 * self.k_proj(x)


def test_a_module_that_changes_its_input_shares_nothing(backend, monkeypatch):
    model = Model()
    model.layers[0].self_attn = InPlace()
    mlx_lora.attach(model, AdapterConfig(rank=2, num_layers=-1))
    shake(model, size=1.0)
    got = model.eval()(mx.ones((1, 1, 32)))
    assert_close(got, plainly(model, monkeypatch)(mx.ones((1, 1, 32))), 1e-5)


def test_attentions_of_mlx_lm_share(monkeypatch):
    """Their forward passes change no array in place."""
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    for config in (LLAMA, QWEN3_MOE, GEMMA, {**LLAMA, "model_type": "olmo2"}):
        model = adapted(config=config, quantize=None)
        assert families(model.layers[0].self_attn), config["model_type"]


def test_an_input_changed_between_two_calls(backend):
    attention = adapted().layers[0].self_attn
    x = mx.random.normal((1, 1, 64))
    attention.q_proj(x)
    x += 1
    assert_close(attention.k_proj(x), attention.k_proj(mx.array(x)), 1e-6)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_disabled_adapter(backend, method):
    model = make_model(LLAMA, quantize=QUANTIZED)
    bare = decoded(model)
    mlx_lora.attach(model, AdapterConfig(method=method, rank=4, num_layers=-1))
    shake(model)
    adapted_logits = decoded(model.eval())
    for _ in range(2):
        with mlx_lora.disable_adapter(model):
            assert_close(decoded(model), bare, 1e-4)
        assert_close(decoded(model), adapted_logits, 1e-5)
    assert (mx.abs(adapted_logits - bare).max() > 0.01).item()


@pytest.mark.parametrize("rows", [0, 1, 8, 9])
def test_rows_that_the_kernels_take_and_others(backend, rows, monkeypatch):
    model = adapted()
    x = mx.random.normal((1, rows, 64))
    got = [model.layers[0].self_attn.q_proj(x), model.layers[0].mlp(x)]
    plainly(model, monkeypatch)
    for one, other in zip(got, [model.layers[0].self_attn.q_proj(x), model.layers[0].mlp(x)], strict=True):
        assert one.shape == other.shape
        if rows:
            assert_close(one, other, 1e-5)


def test_compiled(backend):
    attention = adapted().layers[0].self_attn
    step = mx.compile(lambda x: attention.q_proj(x) + attention.q_proj(2 * x))
    for rows in (2, 5, 2, 12):
        x = mx.random.normal((1, rows, 64))
        assert_close(step(x), attention.q_proj(x) + attention.q_proj(2 * x), 1e-5)


# -- shared inputs ---------------------------------------------------------------------------------------------------


def test_which_layers_share(monkeypatch):
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    model = adapted(keys=("q_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"))
    for layer in model.layers:
        assert families(layer.self_attn) == [["q_proj", "v_proj"]]
        assert families(layer.mlp) == [["gate_proj", "up_proj"]]


class Attention(nn.Module):
    """Three projections, the last of another array; ``fails``: raises in between."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.fails = False

    def __call__(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        if self.fails:
            raise RuntimeError
        return q + k + self.v_proj(x * 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Module()]
        self.layers[0].self_attn = Attention()

    def __call__(self, x):
        return self.layers[0].self_attn(x)


def test_each_layer_gets_the_product_of_its_own_input(backend, monkeypatch):
    model = Model()
    mlx_lora.attach(model, AdapterConfig(rank=2, num_layers=-1))
    shake(model, size=1.0)
    attention, x = model.eval().layers[0].self_attn, mx.random.normal((1, 1, 32))
    twin, again = copy.copy(attention.q_proj), copy.deepcopy(model)
    attention.fails = True
    with pytest.raises(RuntimeError):
        model(x)
    attention.fails = False
    got = [model(x), model(x + 1), again(x), twin(x), pickle.loads(pickle.dumps(model))(x)]
    plainly(model, monkeypatch)
    expected = [model(x), model(x + 1), model(x), attention.q_proj(x), model(x)]
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-5)


# -- on and off ------------------------------------------------------------------------------------------------------


def snapshot(model) -> list:
    return [(path, type(m), dict(vars(m)), list(m)) for path, m in model.named_modules()]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_restore_leaves_every_class_and_attribute_as_it_was(backend, method, monkeypatch):
    monkeypatch.setenv("MLX_LORA_FAST", "off")
    model = adapted(method)
    before = snapshot(model)
    monkeypatch.setenv("MLX_LORA_FAST", "on")
    assert fast.accelerate(model) and fast.accelerate(model) == []
    decoded(model)
    assert snapshot(model) != before
    fast.restore(model)
    assert snapshot(model) == before


def test_unmount_leaves_every_class_as_it_was(backend):
    model = make_model(LLAMA, quantize=QUANTIZED)
    before = snapshot(model)
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1))
    decoded(model)
    mlx_lora.unmount(model)
    assert [row[:2] for row in snapshot(model)] == [row[:2] for row in before]


def test_nothing_is_put_on_when_it_is_off(monkeypatch):
    monkeypatch.setenv("MLX_LORA_FAST", "off")
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    assert fast.accelerate(adapted()) == []
    monkeypatch.setenv("MLX_LORA_FAST", "sometimes")
    with pytest.raises(mlx_lora.MLXLoRAError, match="MLX_LORA_FAST is 'sometimes'"):
        fast.accelerate(adapted())


def test_new_scales_of_a_quantized_layer(monkeypatch):
    """On a CPU: the float32 copy of its weight is made again."""
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("on a GPU there is no such copy")
    layer = nn.Linear(64, 32).to_quantized(32, 4)
    x = mx.random.normal((3, 64))
    fast.accelerate(layer)
    copy_of_it = layer.dense()
    assert layer.train().eval().freeze().dense() is copy_of_it, "training or not, it stays"
    for change in (lambda: None, lambda: setattr(layer, "scales", 2 * layer.scales), lambda: layer.update({})):
        change()
        layer.biases *= 1.5
        got = layer(x)
        fast.restore(layer)
        assert_close(got, layer(x), 1e-5)
        fast.accelerate(layer)


def test_a_subclass_of_a_quantized_layer_computes_in_its_own_way():
    class Doubled(nn.QuantizedLinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer = Doubled(64, 32, bias=False, group_size=32)
    x = mx.random.normal((3, 64))
    expected = layer(x)
    assert fast.accelerate(layer) == []
    assert_close(layer(x), expected, 1e-6)
    assert [e.reason for e in fast.explain(layer)] in ([], ["its class is not MLX's or mlx-lm's"])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_models_can_be_copied(backend, method, copied):
    model = adapted(method)
    expected = decoded(model)
    other = copied(model)
    assert_close(decoded(other), expected, 1e-6)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    mlx_lora.unmount(model)
    assert_close(decoded(copied(model)), decoded(model), 1e-6)


# -- explained -------------------------------------------------------------------------------------------------------


def explained(model, what: str) -> dict[str, tuple[bool, str]]:
    return {e.path: (e.done, e.reason) for e in fast.explain(model) if e.what.startswith(what)}


def test_explain(monkeypatch):
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    model = adapted()
    assert set(explained(model, "decode kernels").values()) == {(True, "")}
    assert explained(model, "shared input")["model.layers.0.self_attn"] == (True, "")
    assert set(explained(model, "fused gate").values()) == set(explained(model, "activation").values()) == {(True, "")}
    assert len(explained(model, "fused gate")) == 3
    monkeypatch.setenv("MLX_LORA_KERNELS", "auto")
    if not mx.metal.is_available():
        fast.restore(model)
        assert set(explained(model, "decode kernels").values()) == {
            (False, "kernels are off: MLX_LORA_KERNELS=auto and MLX does not compute on Metal")
        }


@pytest.mark.parametrize(
    ("changes", "what", "reason"),
    [
        ({"method": "vera", "rank": 8}, "decode kernels", "VeRALinear has no kernel"),
        ({"lora_bias": True}, "decode kernels", "LoRABiasLinear has no kernel"),
        ({"rank_pattern": {"up_proj": 8}}, "fused gate", "ranks 4 and 8 differ"),
        ({"method": "dora"}, "fused gate", "gate_proj and up_proj are not both LoRA layers that the kernels decode"),
        ({"config": GEMMA}, "fused gate", "the activation is not SwiGLU of two projections"),
        ({"config": QWEN3_MOE, "quantize": None}, "decode kernels", "LoRASwitchLinear has no kernel"),
    ],
    ids=str,
)
def test_why_not(changes, what, reason, monkeypatch):
    monkeypatch.setenv("MLX_LORA_KERNELS", "on")
    assert (False, reason) in explained(adapted(**changes), what).values()
