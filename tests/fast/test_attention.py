"""Attention in blocks of queries: against MLX's in float64, in mlx-lm's models, packed and checkpointed; its memory."""

from __future__ import annotations

import gc
import importlib

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, assert_close, make_model, shake
from mlx_lora import AdapterConfig, TrainConfig, fast
from mlx_lora.data import Dataset, Example
from mlx_lora.fast import attention as layers
from mlx_lora.fast.block_attention import attention, blocks_of, share_seen
from mlx_lora.training.packed_cache import packed_cache
from mlx_lora.training.recompute import recomputed_layers

# -- the operation ---------------------------------------------------------------------------------------------------


def band(length: int, window: int) -> np.ndarray:
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < window)


def rows_of(length: int) -> np.ndarray:
    """[2, 1, L, L]: two rows of tokens packed in each sequence."""
    segments = np.arange(length) >= np.array([[length // 3], [length // 2]])
    return ((segments[:, :, None] == segments[:, None]) & band(length, length))[:, None]


def left_padded(length: int) -> np.ndarray:
    """[2, 1, L, L]: the first queries of one row see no key, and average all values."""
    mask = np.stack([band(length, length)] * 2)[:, None]
    mask[1, :, :, : length // 4] = False
    return mask


MASKS = {
    "none": lambda n: None,
    "causal": lambda n: "causal",
    "causal array": lambda n: band(n, n),
    "window": lambda n: band(n, max(n // 3, 1)),
    "chunks": lambda n: band(n, n) & (np.arange(n)[:, None] // 9 == np.arange(n) // 9),
    "packed": rows_of,
    "left padded": left_padded,
    "each head": lambda n: np.random.default_rng(5).random((1, 4, n, n)) < 0.6,
    "keys": lambda n: np.random.default_rng(5).random((2, 1, 1, n)) < 0.8,
}


def drawn(length: int, keys: int | None = None) -> list[np.ndarray]:
    """q, k, v, sinks and a cotangent, with two queries for each key head and values of another size than keys."""
    draw, keys = np.random.default_rng(0), keys or length
    shapes = (2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 6), (4,), (2, 4, length, 6)
    return [draw.standard_normal(shape) for shape in shapes]


def with_gradients(function, arrays, dtype=mx.float32, sinks: bool = False) -> list[mx.array]:
    *inputs, sink, seed = (mx.array(x).astype(dtype) for x in arrays)
    inputs += [sink] * sinks
    with mx.stream(mx.cpu):  # float64
        results, gradients = mx.vjp(lambda *inputs: function(*inputs), inputs, [seed])
        mx.eval(results, gradients)
    return [*results, *gradients]


def plain(mask):
    def function(q, k, v, sinks=None):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)

    return function


def in_blocks(mask, size: int = 16, **options):
    def function(q, k, v, sinks=None):
        return attention(q, k, v, 0.3, mask, sinks, blocks_of(q.shape[2], k.shape[2], mask, size, **options))

    return function


def as_mlx(mask):
    return mx.array(mask) if isinstance(mask, np.ndarray) else mask


def assert_same(got, expected, tolerance: float) -> None:
    for name, one, other in zip(("y", "q", "k", "v", "sinks"), got, expected, strict=False):
        assert_close(one, other, tolerance, name)
    assert len(got) == len(expected)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("length", [7, 16, 17, 50])
@pytest.mark.parametrize("mask", MASKS)
def test_results_and_gradients_are_mlxs(mask, length, sinks):
    mask, arrays = as_mlx(MASKS[mask](length)), drawn(length)
    expected = with_gradients(plain(mask), arrays, mx.float64, sinks)
    assert_same(with_gradients(in_blocks(mask), arrays, mx.float64, sinks), expected, 1e-6)  # compared in float32
    assert_same(with_gradients(in_blocks(mask), arrays, mx.float32, sinks), expected, 5e-6)


@pytest.mark.parametrize("mask", ["causal", "none"])
def test_more_keys_than_queries(mask):
    mask, arrays = as_mlx(MASKS[mask](20)), drawn(20, 53)
    assert_same(with_gradients(in_blocks(mask), arrays), with_gradients(plain(mask), arrays, mx.float64), 5e-6)


@pytest.mark.parametrize("mask", ["causal", "window", "packed"])
@pytest.mark.parametrize("dtype, tolerance", [(mx.bfloat16, 2e-2), (mx.float16, 3e-3)])
def test_half_precision(mask, dtype, tolerance):
    """As close to float64 as MLX's own, within a factor of three, and in the same dtype."""
    mask, arrays = as_mlx(MASKS[mask](70)), drawn(70)
    arrays = [np.array(mx.array(x).astype(dtype).astype(mx.float32)) for x in arrays]
    expected = with_gradients(plain(mask), arrays, mx.float64, True)
    got, mlxs = (with_gradients(f(mask), arrays, dtype, True) for f in (in_blocks, plain))
    assert_same(got, expected, tolerance)
    for one, other, exact in zip(got, mlxs, expected, strict=True):
        errors = [float(mx.abs(x.astype(mx.float32) - exact.astype(mx.float32)).max()) for x in (one, other)]
        assert one.dtype == other.dtype == dtype and errors[0] <= 3 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("mask", ["causal", "window", "packed", "left padded"])
def test_it_can_be_compiled_and_checkpointed_with_a_mask_that_is_an_argument(mask):
    mask, (*inputs, _, seed) = as_mlx(MASKS[mask](50)), map(mx.array, drawn(50))
    inputs, seed = [x.astype(mx.float32) for x in inputs], seed.astype(mx.float32)
    masks = [mask] if isinstance(mask, mx.array) else []

    def objective(function, wrap=lambda f: f):
        def loss(q, k, v, *masks):
            return (wrap(lambda *a: function(*(a[3:] or [mask]))(*a[:3]))(q, k, v, *masks) * seed).sum()

        return mx.value_and_grad(loss, argnums=(0, 1, 2))

    value, gradients = objective(plain)(*inputs, *masks)
    for wrap in (lambda f: f, mx.checkpoint):
        again, others = mx.compile(objective(in_blocks, wrap))(*inputs, *masks)
        assert_close(again, value, 5e-6)
        assert_same(others, gradients, 5e-6)


def test_keys_that_the_mask_empties_are_left_out():
    def share(mask, **options):
        return share_seen(blocks_of(96, 96, as_mlx(MASKS[mask](96)), 16, **options), 96)

    assert share("none") == share("each head") == 1
    assert share("causal") == share("causal array") == pytest.approx(7 / 12)
    assert share("window") < 0.42 and share("chunks") < 0.3 and share("packed") < share("causal")
    assert [b.mask is None for b in blocks_of(96, 96, mx.array(band(96, 40)), 16)] == [False] * 6  # no [L, L] is kept
    assert share("left padded") > share("causal")  # a query that sees nothing averages the values of all keys

    def traced(mask):
        assert share_seen(blocks_of(96, 96, mask, 16), 96) == 1
        assert share_seen(blocks_of(96, 96, mask, 16, causal=True), 96) == pytest.approx(7 / 12)
        return mask

    mx.compile(traced)(mx.array(band(96, 96)))


# -- mlx-lm's models -------------------------------------------------------------------------------------------------

GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 20}
GEMMA3 |= {"sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
OSS = {**LLAMA, "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 20, "num_local_experts": 2}
OSS |= {"num_experts_per_tok": 1, "num_hidden_layers": 2}
QWEN3_5 = {**LLAMA, "model_type": "qwen3_5", "num_hidden_layers": 4, "head_dim": 16, "partial_rotary_factor": 0.5}
QWEN3_5 |= dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
QWEN3_5 |= dict(linear_conv_kernel_dim=3)
PLAMO2 = {**LLAMA, "model_type": "plamo2", "num_hidden_layers": 2, "mamba_step": 2, "hidden_size_per_head": 16}
PLAMO2 |= dict(mamba_num_heads=2, mamba_d_state=4, attention_window_size=2048)
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=12)
DEEPSEEK = {**LLAMA, **LATENT, "model_type": "deepseek_v3", "num_hidden_layers": 2, "first_k_dense_replace": 2}
KDA = dict(num_heads=4, head_dim=16, short_conv_kernel_size=3, kda_layers=[1, 2, 3], full_attn_layers=[4])
KIMI = {**LLAMA, **LATENT, "model_type": "kimi_linear", "num_hidden_layers": 4, "linear_attn_config": KDA}
KIMI |= dict(head_dim=16, model_max_length=1000, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
CONFIGS = {"llama": LLAMA, "gemma3_text": GEMMA3, "gpt_oss": OSS, "qwen3_5": QWEN3_5, "plamo2": PLAMO2}
CONFIGS |= {"deepseek_v3": DEEPSEEK, "kimi_linear": KIMI}


@pytest.fixture
def small(monkeypatch):
    """Blocks from 24 tokens on."""
    monkeypatch.setattr(layers, "_ON_CPU", (24, 16))
    monkeypatch.setattr(layers, "_ON_GPU", (24, 16))


@pytest.fixture
def calls(monkeypatch) -> list:
    """The blocks of each call of the operation."""
    found = []

    def counted(*arguments):
        found.append(arguments[-1])
        return attention(*arguments)

    monkeypatch.setattr(layers, "attention", counted)
    return found


def adapted(name: str, **changes) -> nn.Module:
    model = make_model(CONFIGS[name], **changes)
    mlx_lora.attach(model, AdapterConfig(rank=2, scale=2.0, num_layers=-1))
    shake(model)
    return model.train()


def explained(model: nn.Module) -> list[fast.Explanation]:
    return [row for row in fast.explain(model) if row.what.startswith("attention in blocks")]


def measured(model: nn.Module, tokens: mx.array, **options) -> tuple[mx.array, dict[str, mx.array]]:
    parameters = model.trainable_parameters()

    def objective(parameters):
        model.update(parameters)
        return nn.losses.cross_entropy(model(tokens[:, :-1], **options), tokens[:, 1:], reduction="sum")

    loss, gradients = mx.value_and_grad(objective)(parameters)
    mx.eval(loss, gradients)
    model.update(parameters)
    return loss, dict(tree_flatten(gradients))


def assert_same_training(got, expected, tolerance: float = 1e-5) -> None:
    assert_close(got[0], expected[0], tolerance, "loss")
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(got[1][name], gradient, tolerance, name)


TOKENS = mx.random.randint(1, 96, (2, 71), key=mx.random.key(4))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "grad_checkpoint"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_have_the_same_loss_and_gradients(name, checkpointed, small, calls):
    model = adapted(name)
    assert explained(model) and all(row.done for row in explained(model)), explained(model)
    if checkpointed:
        with recomputed_layers(model):
            got = measured(model, TOKENS)
    else:
        got = measured(model, TOKENS)
    used = len(calls)
    assert used >= 1 + checkpointed
    fast.restore(model)
    assert not any(row.done for row in explained(model))
    expected = measured(model, TOKENS)
    assert len(calls) == used
    assert_same_training(got, expected, 5e-5 if name == "gpt_oss" else 2e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_layers_with_a_window_leave_out_keys_when_checkpointed(compiled, small, calls):
    """The mask is known in the recomputation as well, where it would be an argument otherwise."""
    model = adapted("gemma3_text")
    parameters = model.trainable_parameters()

    def objective(parameters):
        model.update(parameters)
        return model(TOKENS).square().mean()

    with recomputed_layers(model):
        step = mx.value_and_grad(objective)
        (mx.compile(step) if compiled else step)(parameters)  # traced, not computed
    model.update(parameters)
    shares = [share_seen(blocks, 71) for blocks in calls]
    assert len(shares) == 6 and sum(share < 0.5 for share in shares) == 4, shares


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "grad_checkpoint"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_packed_rows(name, checkpointed, small, calls):
    model = adapted(name)
    segments = mx.array((np.arange(70) >= 30).astype(np.int32) + (np.arange(70) >= 55))[None]
    segments = mx.broadcast_to(segments, (2, 70))

    def step():
        return measured(model, TOKENS, cache=packed_cache(model, segments))

    if checkpointed:
        with recomputed_layers(model):
            got = step()
    else:
        got = step()
    assert calls
    fast.restore(model)
    assert_same_training(got, step(), 5e-5)


def test_what_is_not_done_in_blocks(small, calls):
    """Generating, few queries, masks of numbers, whole attention and quantized caches stay with MLX's function."""
    q, k, v, _, _ = (mx.array(x).astype(mx.float32) for x in drawn(40))
    numbers = mx.random.normal((40, 40))
    for mask in (numbers, None, mx.ones((40, 40), mx.bool_)):
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        assert_close(layers._of_mlx_lm(q, k, v, None, 0.3, mask), expected, 1e-6)
        gradient = mx.grad(lambda m: layers._of_mlx_lm(q, k, v, None, 0.3, m).square().sum())
        if mask is numbers:
            assert mx.abs(gradient(mask)).max() > 0
    short = q[:, :, :20], k[:, :, :20], v[:, :, :20]
    expected = mx.fast.scaled_dot_product_attention(*short, scale=0.3, mask="causal")
    assert_close(layers._of_mlx_lm(*short, None, 0.3, "causal"), expected, 1e-6)
    model = adapted("llama")
    model.eval()
    mx.eval(model(TOKENS))
    assert not calls


@pytest.mark.parametrize("dtype, length, left", [("bfloat16", 128, 1), ("bfloat16", 130, 0), ("float32", 128, 0)])
def test_cudnns_backward_pass_is_left_to_mlx(dtype, length, left, small, calls, monkeypatch):
    monkeypatch.setattr(layers, "is_cpu", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    q, k, *_ = (mx.array(x).astype(getattr(mx, dtype)) for x in drawn(length))
    layers._of_mlx_lm(q, k, k, None, 0.3, "causal")
    assert len(calls) == 1 - left


def test_another_function_of_the_name_is_left_alone(monkeypatch):
    module = importlib.import_module("mlx_lm.models.llama")
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda *args, **kwargs: None)
    model = make_model()
    fast.accelerate(model)
    assert {(row.done, "does not call" in row.reason) for row in explained(model)} == {(False, True)}


def test_fast_off_leaves_attention_as_it_is(monkeypatch):
    monkeypatch.setenv("MLX_LORA_FAST", "off")
    assert {(row.done, row.reason) for row in explained(adapted("llama"))} == {(False, "MLX_LORA_FAST=off")}


@pytest.mark.parametrize(
    "options", [{}, {"grad_checkpoint": True}, {"pack": True}], ids=["", "grad_checkpoint", "pack"]
)
def test_training_gives_the_same_losses(options, small, monkeypatch):
    rows = [np.random.default_rng(i).integers(1, 96, 30 + 9 * i) for i in range(6)]
    rows = Dataset(Example(row, np.ones(len(row), bool)) for row in rows)
    losses = {}
    for setting in ("on", "off"):
        monkeypatch.setenv("MLX_LORA_FAST", setting)
        config = TrainConfig(iters=4, batch_size=2, steps_per_report=1, **options)
        reports = mlx_lora.train(adapted("llama"), opt.Adam(1e-2), rows, config=config)
        losses[setting] = [r.train_loss for r in reports if hasattr(r, "train_loss")]
    assert len(losses["on"]) == 4 and losses["on"][-1] < losses["on"][0]
    assert np.allclose(losses["on"], losses["off"], rtol=1e-4), losses


def peak(model: nn.Module, length: int, compiled: bool) -> int:
    """Bytes that a training step needs above what is there before it."""
    tokens = mx.random.randint(1, 96, (1, length + 1), key=mx.random.key(0))
    parameters = model.trainable_parameters()

    def objective(parameters):
        model.update(parameters)
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    step = mx.compile(mx.value_and_grad(objective)) if compiled else mx.value_and_grad(objective)
    mx.eval(tokens)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(parameters))
    model.update(parameters)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    "name, compiled", [("qwen3_5", False), ("kimi_linear", False), ("llama", False), ("llama", True)]
)
def test_memory_of_a_whole_model_grows_at_most_linearly_with_the_length(name, compiled):
    model = adapted(name, **({"num_hidden_layers": 2} if name == "llama" else {}))
    peaks = {length: peak(model, length, compiled) for length in (512, 2048)}
    assert peaks[2048] <= 4 * 1.05 * peaks[512], peaks
