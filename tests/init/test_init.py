"""Initialisations: the model first computes the same, and the extracted adapter works on the unchanged base."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, numbers, relative
from mlx_lora import AdapterConfig, attach, config, extract, fuse, load_adapter, mount, quantize, save_adapter, unmount
from mlx_lora.base.decompositions import randomized_svd
from mlx_lora.base.modules import dense_weight
from mlx_lora.errors import AdapterError, ConfigError, DataError
from mlx_lora.fast import accelerate
from mlx_lora.init import FROM_DATA, INITS, SUBTRACTED, init_of
from mlx_lora.init.eva import IncrementalSVD
from mlx_lora.init.loftq import loftq_pair
from mlx_lora.model.attach import adapters_on
from mlx_lora.training.losses.cross_entropy import loss as loss_fn

Q4 = dict(group_size=32, bits=4)
KEYS = ["q_proj", "down_proj"]
NAMES = ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "lora_ga"]


def test_the_table_has_a_row_for_every_name():
    assert {"default", *INITS} == set(config.INITS)
    assert FROM_DATA == ("eva", "lora_ga") and SUBTRACTED == ("pissa", "olora", "lora_ga")
    assert init_of(AdapterConfig(init="pissa_niter_4")) is INITS["pissa"]
    assert [name for name, row in INITS.items() if row.needs_reference] == ["loftq"]


@dataclass
class Batch:
    tokens: np.ndarray
    mask: np.ndarray


def batches(count=3, vocabulary=96):
    random = np.random.default_rng(0)
    for _ in range(count):
        tokens = random.integers(0, vocabulary, (4, 17))
        mask = np.ones((4, 16), bool)
        mask[0, 9:] = False
        yield Batch(tokens, mask)


def attached(init: str, base: str = "dense", family: dict = LLAMA, **settings):
    model = make_model(family, quantize=Q4 if base == "4-bit" else None)
    if base == "nf4":
        quantize(model, "nf4", double_quant=True)
    accelerate(model)
    settings = {"rank": 4, "scale": 2.0, "keys": KEYS, "num_layers": -1, **settings}
    data = batches() if init in FROM_DATA else None
    mx.random.seed(5)
    before = model(mx.array([[1, 5, 9, 33]]))
    attach(model, AdapterConfig(init=init, **settings), data)
    return model, before


def train_a_little(model, size=0.02):
    """Change every trained parameter slightly."""
    mx.random.seed(8)
    for layer in adapters_on(model).values():
        for leaf in layer.leaves:
            layer[leaf] = layer[leaf] + size * mx.random.normal(layer[leaf].shape)


@pytest.mark.parametrize("base", ["dense", "4-bit", "nf4"])
@pytest.mark.parametrize("init", NAMES)
def test_attach_is_the_identity_and_the_adapter_is_portable(init, base, tokens, tmp_path):
    if init == "lora_ga" and base != "dense":
        pytest.skip("quantized weights have no gradient")
    model, before = attached(init, base)
    assert_close(model(mx.array([[1, 5, 9, 33]])), before, 1e-5, "the model changed")
    names = {n.rpartition(".")[2] for n, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"lora_a", "lora_b"}
    train_a_little(model)
    live = model(tokens)
    adapter = extract(model)
    doubled = init.startswith(SUBTRACTED)
    ranks = {adapter.rank_of(path) for path in adapter.modules}
    assert ranks == {8} if doubled else init == "eva" or ranks == {4}
    assert adapter.config.init == "default"
    save_adapter(adapter, tmp_path / "native")
    unmount(model)
    for folder in [
        save_adapter(adapter, tmp_path / "native", overwrite=True),
        save_adapter(adapter, tmp_path / "p", "peft"),
    ]:
        mount(model, load_adapter(folder))
        assert_close(model(tokens), live, 2e-5, folder.name)
    fuse(model, dtype="float32")
    assert_close(model(tokens), live, 2e-5, "fused")


@pytest.mark.parametrize("init", NAMES)
def test_gradients_are_those_of_plain_lora(init, tokens):
    model, _ = attached(init)
    train_a_little(model, 0.05)
    layer = next(iter(adapters_on(model).values()))
    x = mx.random.normal((3, 5, layer.lora_a.shape[0]))
    target = mx.random.normal((3, 5, layer.lora_b.shape[1]))
    frozen = (layer.frozen_a, layer.frozen_b) if "frozen_a" in layer else None

    def ours(p):
        layer.update(p)
        return (layer(x) * target).sum()

    def plain(p):
        weight = layer.linear.weight + layer.scale * (p["lora_a"] @ p["lora_b"]).T
        if frozen:
            weight = weight - layer.scale * (frozen[0] @ frozen[1]).T
        return (x @ weight.T * target).sum()

    p = {leaf: layer[leaf] for leaf in layer.leaves}
    got, expected = mx.grad(ours)(p), mx.grad(plain)(p)
    for leaf in p:
        assert mx.abs(got[leaf]).max().item() > 0
        assert_close(got[leaf], expected[leaf], 1e-5, leaf)


def test_pissa_is_the_best_approximation_of_its_rank():
    for init in ("pissa", "pissa_niter_8"):
        model, _ = attached(init, scale=3.0)
        for layer in adapters_on(model).values():
            weight = numbers(layer.linear.weight)
            update = 3.0 * numbers(layer.lora_a @ layer.lora_b).T
            s = np.linalg.svd(weight, compute_uv=False)
            error = np.linalg.norm(weight - update) / np.sqrt((s[4:] ** 2).sum())
            assert 1 - 1e-4 < error < (1.0001 if init == "pissa" else 1.05), init
            # Both factors have the square roots of the singular values.
            assert_close(mx.linalg.norm(layer.lora_a, axis=0), mx.linalg.norm(layer.lora_b, axis=1), 1e-4)


def test_olora_is_qr():
    model, _ = attached("olora")
    for layer in adapters_on(model).values():
        b = numbers(layer.lora_b)
        assert_close(b @ b.T, np.eye(4), 1e-5)
        q, r = np.linalg.qr(numbers(layer.linear.weight))
        assert_close(layer.lora_b, q[:, :4].T, 1e-5)
        assert_close(layer.lora_a, r[:4].T, 1e-5)


def test_orthogonal_and_gaussian():
    model, _ = attached("orthogonal")
    for layer in adapters_on(model).values():
        assert mx.abs(layer.lora_b).max() > 0.01
        assert mx.abs(layer.lora_a @ layer.lora_b).max().item() < 1e-6
    with pytest.raises(ConfigError, match="even rank"):
        attached("orthogonal", rank=5)
    model, _ = attached("gaussian", rank=8)
    a = np.concatenate([numbers(layer.lora_a).ravel() for layer in adapters_on(model).values()])
    assert abs(a.std() - 1 / 8) < 0.01


def test_experts_and_embeddings(tokens):
    keys = ["switch_mlp.up_proj", "q_proj"]
    for init in ("pissa", "olora", "orthogonal"):
        model, before = attached(init, family=QWEN3_MOE, keys=keys)
        assert_close(model(mx.array([[1, 5, 9, 33]])), before, 2e-5)
        train_a_little(model)
        live = model(tokens)
        mount(model, extract(model))
        assert_close(model(tokens), live, 2e-5, init)
        fuse(model, dtype="float32")
        assert_close(model(tokens), live, 2e-5, init)
    with pytest.raises(AdapterError, match="embed_tokens: init pissa"):
        attached("pissa", keys=["model.embed_tokens"])
    attached("gaussian", keys=["model.embed_tokens"])


# -- EVA --------------------------------------------------------------------------------------------------------------


def test_the_incremental_svd_equals_the_svd_of_all_rows():
    random = np.random.default_rng(1)
    data = (random.normal(size=(400, 6)) * [9, 7, 5, 3, 2, 1]) @ random.normal(size=(6, 24)) + random.normal(size=24)
    data = data.astype(np.float32)
    inner = IncrementalSVD(8)
    for start in range(0, 400, 50):
        inner.add(data[start : start + 50])
    centred = data - data.mean(axis=0)
    _, s, v = np.linalg.svd(centred, full_matrices=False)
    cosine = np.abs((inner.components[:6] * v[:6]).sum(axis=1))
    assert cosine.min() > 0.9999
    assert np.allclose(inner.ratio[:6], s[:6] ** 2 / (s**2).sum(), rtol=1e-3)


def test_eva_distributes_the_total_rank():
    model, _ = attached("eva", rank=4, eva_rho=2.0)
    ranks = {path: layer.rank for path, layer in adapters_on(model).items()}
    assert sum(ranks.values()) == 4 * 6 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    assert {layer.scale for layer in adapters_on(model).values()} == {2.0}, "alpha must grow with the rank"
    for layer in adapters_on(model).values():
        a = numbers(layer.lora_a)
        assert_close(a.T @ a, np.eye(layer.rank), 1e-4)
    even, _ = attached("eva", rank=4, eva_rho=1.0)
    assert {layer.rank for layer in adapters_on(even).values()} == {4}


def test_eva_with_rslora_keeps_the_size_of_gradients():
    model, _ = attached("eva", rank=4, scale=None, alpha=8, rslora=True)
    for layer in adapters_on(model).values():
        assert layer.scale == pytest.approx(8 * layer.rank / 4 / np.sqrt(layer.rank))


def test_layers_with_the_same_input_get_the_same_directions():
    model, _ = attached("eva", keys=["q_proj", "v_proj"], eva_rho=1.0)
    layers = adapters_on(model)
    assert mx.array_equal(
        layers["model.layers.0.self_attn.q_proj"].lora_a, layers["model.layers.0.self_attn.v_proj"].lora_a
    ).item()


def test_what_eva_and_lora_ga_refuse():
    model = make_model()
    with pytest.raises(ConfigError, match="needs data"):
        attach(model, AdapterConfig(init="eva", keys=KEYS))
    with pytest.raises(DataError, match="more data"):
        attach(model, AdapterConfig(init="eva", keys=KEYS, rank=32), batches(1))
    with pytest.raises(AdapterError, match="cannot initialise switch"):
        attach(make_model(QWEN3_MOE), AdapterConfig(init="eva"), batches())
    with pytest.raises(AdapterError, match="quantized weights"):
        attached("lora_ga", "4-bit")
    with pytest.raises(AdapterError, match="twice the rank"):
        attached("lora_ga", rank=33)
    assert not adapters_on(model)


def test_lora_ga_follows_the_gradient():
    model, _ = attached("lora_ga", rank=8, keys=["down_proj"])
    layer = adapters_on(model)["model.layers.2.mlp.down_proj"]
    plain = make_model()
    weight = plain.layers[2].mlp.down_proj.weight
    plain.freeze()
    plain.layers[2].mlp.down_proj.unfreeze()

    def loss(w):
        plain.layers[2].mlp.down_proj.weight = w
        sums = [loss_fn(plain, b.tokens, b.mask) for b in batches()]
        return sum(s for s, _ in sums) / sum(n for _, n in sums)

    _, s, v = np.linalg.svd(numbers(mx.grad(loss)(weight)))
    cosine = np.abs((numbers(layer.lora_a).T * v[:8]).sum(axis=1))
    assert cosine.min() > 0.999
    expected = s[8:16] * 64**0.25 / 4
    assert_close(mx.linalg.norm(layer.lora_b, axis=1), expected, 1e-3)


# -- LoftQ ------------------------------------------------------------------------------------------------------------


def test_loftq_is_closer_to_the_weights_than_quantizing():
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 128)).astype(np.float32) * 0.05

    def through(w):
        q, s, b = mx.quantize(mx.array(w), 32, 2)
        return np.array(mx.dequantize(q, s, b, 32, 2))

    plain = np.linalg.norm(weight - through(weight))
    errors = []
    for rounds in (1, 5):
        (a, b), target = loftq_pair(weight, through, 8, 2.5, rounds)
        errors.append(np.linalg.norm(weight - through(target) - 2.5 * (b @ a)))
    assert errors[1] < errors[0] < plain


@pytest.mark.parametrize("base", ["4-bit", "nf4"])
def test_loftq_with_a_reference(base, tokens):
    reference = make_model()
    model = make_model(quantize=Q4 if base == "4-bit" else None)
    if base == "nf4":
        quantize(model, "nf4")
    accelerate(model)
    exact, before = reference(tokens), relative(model(tokens), reference(tokens))
    attach(model, AdapterConfig(init="loftq", rank=16, scale=3.0, num_layers=-1), reference=reference)
    assert relative(model(tokens), exact) < 0.9 * before
    for path, layer in adapters_on(model).items():
        exact_weight = dict(reference.named_modules())[path].weight
        left = mx.linalg.norm(exact_weight - layer.merged_weight(dense_weight(layer.base)))
        assert (left / mx.linalg.norm(exact_weight - dense_weight(layer.base))).item() < 0.9
    with pytest.raises(ConfigError, match="loftq"):
        attach(make_model(), AdapterConfig(init="loftq"))


def test_randomized_svd_finds_the_largest_singular_values():
    random = np.random.default_rng(0)
    matrix = (random.normal(size=(40, 6)) * [9, 8, 7, 6, 5, 4]) @ random.normal(size=(6, 50)) + 0.01
    _, s, _ = randomized_svd(matrix.astype(np.float32), 6, 3)
    assert np.allclose(s, np.linalg.svd(matrix, compute_uv=False)[:6], rtol=1e-3)
