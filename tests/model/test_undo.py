"""Everything that attach and mount change is undone: by unmount, after an error, and inside disable_adapter."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, relative
from mlx_lora import AdapterConfig, attach, disable_adapter, extract, fuse, mount, unmount
from mlx_lora.device import is_cpu
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.fast import accelerate
from mlx_lora.fast.swap import swap
from mlx_lora.model import attach as room
from mlx_lora.model.multi import MultiLoRA
from mlx_lora.model.targets import adaptable

Q4 = dict(group_size=32, bits=4)
BIASED = {**LLAMA, "attention_bias": True}
TIED = {**BIASED, "tie_word_embeddings": True}
SETTINGS = {
    "lora": dict(keys=["q_proj", "up_proj", "embed_tokens"]),
    "dora": dict(method="dora", keys=["v_proj", "down_proj"]),
    "vera": dict(method="vera", rank=16, keys=["q_proj", "down_proj"]),
    "pissa": dict(init="pissa", keys=["q_proj"]),
    "modules_to_save": dict(modules_to_save=["norm", "lm_head"], keys=["q_proj"]),
    "bias": dict(bias="all", keys=["q_proj"]),
    "tokens": dict(trainable_token_indices={"embed_tokens": [1, 60, 90]}, keys=["q_proj"]),
    "input side": dict(keys=["v_proj"], modules_to_save=["embed_tokens"], embedding_side="input"),
    "full": dict(method="full", num_layers=2, rank=None),
}
BASES = {"dense": None, "4-bit": Q4}
CASES = [(name, base) for name in SETTINGS for base in BASES if (name, base) != ("full", "4-bit")]


def make(base: str = "dense", config: dict = BIASED):
    """A model with a mixture of frozen and trainable parameters."""
    model = make_model(config, quantize=BASES[base])
    model.layers[1].freeze()
    model.layers[0].self_attn.unfreeze(keys="bias", recurse=True)
    return model


def settings(name: str) -> AdapterConfig:
    return AdapterConfig(**{"rank": 4, "num_layers": -1, **SETTINGS[name]})


def train(model, size: float = 0.05) -> None:
    """Change everything that is trainable."""
    mx.random.seed(4)
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(k, v + size * mx.random.normal(v.shape).astype(v.dtype)) for k, v in trained]))


def contents(model) -> list:
    """Every module by path: itself, its class, mode, frozen parameters and arrays."""
    return [
        (path, module, type(module), module.training, set(module._no_grad), [(k, v) for k, v in module.items()])
        for path, module in model.named_modules()
    ]


def assert_unchanged(model, before: list) -> None:
    after = contents(model)
    assert [c[0] for c in after] == [c[0] for c in before], "other modules"
    for (path, module, cls, mode, frozen, items), now in zip(before, after, strict=True):
        assert now[1] is module, f"{path}: another module"
        assert now[2] is cls, f"{path}: class {now[2]}, was {cls}"
        assert now[3] == mode, f"{path}: training is {now[3]}"
        assert now[4] == frozen, f"{path}: frozen {now[4]}, was {frozen}"
        values = {k: v for k, v in now[5] if isinstance(v, mx.array)}
        assert values.keys() == {k for k, v in items if isinstance(v, mx.array)}
        assert all(values[k] is v for k, v in items if isinstance(v, mx.array)), f"{path}: other arrays"


class OnlyWithAdapters:
    """A class for MLPs that fails if no adapter is in them, as a fast path that reads lora_a would."""

    def __call__(self, x):
        assert any(hasattr(module, "lora_a") for module in self.children().values()), "the adapters are gone"
        return super().__call__(x)


@pytest.fixture(params=["base", "base and MLPs"])
def acceleration(request, monkeypatch):
    """fast.accelerate as it is, and one that changes MLPs with adapters in them as well."""
    if request.param == "base":
        return

    def accelerate_mlps(model) -> list:
        changed = accelerate(model)
        for module in model.modules():
            adapted = any(hasattr(child, "lora_a") for child in module.children().values() if isinstance(child, dict))
            if type(module).__name__ == "MLP" and adapted and not isinstance(module, OnlyWithAdapters):
                swap(module, OnlyWithAdapters)
                changed.append(module)
        return changed

    monkeypatch.setattr(room, "accelerate", accelerate_mlps)
    monkeypatch.setattr("mlx_lora.merge.fuse.accelerate", accelerate_mlps)


# -- attach that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (dict(bias="lora_only"), AdapterError),
        (dict(trainable_token_indices={"embed_tokens": [96]}), AdapterError),
        (dict(trainable_token_indices={"q_proj": [1]}), AdapterError),
        (dict(modules_to_save=["nowhere"]), AdapterError),
        (dict(init="eva", keys=["q_proj"]), ConfigError),
        (dict(method="full", keys=["q_proj"]), ConfigError),
    ],
    ids=str,
)
def test_a_refused_attach_changes_nothing(config, kind):
    model = make(config=LLAMA)
    before = contents(model)
    with pytest.raises(kind):
        attach(model, AdapterConfig(rank=4, **config))
    assert_unchanged(model, before)
    attach(model, AdapterConfig(rank=4))


@pytest.mark.parametrize("late", ["make_layers", "place", "train_full_parameters", "accelerate"])
@pytest.mark.parametrize("base", list(BASES))
def test_an_error_while_attaching_changes_nothing(late, base, monkeypatch):
    model = make(base)
    before, function = contents(model), getattr(room, late)

    def fail(*args, **kwargs):
        function(*args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(room, late, fail)
    with pytest.raises(MemoryError):
        attach(model, AdapterConfig(rank=4, modules_to_save=["lm_head"], bias="all", keys=["q_proj"]))
    assert_unchanged(model, before)
    monkeypatch.setattr(room, late, function)
    attach(model, AdapterConfig(rank=4))


@pytest.mark.parametrize("late", ["make_layers", "place", "train_full_parameters", "accelerate"])
@pytest.mark.parametrize("base", list(BASES))
def test_an_error_while_mounting_keeps_the_adapter(late, base, acceleration, monkeypatch, tokens):
    model = make(base)
    start = contents(model)
    attach(model, settings("modules_to_save"))
    adapter = extract(model)
    mount(model, adapter)
    train(model)
    before, live, function = contents(model), model(tokens), getattr(room, late)

    def fail(*args, **kwargs):
        function(*args, **kwargs)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(room, late, fail)
        mount(model, adapter)
    assert_unchanged(model, before)
    assert mx.array_equal(model(tokens), live).item()
    unmount(model)
    assert_unchanged(model, start)


# -- unmount ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_unmount_restores_the_model(name, base, accelerated, acceleration, tokens):
    model = make(base)
    if accelerated:
        accelerate(model)
    before, logits = contents(model), model(tokens)
    attach(model, settings(name))
    train(model)
    assert relative(model(tokens), logits) > 1e-3
    adapter = extract(model)
    unmount(model)
    assert_unchanged(model, before)
    assert mx.array_equal(model(tokens), logits).item()
    other = SETTINGS["lora" if name != "lora" else "bias"]
    attach(model, AdapterConfig(rank=2, num_layers=-1, **other))
    mount(model, adapter)
    mount(model, adapter)
    train(model)
    unmount(model)
    assert_unchanged(model, before)
    unmount(model)
    assert_unchanged(model, before)


def test_a_refused_mount_keeps_the_adapter(tokens):
    model, other = make(), make_model(hidden_size=32)
    attach(other, AdapterConfig(rank=4))
    attach(model, settings("modules_to_save"))
    train(model)
    before = contents(model)
    with pytest.raises(AdapterError, match="do not fit"):
        mount(model, extract(other))
    assert_unchanged(model, before)
    assert extract(model).full_parameters


def test_an_adapter_is_never_put_on_the_trained_module_of_another(tokens):
    """The 4-bit head that modules_to_save made dense is 4-bit again below the next adapter."""
    model = make("4-bit")
    attach(model, AdapterConfig(rank=4, keys=["lm_head"]))
    train(model)
    adapter, expected = extract(model), model(tokens)
    unmount(model)
    attach(model, AdapterConfig(keys=[], modules_to_save=["lm_head"]))
    train(model)
    mount(model, adapter)
    assert mx.array_equal(model(tokens), expected).item()


@pytest.mark.skipif(not is_cpu(), reason="only a CPU keeps dequantized weights")
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_swapping_adapters_keeps_dequantized_weights(accelerated, acceleration, monkeypatch, tokens):
    """Those of base layers that were accelerated before stay after unmount, too."""
    model = make("4-bit", LLAMA)
    adapters = []
    for keys in (["q_proj", "up_proj"], ["q_proj", "lm_head"]):
        attach(model, AdapterConfig(rank=4, keys=keys, num_layers=-1))
        adapters.append(extract(model))
        unmount(model)
    if accelerated:
        accelerate(model)
    calls, dequantize = [], mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *args, **kwargs: (calls.append(args), dequantize(*args, **kwargs))[1])

    def dequantized() -> int:
        calls.clear()
        mx.eval(model(tokens))
        return len(calls)

    mount(model, adapters[0])
    every = dequantized()
    assert every > 0 and dequantized() == 0
    mount(model, adapters[1])
    assert dequantized() == 0
    with disable_adapter(model):
        assert dequantized() == 0
    assert dequantized() == 0
    unmount(model)
    mount(model, adapters[0])
    assert dequantized() == (0 if accelerated else every)


@pytest.mark.parametrize("base", list(BASES))
def test_multi_lora_restores_the_model(base, acceleration):
    model = make(base, LLAMA)
    attach(model, AdapterConfig(rank=4))
    adapter = extract(model)
    unmount(model)
    before = contents(model)
    MultiLoRA(model, {"one": adapter}).unmount()
    assert_unchanged(model, before)


def test_fusing_leaves_no_class_for_adapters(acceleration, tokens):
    model = make()
    attach(model, settings("lora"))
    train(model)
    live = model(tokens)
    fuse(model, dtype="float32")
    assert_close(model(tokens), live, 2e-5)


@pytest.mark.parametrize("name", ["modules_to_save", "input side", "vera", "pissa", "full"])
def test_set_dtype_reaches_everything(name, tokens, monkeypatch):
    """The trained parameters, the frozen pairs and projections, and the originals that unmount puts back."""
    monkeypatch.setenv("MLX_LORA_FAST", "off")  # fast/blas.py looks embeddings up in float32
    model = make("dense" if name == "full" else "4-bit")
    attach(model, settings(name))
    train(model)
    model.set_dtype(mx.bfloat16)
    assert model(tokens).dtype == mx.bfloat16
    shared = [layer.shared for layer in model.modules() if "shared" in layer]
    assert len({id(module) for module in shared}) == (name == "vera"), "one pair of projections serves all layers"
    adapter = extract(model)
    assert not any("frozen" in path for path in adapter.weights)
    with disable_adapter(model):
        assert model(tokens).dtype == mx.bfloat16
    unmount(model)
    assert model(tokens).dtype == mx.bfloat16
    assert {a.dtype for _, a in tree_flatten(model.parameters())} <= {mx.bfloat16, mx.uint32}


# -- disable_adapter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "base"), CASES)
def test_disabled_is_the_base_and_then_the_adapter_again(name, base, acceleration, tokens):
    model = make(base)
    accelerate(model)
    logits = model(tokens)
    attach(model, settings(name))
    train(model)
    live, before = model(tokens), contents(model)
    with disable_adapter(model):
        assert mx.array_equal(model(tokens), logits).item()
        with disable_adapter(model):
            assert mx.array_equal(model(tokens), logits).item()
        assert mx.array_equal(model(tokens), logits).item()
    assert_unchanged(model, before)
    with pytest.raises(ZeroDivisionError), disable_adapter(model):
        raise ZeroDivisionError
    assert_unchanged(model, before)
    assert mx.array_equal(model(tokens), live).item()
    mount(model, extract(model))
    assert_close(model(tokens), live, 1e-6)


def test_disabled_without_an_adapter_and_with_another_inside(tokens):
    model = make()
    with disable_adapter(model):
        assert model(tokens).size
    attach(model, settings("bias"))
    train(model)
    adapter, live = extract(model), model(tokens)
    with disable_adapter(model):
        attach(model, settings("modules_to_save"))
        train(model)
    assert mx.array_equal(model(tokens), live).item() and extract(model) == adapter
    with disable_adapter(model):
        model.train()
    assert all(module.training for module in model.modules())


def test_several_adapters_cannot_be_disabled():
    model = make(config=LLAMA)
    attach(model, AdapterConfig(rank=4))
    adapter = extract(model)
    unmount(model)
    MultiLoRA(model, {"one": adapter})
    with pytest.raises(AdapterError, match="several adapters"), disable_adapter(model):
        pass


@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_disabled_inside_a_loss(name, base, compiled, tokens):
    model = make(base)
    reference = model(tokens)
    mx.eval(reference)
    attach(model, settings(name))
    train(model)

    def loss(parameters, disabled: bool):
        model.update(parameters)
        expected = reference
        if disabled:
            with disable_adapter(model):
                expected = mx.stop_gradient(model(tokens))
        return (model(tokens) - expected).square().mean()

    parameters = model.trainable_parameters()
    steps = [mx.value_and_grad(lambda p, disabled=disabled: loss(p, disabled)) for disabled in (True, False)]
    if compiled:
        steps = [mx.compile(step) for step in steps]
    (got, gradients), (value, expected) = (step(parameters) for step in steps)
    assert_close(got, value, 1e-5)
    for (path, gradient), (_, other) in zip(tree_flatten(gradients), tree_flatten(expected), strict=True):
        assert mx.abs(gradient - other).max().item() <= 1e-5 * max(1, mx.abs(other).max().item()), path


def test_a_copied_model_is_independent(tokens):
    model = make()
    logits = model(tokens)
    attach(model, settings("modules_to_save"))
    train(model)
    live, twin = model(tokens), copy.deepcopy(model)
    unmount(twin)
    assert mx.array_equal(twin(tokens), logits).item()
    assert mx.array_equal(model(tokens), live).item()


# -- the random state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BIASED, QWEN3_MOE], ids=["llama", "moe"])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("full", "pissa", "bias")])
def test_mount_does_not_draw(name, config):
    model = make_model(config, quantize=Q4)
    options = {**SETTINGS[name], **({"modules_to_save": ["mlp"]} if name == "modules_to_save" else {})}
    attach(model, AdapterConfig(**{"rank": 4, "num_layers": -1, **options, "keys": ["q_proj"]}))
    adapter = extract(model)
    unmount(model)
    draws = []
    for mounted in (False, True):
        mx.random.seed(7)
        if mounted:
            mount(model, adapter)
            with disable_adapter(model):
                pass
            unmount(model)
        draws.append(mx.random.normal((3,)))
    assert mx.array_equal(*draws).item()


def test_continuing_a_pissa_run_does_not_draw():
    model = make_model()
    attach(model, AdapterConfig(rank=4, init="pissa", keys=["q_proj"]))
    adapter = extract(model)
    mx.random.seed(7)
    expected = mx.random.normal((3,))
    mx.random.seed(7)
    mount(model, adapter, difference=True)
    assert mx.array_equal(mx.random.normal((3,)), expected).item()


# -- paths and counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vera", "pissa", "input side", "tokens", "modules_to_save"])
def test_an_adapter_does_not_change_what_can_be_adapted(name):
    model = make()
    before = list(adaptable(model))
    attach(model, settings(name))
    assert list(adaptable(model)) == before


def test_shared_projections_are_counted_once():
    model = make_model()
    base = room.parameter_counts(model)[1]
    attach(model, settings("vera"))
    trained, total = room.parameter_counts(model)
    assert trained == 3 * (16 + 64 + 16 + 64)
    assert total - base - trained == 16 * (128 + 64), "one pair for the largest layer"


def test_a_layer_that_a_model_uses_twice_is_counted_once():
    counts = []
    for base in BASES:
        model = make(base, LLAMA)
        before = room.parameter_counts(model)[1]
        model.model.layers[2] = model.model.layers[1]
        counts.append((before, room.parameter_counts(model)[1]))
    assert counts[0] == counts[1] and counts[0][0] > counts[0][1]


def test_tied_embeddings_keep_the_head(tokens):
    """The head's embedding inside UntiedEmbedding is found by set_dtype, and is no module of the base."""
    model = make("4-bit", TIED)
    head = model.model.embed_tokens
    attach(model, settings("input side"))
    assert model.model.embed_tokens.head is head
    assert not any(".head" in path for path in adaptable(model))


