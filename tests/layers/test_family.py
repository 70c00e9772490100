"""Every method and setting over every kind of base: attach, train, save, load, unmount, mount, fuse; and LoRA+."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, relative, shake_layer
from mlx_lora import (
    AdapterConfig,
    OptimizerConfig,
    TrainConfig,
    as_lora,
    attach,
    build_optimizer,
    evaluate,
    extract,
    fuse,
    load,
    load_adapter,
    mount,
    quantize,
    save_adapter,
    train,
    unmount,
)
from mlx_lora.base.modules import dense_weight
from mlx_lora.errors import AdapterError, ConfigError, FormatError
from mlx_lora.fast import accelerate
from mlx_lora.layers import METHODS
from mlx_lora.model.attach import adapters_on
from mlx_lora.training import MasterWeights

BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True}
TIED = {**BIASED, "tie_word_embeddings": True}
SETTINGS = {
    "lora": dict(method="lora"),
    "rslora": dict(method="lora", alpha=8, rslora=True),
    "dora": dict(method="dora"),
    "vera": dict(method="vera", rank=16),
    "vera, seed only": dict(method="vera", rank=16, save_projection=False, projection_prng_key=3, keys=["q_proj"]),
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3, "mlp.*": 7}, keys=["q_proj", "up_proj"]),
    "some layers": dict(layers_to_transform=[0, 2], num_layers=None, keys=["q_proj"]),
    "modules_to_save": dict(modules_to_save=["norm", "lm_head", "layers.1.mlp"], keys=["q_proj"]),
    "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only", keys=["q_proj"]),
    "lora_bias": dict(lora_bias=True),
    "tokens": dict(trainable_token_indices={"embed_tokens": [1, 60, 90]}),
    "tokens alone": dict(trainable_token_indices={"embed_tokens": [5]}, keys=(), rank=None, num_layers=None),
    "modules alone": dict(modules_to_save=["up_proj"], keys=(), rank=None, num_layers=None),
    "embedding": dict(keys=["model.embed_tokens", "lm_head"]),
    "tied: head": dict(keys=["lm_head", "q_proj"]),
    "tied: head, dora": dict(method="dora", keys=["lm_head"]),
    "tied: head, vera": dict(method="vera", rank=16, keys=["lm_head", "q_proj"]),
    "tied: head and embedding": dict(keys=["lm_head", "embed_tokens"], embedding_side="input"),
    "tied: head saved": dict(keys=["q_proj"], modules_to_save=["lm_head"]),
    "tied: both saved": dict(
        keys=(), rank=None, num_layers=None, modules_to_save=["lm_head", "embed_tokens"], embedding_side="input"
    ),
    "tied: tokens of both": dict(
        keys=(), rank=None, num_layers=None, trainable_token_indices={"embed_tokens": [5], "lm_head": [7, 90]}
    ),
    "tied: embedding": dict(keys=["embed_tokens"], embedding_side="input"),
    "tokens of a head": dict(keys=["q_proj"], trainable_token_indices={"lm_head": [7, 90]}),
    "ia3": dict(method="ia3", rank=None, keys=["k_proj", "down_proj", "lm_head"]),
    "ia3, inputs": dict(method="ia3", rank=None, keys=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "embedding, input": dict(keys=["model.embed_tokens"], embedding_side="input"),
    "embedding saved, input": dict(keys=["v_proj"], modules_to_save=["embed_tokens"], embedding_side="input"),
}  # fmt: skip
BASES = {"dense": None, "4-bit": dict(group_size=32, bits=4), "3-bit": dict(group_size=32, bits=3), "nf4": "nf4"}


def make(base: str, config: dict = BIASED):
    model = make_model(config, quantize=BASES[base] if base != "nf4" else None)
    for module in model.modules():
        if "bias" in module:
            module.bias = 0.1 * mx.random.normal(module.bias.shape)
    if base == "nf4":
        quantize(model, "nf4", double_quant=True)
    accelerate(model)
    mx.eval(model.parameters())
    return model


def move(model, size=0.05) -> None:
    """Change everything that is trainable."""
    mx.random.seed(4)
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(k, v + size * mx.random.normal(v.shape).astype(v.dtype)) for k, v in trained]))


@pytest.mark.alternate
@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", list(SETTINGS))
def test_attach_save_mount_and_fuse(name, base, tokens, tmp_path):
    model = make(base, TIED if name.startswith(("tokens alone", "tied")) else BIASED)
    before = model(tokens)
    attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **SETTINGS[name]}))
    assert_close(model(tokens), before, 2e-6, "attach is not the identity")
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}

    gradients = mx.grad(lambda p: (model.update(p), model(tokens).square().sum())[1])(model.trainable_parameters())
    move(model)  # with B = 0 the gradient of A is 0
    gradients = dict(tree_flatten(mx.grad(
        lambda p: (model.update(p), model(tokens).square().sum())[1])(model.trainable_parameters())))  # fmt: skip
    for path, gradient in gradients.items():
        assert mx.abs(gradient).max().item() > 0, f"{path} gets no gradient"

    live, adapter = model(tokens), extract(model).check()
    assert relative(live, before) > 1e-3
    again = load_adapter(save_adapter(adapter, tmp_path / "a"))
    folded = name == "patterns"  # mlx-lm has one scale: others are multiplied into B, which rounds
    if folded:
        same = [(c.rank_of(p), c.scale_of(p)) for c in (again.config, adapter.config) for p in adapter.modules]
        assert same[: len(adapter.modules)] == same[len(adapter.modules) :]
    else:  # mlx-lm's folder lists keys
        assert replace(again.config, keys=adapter.config.keys) == adapter.config
    assert set(again.weights) == set(adapter.weights)
    for key, array in adapter.weights.items():
        assert folded or mx.array_equal(again.weights[key], array).item(), key
    unmount(model)
    assert mx.array_equal(model(tokens), before).item(), "unmount does not restore the base"
    mount(model, again)
    assert_close(model(tokens), live, 1e-6)
    assert {n for n, _ in tree_flatten(model.trainable_parameters())} == trained
    assert folded or replace(extract(model).config, keys=adapter.config.keys) == adapter.config
    fuse(model, dtype="float32")
    assert_close(model(tokens), live, 3e-5, "fused")
    assert not adapters_on(model)


def test_mlx_lm_refuses_folders_with_settings_it_does_not_have(tmp_path, tokens):
    from mlx_lm.tuner.utils import load_adapters

    for name, settings in SETTINGS.items():
        config = TIED if name.startswith("tied") else BIASED
        model = make("dense", config)
        attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **settings}))
        move(model)
        live = model(tokens)
        folder = save_adapter(extract(model), tmp_path / name.replace(",", "").replace(":", ""))
        theirs = make("dense", config)
        own = "mlx_lora" in json.loads((folder / "adapter_config.json").read_text())
        assert own == (name not in ("lora", "rslora", "dora", "patterns", "some layers", "embedding")), name
        if own:
            with pytest.raises((AttributeError, TypeError, KeyError, ValueError)):
                load_adapters(theirs, str(folder))
        else:
            assert_close(load_adapters(theirs, str(folder))(tokens), live, 2e-5, name)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["mlx_lora"]["colour"] = "blue"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="colour"):
        load_adapter(folder)


# -- embeddings adapted on the input side, tied models ----------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(keys=["model.embed_tokens"], embedding_side="input"),
    dict(keys=[], modules_to_save=["embed_tokens"], embedding_side="input", rank=None),
], ids=["lora", "modules_to_save"])  # fmt: skip
def test_input_only_leaves_a_tied_head_alone(settings, tokens):
    model = make("dense", TIED)
    x = mx.random.normal((3, 64))
    head = model.model.embed_tokens.as_linear(x)
    attach(model, AdapterConfig(**{"rank": 4, **settings}))
    move(model)
    assert mx.array_equal(model.model.embed_tokens.as_linear(x), head).item()
    unmount(model)
    assert mx.array_equal(model.model.embed_tokens.as_linear(x), head).item()
    both = AdapterConfig(**{"rank": 4, **settings, "embedding_side": "both"})
    attach(model, both)
    move(model)
    assert relative(model.model.embed_tokens.as_linear(x), head) > 1e-3


def test_trained_tokens_are_rows_on_both_sides(tokens):
    model = make("dense", TIED)
    attach(model, AdapterConfig(keys=(), trainable_token_indices={"embed_tokens": [3, 90]}))
    move(model)
    layer = model.model.embed_tokens
    expected = np.array(layer.base.weight)
    expected[[3, 90]] = np.array(layer.trainable_tokens)
    assert_close(layer(mx.arange(96)), expected, 0)
    x = mx.random.normal((2, 64))
    assert_close(layer.as_linear(x), np.array(x) @ expected.T, 1e-6)


@pytest.mark.parametrize(("config", "said"), [
    (dict(trainable_token_indices={"embed_tokens": [96]}), "beyond the vocabulary"),
    (dict(trainable_token_indices={"embed": [1]}), "no module 'embed'"),
    (dict(keys=["lm_head"], modules_to_save=["embed_tokens"]), "are one matrix"),
    (dict(keys=["lm_head"], trainable_token_indices={"embed_tokens": [5]}), "act on the tied output head"),
    (dict(keys=["embed_tokens"], modules_to_save=["embed_tokens"]), "adapted and trained in full"),
    (dict(method="vera", keys=["embed_tokens"]), "vera does not adapt embedding"),
    (dict(lora_bias=True, keys=["embed_tokens"]), "lora_bias does not adapt embedding"),
    (dict(layers_to_transform=[7]), "layers_to_transform: 7"),
    (dict(target_parameters=["mlp.experts.gate_up_proj"]), "matches no module"),
])  # fmt: skip
def test_what_cannot_be_attached(config, said):
    model = make("dense", TIED)
    with pytest.raises(AdapterError, match=said):
        attach(model, AdapterConfig(**config))
    assert not adapters_on(model)


@pytest.mark.parametrize(("config", "said"), [
    (dict(method="vera", scale=2.0), "scale cannot be used with vera"),
    (dict(method="vera", alpha=8), "alpha cannot be used with vera"),
    (dict(method="dora", lora_bias=True), "lora_bias is for lora"),
    (dict(method="dora", init="pissa"), "init 'pissa' is for lora"),
    (dict(init="pisa"), "init must be one of"),
    (dict(eva_rho=3.0), "eva_rho is for init eva"),
    (dict(bias="some"), "bias must be one of"),
    (dict(method="full", bias="all"), "bias cannot be used with full"),
    (dict(trainable_token_indices={"e": [1, 1]}), "names a token twice"),
    (dict(layers_to_transform=[-1]), "indices of layers"),
    (dict(keys=[3]), "names of modules"),
])  # fmt: skip
def test_settings_that_contradict(config, said):
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**config)


# -- experts -------------------------------------------------------------------------------------------------------


def test_target_parameters_name_experts_as_peft_does(tokens):
    model = make("dense", QWEN3_MOE)
    targets = ["mlp.experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    paths = attach(model, AdapterConfig(rank=4, num_layers=-1, target_parameters=targets))
    names = {"switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj", "gate"}
    assert set(paths) == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in names}


@pytest.mark.parametrize("base", ["dense", "4-bit"])
def test_vera_on_experts(base, tokens):
    model = make(base, QWEN3_MOE)
    attach(model, AdapterConfig(method="vera", rank=8, num_layers=-1))
    move(model)
    live, adapter = model(tokens), extract(model)
    assert adapter.weights["model.layers.0.mlp.switch_mlp.up_proj.vera_lambda_b"].shape == (4, 64)
    lora = as_lora(model, adapter)
    mount(model, lora)
    assert_close(model(tokens), live, 2e-5)
    fuse(model, dtype="float32")
    assert_close(model(tokens), live, 2e-5)


# -- VeRA ----------------------------------------------------------------------------------------------------------


def test_vera_as_lora(tokens):
    model = make("4-bit")
    attach(model, AdapterConfig(method="vera", rank=16, keys=["q_proj", "down_proj"], num_layers=-1))
    move(model)
    live, adapter = model(tokens), extract(model)
    lora = as_lora(model, adapter)
    assert lora.config.method == "lora" and lora.config.scale == 1.0 and not lora.problems()
    mount(model, lora)
    assert_close(model(tokens), live, 1e-5)
    with pytest.raises(AdapterError, match="not vera"):
        as_lora(model, lora)


# -- LoRA+ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adafactor", "muon", "lion"])
def test_lora_plus_groups(optimizer):
    model = make("dense")
    attach(
        model,
        AdapterConfig(method="dora", rank=4, keys=["q_proj", "embed_tokens"], bias="all", modules_to_save=["norm"]),
    )
    config = OptimizerConfig(optimizer=optimizer, learning_rate=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-6)
    built = MasterWeights(build_optimizer(config, 10, model))
    parameters = dict(tree_flatten(model.trainable_parameters()))
    built.init(parameters)
    rates = {}
    for _ in range(2):
        parameters = built.apply_gradients({k: mx.ones_like(v) for k, v in parameters.items()}, parameters)
    for member, share in built._shares(parameters):
        rates |= dict.fromkeys(share, member.learning_rate.item())
    for path, rate in rates.items():
        leaf, embedding = path.rpartition(".")[2], path.startswith("model.embed_tokens")
        expected = 1e-3 if leaf == "lora_a" else 16e-3
        expected = 5e-6 if embedding and leaf.startswith("lora_") else expected
        assert rate == pytest.approx(expected), path


def test_lora_plus_weight_decay_and_schedule():
    model = make("dense")
    attach(model, AdapterConfig(rank=4, keys=["q_proj"], bias="lora_only"))
    config = OptimizerConfig(
        optimizer="adamw", learning_rate=1e-3, loraplus_lr_ratio=4, loraplus_weight_decay=0.1, warmup=3
    )
    members = build_optimizer(config, 10, model).optimizers
    assert [m.weight_decay for m in members] == [0.1, 0.1, 0.1, 0.0]
    plain = OptimizerConfig(optimizer="adamw", learning_rate=1e-3, loraplus_lr_ratio=4)
    assert [m.weight_decay for m in build_optimizer(plain, 10, model).optimizers] == [0.0] * 4
    for m in members:
        m.init({"x": mx.zeros(2)})
        for _ in range(3):
            m.apply_gradients({"x": mx.ones(2)}, {"x": mx.zeros(2)})
    rates = [m.learning_rate.item() for m in members]
    assert rates[2] == pytest.approx(4 * rates[0]) and rates[1] == pytest.approx(1e-3 * rates[0])


@pytest.mark.parametrize(("settings", "said"), [
    (dict(loraplus_lr_embedding=1e-5), "needs loraplus_lr_ratio"),
    (dict(loraplus_lr_ratio=-1), "positive"),
    (dict(loraplus_lr_ratio=2, loraplus_weight_decay=0.1), "no weight decay"),
    (dict(loraplus_lr_ratio=2, optimizer="adamw", optimizer_config={"adamw": {"weight_decay": 1}}), "set loraplus_w"),
    (dict(loraplus_lr_ratio=2, optimizer="adafactor", optimizer_config={"adafactor": {"relative_step": True}}), "LoRA"),
])  # fmt: skip
def test_lora_plus_contradictions(settings, said):
    with pytest.raises(ConfigError, match=said):
        build_optimizer(OptimizerConfig(**settings), 10, make("dense"))
    with pytest.raises(ConfigError, match="the model"):
        build_optimizer(OptimizerConfig(loraplus_lr_ratio=2), 10)


# -- learning ------------------------------------------------------------------------------------------------------

LEARNS = {
    "lora": {}, "dora": dict(method="dora"), "vera": dict(method="vera", rank=64, scale=None),
    "lora_bias": dict(lora_bias=True), "bias": dict(modules_to_save=["norm"]), "pissa": dict(init="pissa"),
    "olora": dict(init="olora"), "orthogonal": dict(init="orthogonal"), "eva": dict(init="eva", init_batches=4),
    "lora_ga": dict(init="lora_ga", init_batches=2),
    "tokens": dict(trainable_token_indices={"embed_tokens": [1, 400, 401]}),
    "full": dict(method="full", rank=None, scale=None),
}  # fmt: skip


@pytest.mark.alternate
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", list(LEARNS))
def test_twenty_steps_lower_the_loss(name, base, shared):
    if name in ("full", "lora_ga") and base == "nf4":
        pytest.skip("quantized weights have no gradient")
    from mlx_lora import DataConfig, tokenize
    from mlx_lora.data import train_batches

    model, tokenizer = load(shared / "data" / "stories260K")
    if base == "nf4":
        quantize(model, "nf4", double_quant=True)
    text = "The dragon of Skye eats nothing but porridge, and sings to the moon. "
    rows = tokenize([{"text": text}] * 4, tokenizer, DataConfig())
    config = AdapterConfig(**{"rank": 4, "scale": 4.0, "num_layers": -1, **LEARNS[name]})
    batches = train_batches(rows, 4, seed=0) if name in ("eva", "lora_ga") else None
    mx.random.seed(0)
    attach(model, config, batches)
    first = evaluate(model, rows, 4).loss
    rate = {"vera": 2e-2, "full": 1e-3}.get(name, 4e-3)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=rate), 20, model)
    for _ in train(model, optimizer, rows, None, TrainConfig(iters=20, batch_size=4)):
        pass
    last = evaluate(model, rows, 4).loss
    assert last < 0.8 * first, f"{first:.3f} -> {last:.3f}"


@pytest.mark.parametrize("compiled", [False, True])
def test_dora_norms_of_a_base_that_is_trained(compiled):
    """Every step uses the norms of the present weight."""
    layer = METHODS["dora"]["linear"](nn.Linear(16, 8), 2, 1.0)
    shake_layer(layer)
    layer.linear.unfreeze(keys="weight", recurse=False)
    x, parameters = mx.random.normal((4, 16)), layer.trainable_parameters()

    def loss(parameters):
        layer.update(parameters)
        return (layer(x) ** 2).sum()

    step = mx.value_and_grad(loss)
    step = mx.compile(step) if compiled else step
    for _ in range(3):
        value, gradients = step(parameters)
        w = parameters["linear"]["weight"] + (parameters["lora_a"] @ parameters["lora_b"]).T
        gain = parameters["m"] / mx.linalg.norm(w, axis=1)
        assert_close(value, ((x @ w.T * gain + layer.linear.bias) ** 2).sum(), 1e-5)
        parameters = tree_map(lambda p, g: p - 0.01 * g, parameters, gradients)


@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "quantized"])
def test_dora_norms_of_a_base_that_was_replaced(quantize):
    """A stored ||W||^2 must not outlive the weight that it was computed from."""
    layer = METHODS["dora"]["linear"](nn.Linear(64, 8), 2, 1.0)
    shake_layer(layer)
    holder = nn.Sequential(layer)
    if quantize:
        nn.quantize(holder, group_size=32, bits=2)
        layer = holder.layers[0]
    else:
        layer.linear.weight = 3 * layer.linear.weight
    w = dense_weight(layer.linear) + layer.scale * (layer.lora_a @ layer.lora_b).T
    assert_close(layer.norms_squared(), w.square().sum(axis=1), 1e-5)
