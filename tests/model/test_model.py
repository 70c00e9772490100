"""attach, extract, mount and unmount, and the selection of modules, on tiny random models."""

from __future__ import annotations

from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, relative, shake
from mlx_lora.adapter import Adapter
from mlx_lora.base.modules import is_quantized
from mlx_lora.config import AdapterConfig
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.fast import accelerate
from mlx_lora.model.attach import adapters_on, attach, extract, mount, parameter_counts, unmount
from mlx_lora.model.targets import routers, select

Q4 = dict(group_size=32, bits=4)
BASES = {"dense": None, "4-bit": Q4}


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "moe"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_attach_extract_unmount_and_mount(method, config, base, tokens):
    model = make_model(config, quantize=BASES[base])
    accelerate(model)
    before = model(tokens)
    paths = attach(model, AdapterConfig(method=method, rank=4, num_layers=-1))
    # The layers are bit-equal (test_layers), but arrays with other strides may round differently in later layers.
    assert_close(model(tokens), before, 2e-6, "attach is not the identity")
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    leaves = ("lora_a", "lora_b", "m") if method == "dora" else ("lora_a", "lora_b")
    assert names == {f"{p}.{leaf}" for p in paths for leaf in leaves}, "other parameters are trainable"
    shake(model)
    after = model(tokens)
    assert relative(after, before) > 1e-2
    adapter = extract(model)
    assert adapter.modules == sorted(paths, key=lambda p: adapter.modules.index(p)) and not adapter.problems()
    unmount(model)
    assert mx.array_equal(model(tokens), before).item(), "unmount does not restore the base"
    mount(model, adapter)
    assert_close(model(tokens), after, 1e-6, "mounted")
    assert {n for n, _ in tree_flatten(model.trainable_parameters())} == names
    again = extract(model)
    assert again.config == adapter.config
    assert all(mx.array_equal(again.weights[n], w).item() for n, w in adapter.weights.items())


def test_mounting_another_adapter_replaces_the_first(tokens):
    model = make_model()
    adapters = []
    for seed in (1, 2):
        attach(model, AdapterConfig(rank=4, num_layers=2, keys=["q_proj"] if seed == 1 else ["mlp.up_proj", "lm_head"]))
        shake(model, seed)
        adapters.append((extract(model), model(tokens)))
        unmount(model)
    for adapter, expected in [*adapters, *adapters]:
        mount(model, adapter)
        assert_close(model(tokens), expected, 1e-6)
        assert list(adapters_on(model)) == sorted(adapter.modules, key=list(adapters_on(model)).index)


def test_rank_and_scale_patterns():
    model = make_model()
    config = AdapterConfig(
        rank=8,
        scale=2.0,
        num_layers=-1,
        keys=["all-linear"],
        rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\..*": 3},
        scale_pattern={"layers.2.self_attn.o_proj": 5.0},
    )
    attach(model, config)
    layers = adapters_on(model)
    assert layers["model.layers.0.self_attn.q_proj"].rank == 2
    assert layers["model.layers.1.mlp.up_proj"].rank == 3
    assert layers["model.layers.2.mlp.up_proj"].rank == 8
    assert {p for p, m in layers.items() if m.scale == 5.0} == {"model.layers.2.self_attn.o_proj"}
    exact = extract(model).config
    assert all(exact.rank_of(p) == m.rank and exact.scale_of(p) == m.scale for p, m in layers.items())


def test_alpha_and_rslora():
    assert AdapterConfig(rank=16, alpha=32).scale_of("x") == 2.0
    assert AdapterConfig(rank=16, alpha=32, rslora=True).scale_of("x") == 8.0
    assert AdapterConfig(rank=16, alpha=32, rslora=True, rank_pattern={"q": 4}).scale_of("a.q") == 16.0


def chosen(model, **config):
    return list(select(model, AdapterConfig(**config)))