def test_an_untied_embedding_is_fused_over_a_quantized_one(tokens):
    model = make("4-bit", LLAMA)
    attach(model, settings("input side"))
    train(model)
    live = model(tokens)
    fuse(model, dequantize=True)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert_close(model(tokens), live, 2e-5)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (dict(rank=4, modules_to_save=("lm_head",)), lambda model: model.lm_head.weight.__imul__(2)),
        (dict(method="full", num_layers=1), lambda model: model.layers[-1].mlp.up_proj.weight.__imul__(2)),
    ],
    ids=["modules_to_save", "full"],
)
def test_a_change_in_place_does_not_reach_the_originals(config, change, tokens):
    model = make()
    before = model(tokens)
    attach(model, AdapterConfig(**config))
    change(model)
    assert relative(model(tokens), before) > 1e-3
    with disable_adapter(model):
        assert_close(model(tokens), before, 1e-6)
    unmount(model)
    assert_close(model(tokens), before, 1e-6)


def test_the_mode_of_the_base_stays():
    model = make("4-bit")
    q_proj = model.layers[0].self_attn.q_proj
    q_proj.train()
    attach(model.eval(), AdapterConfig(rank=4))
    q_proj.train()
    mode = q_proj.training
    adapter = extract(model)
    mount(model, adapter)
    unmount(model)
    assert q_proj.training == mode
