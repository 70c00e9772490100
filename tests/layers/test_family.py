"""The whole family in one matrix: every method and setting over every kind of base, from attach to files to fusing."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, relative, shake, shake_layer
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
    save_model,
    train,
    unmount,
)
from mlx_lora.base.modules import dense_weight, is_quantized
from mlx_lora.base.nf4 import bits_per_parameter, quantize_nf4
from mlx_lora.base.nf4_linear import NF4Linear
from mlx_lora.errors import AdapterError, ConfigError, FormatError, ModelError
from mlx_lora.fast import accelerate
from mlx_lora.layers import METHODS
from mlx_lora.layers.vera import draw_projections
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
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3, "mlp.*": 7}, keys=["q_proj", "up_proj"]),
    "some layers": dict(layers_to_transform=[0, 2], keys=["q_proj"]),
    "modules_to_save": dict(modules_to_save=["norm", "lm_head", "layers.1.mlp"], keys=["q_proj"]),
    "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only", keys=["q_proj"]),
    "lora_bias": dict(lora_bias=True),
    "tokens": dict(trainable_token_indices={"embed_tokens": [1, 60, 90]}),
    "tokens alone": dict(trainable_token_indices={"embed_tokens": [5]}, keys=()),
    "modules alone": dict(modules_to_save=["up_proj"], keys=()),
    "embedding": dict(keys=["model.embed_tokens", "lm_head"]),
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
    """Change everything that is trained, as training does."""
    mx.random.seed(4)
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(k, v + size * mx.random.normal(v.shape).astype(v.dtype)) for k, v in trained]))


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_life_of_an_adapter(name, base, tokens, tmp_path):
    model = make(base, TIED if name.startswith("tokens") else BIASED)
    before = model(tokens)
    attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **SETTINGS[name]}))
    assert_close(model(tokens), before, 2e-6, "attach is not the identity")
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}

    gradients = mx.grad(lambda p: (model.update(p), model(tokens).square().sum())[1])(model.trainable_parameters())
    move(model)  # B = 0 keeps A from learning at first
    gradients = dict(tree_flatten(mx.grad(
        lambda p: (model.update(p), model(tokens).square().sum())[1])(model.trainable_parameters())))  # fmt: skip
    for path, gradient in gradients.items():
        assert mx.abs(gradient).max().item() > 0, f"{path} gets no gradient"

    live, adapter = model(tokens), extract(model).check()
    assert relative(live, before) > 1e-3
    again = load_adapter(save_adapter(adapter, tmp_path / "a"))
    folded = name == "patterns"  # scales are folded into B for mlx-lm, and unfolded to a rounding
    if folded:
        same = [(c.rank_of(p), c.scale_of(p)) for c in (again.config, adapter.config) for p in adapter.modules]
        assert same[: len(adapter.modules)] == same[len(adapter.modules) :]
    else:  # mlx-lm's folder names the modules
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


def test_what_mlx_lm_cannot_express_it_refuses(tmp_path, tokens):
    from mlx_lm.tuner.utils import load_adapters

    for name, settings in SETTINGS.items():
        model = make("dense")
        attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **settings}))
        move(model)
        live = model(tokens)
        folder = save_adapter(extract(model), tmp_path / name.replace(",", ""))
        theirs = make("dense")
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


# -- one-sided embeddings, tied models ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    dict(keys=["model.embed_tokens"], embedding_side="input"),
    dict(keys=[], modules_to_save=["embed_tokens"], embedding_side="input"),
], ids=["lora", "saved whole"])  # fmt: skip
def test_input_only_leaves_a_tied_head_alone(settings, tokens):
    model = make("dense", TIED)
    x = mx.random.normal((3, 64))
    head = model.model.embed_tokens.as_linear(x)
    attach(model, AdapterConfig(**{"rank": 4, **settings}))
    move(model)
    assert mx.array_equal(model.model.embed_tokens.as_linear(x), head).item()
    with pytest.raises(ConfigError, match="input only"):
        fuse(model)
    unmount(model)
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
    (dict(modules_to_save=["lm_head"]), "no module 'lm_head'"),
    (dict(keys=["lm_head"], modules_to_save=["embed_tokens"]), "matches no module"),
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
    (dict(method="vera", scale=2.0), "scale: vera"),
    (dict(method="vera", alpha=8), "alpha: vera"),
    (dict(method="dora", lora_bias=True), "lora_bias is for lora"),
    (dict(method="dora", init="pissa"), "init 'pissa' is for lora"),
    (dict(init="pisa"), "init must be one of"),
    (dict(eva_rho=3.0), "eva_rho is of init eva"),
    (dict(bias="some"), "bias must be one of"),
    (dict(method="full", bias="all"), "bias: full"),
    (dict(trainable_token_indices={"e": [1, 1]}), "names a token twice"),
    (dict(layers_to_transform=[-1]), "numbers of layers"),
    (dict(keys=[3]), "names of modules"),
])  # fmt: skip
def test_settings_that_contradict(config, said):
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**config)


# -- experts -------------------------------------------------------------------------------------------------------


def test_pefts_names_of_experts_parameters(tokens):
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


def test_projections_are_torchs():
    """The first numbers of torch.Generator().manual_seed(key) through uniform_; in full by tests/judge."""
    a, b = draw_projections(4, 6, 5, key=0)
    assert a.shape == (4, 6) and b.shape == (5, 4)
    # torch.rand(2, generator=torch.Generator().manual_seed(0)) -> 0.4962565899, 0.7682217956
    bound = (6 / 6) ** 0.5
    assert np.allclose(np.array(a)[0, :2], [(2 * 0.4962565899 - 1) * bound, (2 * 0.7682217956 - 1) * bound], atol=1e-6)
    assert mx.abs(b).max().item() <= (6 / 4) ** 0.5
    a7, b7 = draw_projections(8, 33, 17, key=7)  # digests of PEFT's own
    assert digest(a7) == "85392efd74f3cf91" and digest(b7) == "4302bb734830c0cb"
    again, _ = draw_projections(4, 6, 5, key=2**32)
    assert mx.array_equal(a, again).item() and not mx.array_equal(a, draw_projections(4, 6, 5, key=1)[0]).item()


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


# -- NF4 -----------------------------------------------------------------------------------------------------------


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.array(array)).tobytes()).hexdigest()[:16]


def test_the_bytes_of_bitsandbytes():
    """Digests of what bitsandbytes 0.50.2 made of this weight; tests/judge asks it anew, at more shapes."""
    weight = mx.array((np.random.RandomState(0).standard_normal((96, 80)) * 0.05).astype(np.float32))
    single, double = quantize_nf4(weight, double=False), quantize_nf4(weight, double=True)
    assert digest(single.codes) == digest(double.codes) == "9f2a8865ab4e7e94"
    assert digest(single.absmax) == "332f632e5fd4bfdd" and digest(double.absmax) == "a84724e08b1fac5c"
    largest, values, offset = double.nested
    assert digest(largest) == "3189f85d5fbef3fa" and digest(values) == "e732639a65f497b4"
    assert offset.item() == 0.12776599824428558


def test_bits_of_nf4():
    assert bits_per_parameter(double=False) == 4.5
    assert bits_per_parameter(double=True) == pytest.approx(4.126953)
    model = make_model(LLAMA, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    report = quantize(model, "nf4", double_quant=True)
    assert report.layers == 21 and report.kept == ["lm_head", "model.embed_tokens"]
    assert report.bits_per_weight == pytest.approx(4.127, abs=2e-3) and 0.05 < report.error < 0.11


def test_nf4_is_dequantized_again_in_the_backward_pass():
    """Gradients pass through, and do not depend on what is cached: a dense copy of W must not outlive a product."""
    mx.random.seed(0)
    import mlx.nn as nn

    layer = NF4Linear.from_linear(nn.Linear(96, 40), double=True)
    x = mx.random.normal((3, 5, 96))
    weight = layer.unpacked()
    got = mx.grad(lambda x: (layer(x) ** 2).sum())(x)
    expected = mx.grad(lambda x: ((x @ weight.T + layer.bias) ** 2).sum())(x)
    assert_close(got, expected, 1e-6)


def test_a_folder_of_nf4(tmp_path, shared, tokens):
    model, _ = load(shared / "data" / "stories260K")
    quantize(model, "nf4", double_quant=True)
    expected = model(tokens)
    save_model(model, tmp_path / "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    again, _ = load(tmp_path / "nf4")
    assert mx.array_equal(again(tokens), expected).item()
    half, _ = load(tmp_path / "nf4", dtype="bfloat16")
    layer = half.layers[0].self_attn.q_proj
    assert isinstance(layer, NF4Linear)
    assert mx.array_equal(layer.unpacked(), again.layers[0].self_attn.q_proj.unpacked()).item(), "scales were rounded"
    from mlx_lm.utils import load_model

    with pytest.raises(ValueError, match=r"not in model|absmax|[Uu]nexpected|parameters"):
        load_model(tmp_path / "nf4")
    with pytest.raises(ModelError, match="quantized already"):
        quantize(again, "affine")
    attach(again, AdapterConfig(rank=4, num_layers=-1))
    shake(again)
    live = again(tokens)
    reports = fuse(again)
    assert all(report.survives for report in reports) and relative(again(tokens), live) < 0.1
    save_model(again, tmp_path / "fused")
    fused, _ = load(tmp_path / "fused")
    assert_close(fused(tokens), again(tokens), 1e-5)


@pytest.mark.parametrize(("change", "said"), [
    ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
    ({"load_in_4bit": False, "load_in_8bit": True}, "LLM.int8"),
])  # fmt: skip
def test_other_types_of_bitsandbytes_are_refused(change, said, tmp_path, shared):
    model, _ = load(shared / "data" / "stories260K")
    quantize(model, "nf4")
    save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        load(tmp_path / "m")


@pytest.mark.parametrize("arguments", [
    dict(mode="nf5"), dict(mode="mxfp4", bits=8), dict(mode="affine", group_size=16), dict(double_quant=True),
])  # fmt: skip
def test_modes_that_do_not_exist(arguments):
    with pytest.raises(ConfigError):
        quantize(make_model(), **arguments)


def test_nf4_is_not_for_experts():
    with pytest.raises(ModelError, match="not for experts"):
        quantize(make_model(QWEN3_MOE), "nf4")


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_mlxs_modes(mode):
    model = make_model()
    exact = {p: dense_weight(m) for p, m in model.named_modules() if p.endswith("up_proj")}
    report = quantize(model, mode)
    assert report.layers == 23 and not report.kept
    expected = {"affine": 5.0, "mxfp4": 4.25, "mxfp8": 8.25, "nvfp4": 4.5}[mode]  # affine: float32 scales and biases
    assert report.bits_per_weight == pytest.approx(expected)
    modules = dict(model.named_modules())
    assert all(is_quantized(modules[p]) and relative(dense_weight(modules[p]), w) < 0.3 for p, w in exact.items())


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
    (dict(loraplus_lr_embedding=1e-5), "give loraplus_lr_ratio"),
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
    "full": dict(method="full"),
}  # fmt: skip


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


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_nf4_layers_can_be_copied(copied):
    layer, x = NF4Linear.from_linear(nn.Linear(64, 8)), mx.random.normal((2, 64))
    assert mx.array_equal(copied(layer)(x), layer(x)).item() and copied(layer).dtype == mx.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_norms_of_a_base_that_is_trained(compiled):
    """Each step's are of the weight that it has."""
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
def test_norms_of_a_base_that_was_changed(quantize):
    """DoRA's ||W||^2 is kept, and belongs to the weight that it was computed of."""
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