def test_keys():
    model = make_model()
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    everywhere = {f"model.layers.{i}.{name}" for i in range(3) for name in linears}
    assert set(chosen(model, num_layers=-1)) == everywhere
    assert set(chosen(model, num_layers=0)) == everywhere
    assert set(chosen(model)) == everywhere, "the default of 16 means all layers of a smaller model"
    for beyond in (16, 99):
        with pytest.raises(ConfigError, match=f"num_layers is {beyond}, but the model has 3 layers"):
            chosen(model, num_layers=beyond)
    assert set(chosen(model, num_layers=-1, keys=["all-linear"])) == everywhere
    assert set(chosen(model, num_layers=1)) == {f"model.layers.2.{name}" for name in linears}
    two = {"model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"}
    assert set(chosen(model, num_layers=2, keys=["q_proj"])) == two
    assert set(chosen(model, num_layers=2, keys=["self_attn.q_proj"])) == two
    assert set(chosen(model, num_layers=2, keys=[r".*\.(q|k)_proj"])) == two | {p.replace("q_", "k_") for p in two}
    assert chosen(model, num_layers=1, keys=["model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    assert set(chosen(model, keys=["lm_head", "embed_tokens"])) == {"lm_head", "model.embed_tokens"}


def test_keys_that_match_nothing_are_all_named():
    with pytest.raises(AdapterError) as error:
        chosen(make_model(), keys=["q_porj", "wibble", "k_proj"])
    assert "'q_porj' matches no module; did you mean 'q_proj'" in error.value.message
    assert "'wibble' matches no module" in error.value.message and "k_proj" not in error.value.message
    assert "self_attn.q_proj" in error.value.hint and "lm_head" in error.value.hint
    with pytest.raises(AdapterError, match="only outside the last 1 layers"):
        chosen(make_model(), keys=[r"model\.layers\.0\..*"], num_layers=1)


def test_routers_only_on_request():
    model = make_model(QWEN3_MOE)
    assert routers(model) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert not any(p.endswith("mlp.gate") for p in chosen(model, num_layers=-1))
    assert any(p.endswith("switch_mlp.gate_proj") for p in chosen(model, num_layers=-1))
    assert chosen(model, num_layers=-1, keys=["mlp.gate"]) == sorted(routers(model))


@pytest.mark.skipif(version("mlx-lm").startswith("0.31"), reason="mlx-lm 0.31 has no gradient through a router")
def test_experts_learn():
    """Adapters of experts get gradients over dense and quantized bases."""
    for quantize in (None, Q4):
        model = make_model(QWEN3_MOE, quantize=quantize)
        accelerate(model)
        attach(model, AdapterConfig(rank=4, num_layers=-1, keys=["switch_mlp.up_proj"]))
        shake(model)
        model.train()  # mlx-lm sorts 40 tokens by expert, fewer not
        loss = nn.value_and_grad(model, lambda m: m(mx.arange(40)[None]).square().sum())
        grads = dict(tree_flatten(loss(model)[1]))
        assert grads and all(mx.abs(g).max().item() > 0 for g in grads.values())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("base", list(BASES))
def test_tied_embeddings_change_both_sides(method, base, tokens):
    model = make_model(tie_word_embeddings=True, quantize=BASES[base])
    accelerate(model)
    before = model(tokens)
    attach(model, AdapterConfig(method=method, rank=4, keys=["model.embed_tokens"]))
    assert mx.array_equal(model(tokens), before).item()
    shake(model)
    layer = adapters_on(model)["model.embed_tokens"]
    after = model(tokens)
    from mlx_lora.base.modules import dense_weight

    plain = make_model(tie_word_embeddings=True, quantize=BASES[base])
    accelerate(plain)
    embedding = nn.Embedding(1, 1)
    embedding.weight = layer.merged_weight(dense_weight(layer.base))
    plain.model.embed_tokens = embedding
    assert_close(after, plain(tokens), 1e-5)


def test_adapters_of_another_model_are_refused(tokens):
    other = make_model(hidden_size=32, num_hidden_layers=4)
    attach(other, AdapterConfig(rank=4, num_layers=-1))
    model = make_model()
    before = model(tokens)
    with pytest.raises(AdapterError) as error:
        mount(model, extract(other))
    assert "do not fit this layer" in error.value.message and "and" in error.value.message
    assert mx.array_equal(model(tokens), before).item() and not adapters_on(model)


def test_a_refused_adapter_leaves_the_present_one_mounted(tokens):
    model = make_model()
    attach(model, AdapterConfig(rank=4))
    shake(model)
    before = model(tokens)
    bad = Adapter(AdapterConfig(rank=4), {"nowhere.lora_a": mx.zeros((4, 4)), "nowhere.lora_b": mx.zeros((4, 4))})
    with pytest.raises(AdapterError, match="nowhere"):
        mount(model, bad)
    assert mx.array_equal(model(tokens), before).item()


def test_attaching_twice_is_refused():
    model = make_model()
    attach(model, AdapterConfig(rank=4))
    with pytest.raises(AdapterError, match="adapter already"):
        attach(model, AdapterConfig(rank=4))


def test_the_same_seed_gives_the_same_adapter():
    weights = []
    for _ in range(2):
        model = make_model()
        mx.random.seed(5)
        attach(model, AdapterConfig(rank=4))
        weights.append(extract(model).weights)
    assert all(mx.array_equal(weights[0][n], weights[1][n]).item() for n in weights[0])


def test_full_fine_tuning(tokens):
    model = make_model()
    before = model(tokens)
    assert attach(model, AdapterConfig(method="full", num_layers=1)) == ["model.layers.2"]
    names = [n for n, _ in tree_flatten(model.trainable_parameters())]
    assert names and all(n.startswith("model.layers.2.") for n in names)
    # New arrays, as an optimizer sets.
    model.update(
        {"model": {"layers": [{}, {}, {"mlp": {"up_proj": {"weight": model.layers[2].mlp.up_proj.weight * 2}}}]}}
    )
    after, adapter = model(tokens), extract(model)
    assert adapter.config.method == "full" and adapter.config.num_layers == 1
    other = make_model()
    mount(other, adapter)
    assert_close(other(tokens), after, 1e-6)
    unmount(other)
    assert mx.array_equal(other(tokens), before).item()
    with pytest.raises(ConfigError, match="quantized"):
        attach(make_model(quantize=Q4), AdapterConfig(method="full"))


def test_a_quantized_weight_counts_its_values():
    dense, packed = make_model(), make_model(quantize=Q4)
    for model in (dense, packed):
        attach(model, AdapterConfig(rank=4, keys=["q_proj"], num_layers=-1))
    assert any(is_quantized(m) for m in packed.modules())
    assert parameter_counts(dense) == parameter_counts(packed)
    assert parameter_counts(dense)[0] == 3 * 4 * (64 + 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"keys": 0},
        {"init": 1},
        {"rank_pattern": []},
        {"rank_pattern": None},
        {"alpha_pattern": {1: 2}},
        {"trainable_token_indices": {"embed_tokens": None}},
        {"rslora": "yes", "dropout": "0.1"},
    ],
    ids=str,
)
def test_settings_of_the_wrong_type_are_refused(settings):
    with pytest.raises(ConfigError) as told:
        AdapterConfig(**settings)
    assert all(name in told.value.message for name in settings) and told.value.hint
