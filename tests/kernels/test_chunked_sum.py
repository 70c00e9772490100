"""The loss over logits that never exist at once: the numbers and gradients of the plain one, for several heads."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_lora
from conftest import LLAMA, assert_close, make_model, shake
from mlx_lora import AdapterConfig
from mlx_lora.errors import ConfigError
from mlx_lora.kernels.chunked_sum import chunked_sum
from mlx_lora.training import head
from mlx_lora.training.losses import cross_entropy

SMALL = {k: v for k, v in LLAMA.items() if k not in ("model_type", "num_hidden_layers")} | {"num_hidden_layers": 1}
MODELS = {
    "llama": SMALL,
    "tied": {**SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "gemma2": {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16.0},  # caps its logits
    "cohere": {**SMALL, "layer_norm_eps": 1e-5, "logit_scale": 0.3},  # scales them
    "minicpm": {**SMALL, "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 1, "rope_scaling": None},
    "granite": {
        **SMALL,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "pixtral": {"text_config": {**SMALL, "model_type": "llama"}},  # wraps a model that reads
    "rwkv7": {  # whose body wants a cache
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "norm_eps": 1e-5,
        "head_dim": 32,
        "num_hidden_layers": 1,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
    "mamba2": {  # calls its body otherwise, and ties it
        "num_heads": 4,
        "head_dim": 16,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "state_size": 16,
        "num_hidden_layers": 1,
        "layer_norm_epsilon": 1e-4,
        "conv_kernel": 3,
        "n_groups": 2,
        "use_bias": False,
        "use_conv_bias": False,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
    },
}


def make(name: str, quantize=None):
    model = make_model({"model_type": name, **MODELS[name]}, quantize=quantize)
    if name == "rwkv7":  # starts at zeros, which it divides by
        model.apply(lambda array: array + 0.1 if not array.any().item() else array)
    return model


def gradients(model, tokens, mask, whole, monkeypatch):
    monkeypatch.setattr(head, "WHOLE", 1 << 60 if whole else 0)
    kept = model.trainable_parameters()

    def f(parameters):
        model.update(parameters)
        return cross_entropy.loss(model, tokens, mask)[0]

    value, found = mx.value_and_grad(f)(kept)
    mx.eval(value, found)
    model.update(kept)
    return value, dict(tree_flatten(found))


class Counted:
    def __init__(self, f):
        self.f, self.count = f, 0

    def __call__(self, *args):
        self.count += 1
        return self.f(*args)


@pytest.mark.parametrize("keys", [None, ("lm_head", "v_proj"), ("model.embed_tokens", "q_proj")], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, keys, monkeypatch):
    model = make(name)
    paths = {path for path, _ in model.named_modules()}
    if keys and not all(any(path.endswith(key) for path in paths) for key in keys):
        pytest.skip("has no such layers")
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1, keys=keys))
    shake(model)
    monkeypatch.setattr(head, "PIECE", 0)  # 64 tokens at a time
    tokens, mask = mx.random.randint(0, 96, (3, 70)), mx.random.uniform(shape=(3, 69)) > 0.3
    for mode in (True, False):  # in evaluation mode autograd goes through the pieces
        model.train(mode)
        with monkeypatch.context() as patch:
            pieces = Counted(chunked_sum)
            patch.setattr(head, "chunked_sum", pieces)
            value, found = gradients(model, tokens, mask, False, monkeypatch)
        assert pieces.count == 1
        expected, plain = gradients(model, tokens, mask, True, monkeypatch)
        assert_close(value, expected, 1e-6)
        assert set(found) == set(plain)
        for key, array in plain.items():
            assert_close(found[key], array, 2e-5, key)


def test_quantized_head(monkeypatch):
    model = make("llama", {"group_size": 32, "bits": 4})
    mlx_lora.attach(model, AdapterConfig(rank=4, num_layers=-1))
    monkeypatch.setattr(head, "PIECE", 0)
    tokens, mask = mx.random.randint(0, 96, (2, 70)), mx.ones((2, 69), mx.bool_)
    value, found = gradients(model.train(), tokens, mask, False, monkeypatch)
    expected, plain = gradients(model, tokens, mask, True, monkeypatch)
    assert_close(value, expected, 1e-6)
    assert_close(found["model.layers.0.mlp.up_proj.lora_b"], plain["model.layers.0.mlp.up_proj.lora_b"], 2e-5)


def test_a_body_with_an_array_of_its_own(monkeypatch):
    model = make("llama")
    model.model.gamma = mx.ones(3)
    model.unfreeze()
    monkeypatch.setattr(head, "PIECE", 0)
    tokens, mask = mx.random.randint(0, 96, (2, 70)), mx.ones((2, 69), mx.bool_)
    value, found = gradients(model.train(), tokens, mask, False, monkeypatch)
    expected, plain = gradients(model, tokens, mask, True, monkeypatch)
    assert_close(value, expected, 1e-6)
    assert_close(found["lm_head.weight"], plain["lm_head.weight"], 2e-5)


@pytest.mark.parametrize(
    ("parameter", "counts"),
    [
        ("lm_head.weight", True),
        ("language_model.model.embed_tokens.lora_a", True),
        ("language_model.model.norm.weight", True),
        ("language_model.model.layers.3.mlp.up_proj.lora_a", False),
        ("language_model.model.language_model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_what_is_of_the_head(parameter, counts):
    assert head._of_head(parameter, ["language_model", "model"]) == counts


def test_small_batches_and_foreign_models_are_left_whole(monkeypatch):
    model = make("llama")
    arguments = (
        mx.zeros((1, 4), mx.int32),
        mx.zeros((1, 4), mx.int32),
        mx.ones((1, 4), mx.bool_),
        cross_entropy.token_losses,
    )
    assert head.loss_in_chunks(model, *arguments) is None
    wide = make_model(LLAMA)
    monkeypatch.setattr(head, "WHOLE", 0)
    assert head.loss_in_chunks(wide, *arguments) is not None
    wide.__class__ = type("Own", (type(wide),), {})
    assert head.loss_in_chunks(wide, *arguments) is None


def test_uncounted_tokens_do_not_reach_the_sum():
    hidden = mx.array([[1.0], [np.inf], [2.0]])
    mask, targets = mx.array([True, False, True]), mx.zeros(3, mx.int32)

    def total(h, w, how):
        return chunked_sum(lambda p, h, t: (h @ p["w"]).squeeze(-1), {"w": w}, h, targets, mask, 2, how)

    w = mx.array([[3.0]])
    for how in (True, False):
        assert total(hidden, w, how).item() == 9
    d_hidden, d_w = mx.grad(lambda h, w: 2 * total(h, w, True), argnums=(0, 1))(mx.array([[1.0], [5.0], [2.0]]), w)
    assert d_hidden.tolist() == [[6], [0], [6]] and d_w.tolist() == [[6]]


def test_memory():
    """Of the loss of many tokens over a wide vocabulary, forward and backward."""
    D, V, N = 8, 4096, 2048
    w, hidden, targets = 0.1 * mx.random.normal((V, D)), mx.random.normal((N, D)), mx.zeros(N, mx.int32)
    mask = mx.ones(N, mx.bool_)
    mx.eval(w, hidden, targets, mask)

    def peak(rows):
        f = mx.grad(
            lambda h: chunked_sum(
                lambda _, h, t: cross_entropy.token_losses(h @ w.T, t), {}, h, targets, mask, rows, True
            )
        )
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(f(hidden))
        return mx.get_peak_memory() - before

    assert peak(64) < 0.3 * peak(N)


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_of_a_trained_head(compiled):
    """The gradients of the head are added up piece by piece, and not all kept until the end."""
    D, V, N = 256, 4096, 2048
    w, hidden, targets = 0.1 * mx.random.normal((V, D)), mx.random.normal((N, D)), mx.zeros(N, mx.int32)
    mask = mx.ones(N, mx.bool_)
    mx.eval(w, hidden, targets, mask)

    def loss_of(w, hidden):
        losses = lambda p, h, t: cross_entropy.token_losses(h @ p["w"].T, t)  # noqa: E731
        return chunked_sum(losses, {"w": w}, hidden, targets, mask, 64, True)

    step = mx.grad(loss_of, argnums=(0, 1))
    step = mx.compile(step) if compiled else step
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(w, hidden))
    assert mx.get_peak_memory() - before < 12 * w.nbytes, "32 pieces"


def test_no_second_derivative():
    """A gradient that was made in the forward pass would have none, silently."""

    def total(h):
        losses = lambda _, h, t: (h**3).sum(axis=-1)  # noqa: E731
        return chunked_sum(losses, {}, h, mx.zeros(4, mx.int32), mx.ones(4, mx.bool_), 2, True)

    h = mx.ones((4, 3))
    assert mx.array_equal(mx.grad(total)(h), 3 * h)
    with pytest.raises(ConfigError, match="second derivative"):
        mx.grad(lambda h: mx.grad(total)(h).sum())(h)
