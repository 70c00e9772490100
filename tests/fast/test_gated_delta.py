"""The gated delta rule in chunks: against the loop over the tokens in float64, in mlx-lm's models, and its memory."""

from __future__ import annotations

import copy
import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_lora
from conftest import assert_close, make_model, relative
from mlx_lora import AdapterConfig, TrainConfig, fast
from mlx_lora.data import Dataset, Example
from mlx_lora.fast import delta_rule
from mlx_lora.fast.delta_rule import SEGMENT, gated_delta
from mlx_lora.fast.gated_delta import ChunkedDelta, has_gated_delta

NAMES = ("q", "k", "v", "g", "beta", "state")

# -- the rule --------------------------------------------------------------------------------------------------------


def loop(q, k, v, g, beta, state=None, mask=None):
    """The recurrence as mlx-lm computes it, token by token, in the dtype of its arguments."""
    (batch, length, key_heads, key_dim), (heads, value_dim) = q.shape, v.shape[2:]
    if state is None:
        state = mx.zeros((batch, heads, value_dim, key_dim), q.dtype)
    q, k = (mx.repeat(x, heads // key_heads, axis=2) for x in (q, k))
    g = g[..., None] if g.ndim == 3 else g
    ys = []
    # `split`, because the gradient of a slice is an array of the whole length
    steps = zip(*([x.squeeze(1) for x in mx.split(x, length, axis=1)] for x in (q, k, v, g, beta)), strict=True)
    for t, (q_t, k_t, v_t, g_t, beta_t) in enumerate(steps):
        new = state * g_t[..., None, :]
        delta = (v_t - (new * k_t[..., None, :]).sum(-1)) * beta_t[..., None]
        new = new + delta[..., None] * k_t[..., None, :]
        ys.append((new * q_t[..., None, :]).sum(-1))
        state = new if mask is None else mx.where(mask[:, t][:, None, None, None], new, state)
    return mx.stack(ys, axis=1), state


def drawn(
    length: int, *, gates: str = "mixed", channels: bool = False, beta: float = 1.0, keys: str = "random", seed=0
):
    """q, k, v, g, beta and state in float64, with two value heads for each key head and normalized q and k."""
    draw, batch, key_heads, heads, key_dim, value_dim = np.random.default_rng(seed), 2, 2, 4, 16, 12
    q, k = (draw.standard_normal((batch, length, key_heads, key_dim)) for _ in range(2))
    if keys == "repeated":
        k = k[:, :1] + 0 * k
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    shape = (batch, length, heads, key_dim) if channels else (batch, length, heads)
    logs = draw.uniform(-20, 0, shape)
    logs = {
        "mixed": np.where(draw.random(shape) < 0.7, logs / 1000, logs),
        "strong": logs,
        "weak": logs / 1e4,
        "zero": np.where(draw.random(shape) < 0.3, -np.inf, logs / 1000),
        "none": 0 * logs,
    }[gates]
    v, state = (
        draw.standard_normal(s) for s in ((batch, length, heads, value_dim), (batch, heads, value_dim, key_dim))
    )
    betas = (
        np.full((batch, length, heads), beta) if keys == "repeated" else draw.uniform(0, beta, (batch, length, heads))
    )
    return [q * key_dim**-0.5, k, v, np.exp(logs), betas, state]


def cotangents(arrays) -> list[np.ndarray]:
    """Cotangents of y, which has the shape of v, and of the last state."""
    draw = np.random.default_rng(1)
    return [draw.standard_normal(arrays[i].shape) for i in (2, 5)]


def with_gradients(rule, arrays, dtype, mask=None) -> dict[str, np.ndarray]:
    """Results and gradients by name."""
    with mx.stream(mx.cpu):  # float64
        inputs, seeds = ([mx.array(x).astype(dtype) for x in given] for given in (arrays, cotangents(arrays)))
        results, gradients = mx.vjp(lambda *inputs: rule(*inputs, mask), inputs, seeds)
        mx.eval(results, gradients)
    return dict(zip(("y", "last state", *NAMES), map(np.array, (*results, *gradients)), strict=True))


def assert_same(got: dict, expected: dict, tolerance: float) -> None:
    for name in expected:
        assert got[name].shape == expected[name].shape and np.isfinite(got[name]).all(), name
        error = np.abs(got[name] - expected[name]).max() / max(np.abs(expected[name]).max(), 1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


def check(arrays, mask=None, tolerance: float = 3e-6) -> None:
    expected = with_gradients(loop, arrays, mx.float64, mask)
    assert_same(with_gradients(gated_delta, arrays, mx.float64, mask), expected, 1e-10)
    assert_same(with_gradients(gated_delta, arrays, mx.float32, mask), expected, tolerance)


@pytest.mark.parametrize("channels", [False, True], ids=["head gates", "channel gates"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 130, SEGMENT, SEGMENT + 1])
def test_results_and_gradients_are_those_of_the_loop(length, channels):
    check(drawn(length, channels=channels))
    mask = mx.array(np.random.default_rng(3).random((2, length)) < 0.7)
    check(drawn(length, channels=channels, beta=2.0, seed=1), mask)


@pytest.mark.parametrize("channels", [False, True], ids=["head gates", "channel gates"])
@pytest.mark.parametrize("gates", ["strong", "weak", "zero", "none"])
def test_any_gates_keep_float32_accuracy(gates, channels):
    """Gates between exp(-20) and 1, zeros too: no decay overflows, none loses digits beside a strong one."""
    check(drawn(200, gates=gates, channels=channels))
    check(drawn(200, gates=gates, channels=channels, beta=2.0))


def test_repeated_keys_keep_float32_accuracy():
    """Powers of the triangular matrix grow like binomial coefficients here, so a product of them would fail."""
    check(drawn(200, gates="none", keys="repeated"))
    check(drawn(200, gates="none", keys="repeated", beta=2.0), tolerance=2e-4)  # 200 reflections without any decay


def test_a_long_odd_length():
    """Against a loop in NumPy: y, the last state, and the derivative along a random direction of all arguments."""

    def in_numpy(q, k, v, g, beta, state):
        q, k = (np.repeat(x, 2, axis=2) for x in (q, k))
        ys = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None]
            delta = (v[:, t] - (state @ k[:, t, ..., None])[..., 0]) * beta[:, t, :, None]
            state = state + delta[..., None] * k[:, t, :, None, :]
            ys.append((state @ q[:, t, ..., None])[..., 0])
        return np.stack(ys, axis=1), state

    arrays, draw = drawn(4097), np.random.default_rng(2)
    directions = [draw.standard_normal(x.shape) * x for x in arrays]
    ahead, behind = (
        in_numpy(*(x + step * d for x, d in zip(arrays, directions, strict=True))) for step in (1e-6, -1e-6)
    )
    got = with_gradients(gated_delta, arrays, mx.float32)
    for name, expected in zip(("y", "last state"), in_numpy(*arrays), strict=True):
        assert_close(got[name], expected, 3e-6, name)
    seeds = cotangents(arrays)
    expected = sum(((a - b) / 2e-6 * seed).sum() for a, b, seed in zip(ahead, behind, seeds, strict=True))
    parts = [(got[name] * d).astype(np.float64).sum() for name, d in zip(NAMES, directions, strict=True)]
    assert abs(sum(parts) - expected) < 1e-5 * sum(map(abs, parts)), (parts, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("channels", [False, True], ids=["head gates", "channel gates"])
def test_dtypes_and_defaults_are_mlx_lms(channels, masked):
    """y in the dtype of q, the state in float32, zeros for no state, also what a masked token reads."""
    from mlx_lm.models.gated_delta import gated_delta_ops

    q, k, v, g, beta, _ = (mx.array(x).astype(mx.float32) for x in drawn(70, channels=channels))
    q, k, v, beta = (x.astype(mx.bfloat16) for x in (q, k, v, beta))
    mask = mx.arange(70)[None] < mx.array([[70], [50]]) if masked else None
    got, expected = gated_delta(q, k, v, g, beta, None, mask), gated_delta_ops(q, k, v, g, beta, None, mask)
    for x, y, tolerance in zip(got, expected, (1e-2, 2e-6), strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, tolerance)


def test_it_can_be_compiled_and_checkpointed(monkeypatch):
    monkeypatch.setattr(delta_rule, "CHUNK", 4)  # fewer kernels to compile
    monkeypatch.setattr(delta_rule, "SEGMENT", 8)
    arrays = [mx.array(x).astype(mx.float32) for x in drawn(19)]
    mask = mx.array(np.random.default_rng(3).random((2, 19)) < 0.7)

    def objective(rule):
        return mx.value_and_grad(lambda *inputs: rule(*inputs)[0].square().sum(), argnums=tuple(range(6)))

    value, gradients = objective(lambda *inputs: gated_delta(*inputs, mask))(*arrays)
    for changed in (
        objective(mx.checkpoint(lambda *inputs: gated_delta(*inputs, mask))),
        mx.compile(objective(mx.checkpoint(lambda *inputs: gated_delta(*inputs, mask)))),
    ):
        again, others = changed(*arrays)
        assert_close(again, value, 1e-6)
        for name, one, other in zip(NAMES, gradients, others, strict=True):
            assert_close(other, one, 3e-6, name)


def peak(step, *inputs) -> int:
    """Bytes that a call needs above what is there before it; the second call, after compiling."""
    mx.eval(step(*inputs))
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(*inputs))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("channels", [False, True], ids=["head gates", "channel gates"])
def test_memory_grows_at_most_linearly_with_the_length(channels):
    peaks = {}
    step = mx.value_and_grad(lambda *inputs: gated_delta(*inputs)[0].square().sum(), argnums=tuple(range(6)))
    for length in (512, 1024, 4096):
        inputs = [mx.array(x).astype(mx.float32) for x in drawn(length, channels=channels)]
        mx.eval(inputs)
        peaks[length] = peak(step, *inputs)
    assert peaks[4096] < 8.8 * peaks[512] and peaks[4096] < 4.4 * peaks[1024], peaks


# -- mlx-lm's models -------------------------------------------------------------------------------------------------

SIZES = dict(
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    max_position_embeddings=1000,
)
DELTA = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=3,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
QWEN_MOE = dict(**MOE, decoder_sparse_step=1, shared_expert_intermediate_size=32, mlp_only_layers=[])
MLA = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
KDA = dict(num_heads=4, head_dim=16, short_conv_kernel_size=3, kda_layers=[1, 2, 3], full_attn_layers=[4])
BAILING = dict(**MOE, moe_shared_expert_intermediate_size=32, n_group=2, topk_group=1)
K3 = dict(
    linear_attn_config={**KDA, "gate_lower_bound": -5.0},
    num_experts=4,
    num_experts_per_token=2,
    moe_intermediate_size=32,
    routed_expert_hidden_size=32,
    activation_situ_beta=1.0,
    attn_res_block_size=2,
)
MODELS = {
    "qwen3_5": {**SIZES, **DELTA, "partial_rotary_factor": 0.5},
    "qwen3_5_moe": {**SIZES, **DELTA, **QWEN_MOE, "partial_rotary_factor": 0.5},
    "qwen3_next": {**SIZES, **DELTA, **QWEN_MOE, "partial_rotary_factor": 0.5},
    "kimi_linear": {**SIZES, **MLA, "linear_attn_config": KDA, **MOE, "model_max_length": 1000},
    "kimi_k3": {**SIZES, **MLA, **K3},
    "bailing_moe_v3": {**SIZES, **MLA, **BAILING},
    "olmo_hybrid": {**SIZES, **DELTA, "linear_allow_neg_eigval": True, "tie_word_embeddings": False}
    | {"attention_bias": False},
}
TOKENS = mx.random.randint(0, 96, (2, 70), key=mx.random.key(4))


def adapted(name: str, **changes) -> nn.Module:
    """A tiny model with random adapters, in training mode."""
    model = make_model({"model_type": name, **MODELS[name]}, **changes)
    keys = ["self_attn.qkv_proj", "self_attn.f_a_proj", "self_attn.b_proj"] if name == "kimi_k3" else None
    mlx_lora.attach(model, AdapterConfig(rank=1, scale=2.0, num_layers=-1, keys=keys))
    mx.random.seed(3)
    model.update(tree_map(lambda p: 0.1 * mx.random.normal(p.shape), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model.train()


def forward_and_gradients(model: nn.Module, tokens: mx.array = TOKENS):
    parameters = model.trainable_parameters()

    def objective(parameters):
        model.update(parameters)
        logits = model(tokens)
        return logits.square().mean(), logits

    (_, logits), gradients = mx.value_and_grad(objective)(parameters)
    model.update(parameters)
    return logits, dict(tree_flatten(gradients))


@pytest.fixture
def uncompiled():
    """Without mx.compile: on the CPU it takes seconds a kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def rows_of(model: nn.Module) -> list[fast.Explanation]:
    return [row for row in fast.explain(model) if row.what.startswith("gated delta rule")]


def test_a_layer_keeps_no_state_of_each_token():
    layer = make_model({"model_type": "qwen3_5", **MODELS["qwen3_5"]}).layers[0].linear_attn.train()
    x, peaks = mx.random.normal((1, SEGMENT, 64)), []
    for _ in range(2):
        peaks.append(peak(mx.grad(lambda x: layer(x).square().sum()), x))
        fast.accelerate(layer)
    assert peaks[1] < 0.5 * peaks[0], peaks


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_mlx_lms(name):
    pytest.importorskip(f"mlx_lm.models.{name}")
    model = adapted(name)
    assert len(rows_of(model)) == 3 and all(row.done for row in rows_of(model))
    logits, gradients = forward_and_gradients(model)
    fast.restore(model)
    assert {row.reason for row in rows_of(model)} == {"call accelerate(model)"}
    expected, plain = forward_and_gradients(model)
    assert_close(logits, expected, 1e-5)
    for path, gradient in plain.items():
        assert_close(gradients[path], gradient, 3e-4, path)


def test_every_gated_delta_family_of_mlx_lm_is_tested():
    """A new family shows up here: the classes that call mlx-lm's function, by module."""
    import pkgutil
    from pathlib import Path

    import mlx_lm.models

    folder = Path(mlx_lm.models.__path__[0])
    names = [m.name for m in pkgutil.iter_modules([str(folder)])]
    callers = {n for n in names if "gated_delta_update(" in (folder / f"{n}.py").read_text()} - {"gated_delta"}
    assert callers <= set(MODELS)


def test_evaluation_and_other_models_stay_mlx_lms(monkeypatch):
    from mlx_lm.models import gated_delta as module
    from mlx_lm.models import qwen3_5

    update, ops = module.gated_delta_update, module.gated_delta_ops
    model = adapted("qwen3_5")
    forward_and_gradients(model)
    assert (module.gated_delta_update, module.gated_delta_ops) == (update, ops) == (qwen3_5.gated_delta_update, ops)
    calls = []
    monkeypatch.setattr("mlx_lora.fast.gated_delta.gated_delta", lambda *a: calls.append(a) or gated_delta(*a))
    mx.eval(model.eval()(TOKENS))
    assert not calls
    mx.eval(model.train()(TOKENS))
    assert len(calls) == 3


def test_training_through_a_cache_continues_its_state():
    """In training mode with a cache, as mlx-lm: two parts of a text are one text."""
    from mlx_lm.models.cache import make_prompt_cache

    model = adapted("qwen3_5")
    cache = make_prompt_cache(model)
    parts = [model(TOKENS[:, :40], cache=cache), model(TOKENS[:, 40:], cache=cache)]
    assert_close(mx.concatenate(parts, axis=1), model(TOKENS), 1e-5)


def test_the_reason_why_not_is_told(monkeypatch):
    from mlx_lm.models import qwen3_5

    def reasons(model):
        mlx_lora.attach(model, AdapterConfig(rank=1, num_layers=-1))
        return {row.reason for row in rows_of(model)}

    config = {"model_type": "qwen3_5", **MODELS["qwen3_5"]}
    own = type("Own", (qwen3_5.GatedDeltaNet,), {"__call__": lambda self, *args: self.later(*args)})
    model = make_model(config)
    for layer in model.layers[:3]:
        layer.linear_attn.__class__ = own
    assert reasons(model) == {"its class does not call gated_delta_update in __call__"}

    with monkeypatch.context() as patch:
        patch.setenv("MLX_LORA_FAST", "off")
        assert reasons(make_model(config)) == {"MLX_LORA_FAST=off"}

    with monkeypatch.context() as patch:
        patch.setattr(qwen3_5, "gated_delta_update", lambda *args, **kwargs: None)
        expected = "mlx_lm.models.qwen3_5.gated_delta_update is not the function of mlx_lm.models.gated_delta"
        assert reasons(make_model(config)) == {expected}

    with monkeypatch.context() as patch:
        patch.setattr("mlx_lm.models.gated_delta.gated_delta_ops", lambda q, k, v, decay, beta: None)
        assert reasons(make_model(config)) == {"this version of mlx-lm has another mlx_lm.models.gated_delta"}

    assert reasons(make_model(config)) == {""}
    assert not has_gated_delta(nn.Linear(2, 2))


def test_an_accelerated_layer_can_be_copied_and_unmounted():
    model = adapted("qwen3_5")
    layer = model.layers[0].linear_attn
    x = mx.random.normal((1, 9, 64))
    assert relative(copy.deepcopy(layer)(x), layer(x)) == 0
    mlx_lora.unmount(model)
    assert not any(isinstance(module, ChunkedDelta) for module in model.modules())


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
@pytest.mark.parametrize("grad_checkpoint", [False, True], ids=["plain", "grad_checkpoint"])
def test_training_gives_the_same_losses(name, grad_checkpoint, monkeypatch, uncompiled):
    rows = [np.random.default_rng(i).integers(1, 96, 20 + 9 * i) for i in range(4)]
    rows = Dataset(Example(row, np.ones(len(row), bool)) for row in rows)
    losses = {}
    for setting in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_FAST", setting)
        model = adapted(name)
        assert all(row.done == (setting == "on") for row in rows_of(model))
        config = TrainConfig(iters=4, batch_size=2, steps_per_report=1, grad_checkpoint=grad_checkpoint)
        reports = mlx_lora.train(model, opt.Adam(1e-2), rows, config=config)
        losses[setting] = [r.train_loss for r in reports if hasattr(r, "train_loss")]
    assert len(losses["on"]) == 4
    assert np.allclose(losses["on"], losses["off"], rtol=1e-4), losses
    assert losses["on"][-1] < losses["on"][0]
