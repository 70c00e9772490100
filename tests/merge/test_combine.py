"""Merging adapters: cat and svd equal the weighted sum, the other methods follow their rules. See also judge/."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from conftest import LLAMA, QWEN3_MOE, assert_close, make_model, shake
from mlx_lora import AdapterConfig, attach, extract, load_adapter, merge_adapters, mount, save_adapter, unmount
from mlx_lora.base.modules import dense_weight
from mlx_lora.cli import merge as command
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.merge.combine import MERGES, _Rule
from mlx_lora.model.attach import adapters_on


def make(model, seed, **config):
    attach(model, AdapterConfig(**{"rank": 4, "scale": 2.0, "num_layers": -1, **config}))
    shake(model, seed)
    adapter = extract(model)
    updates = {p: m.merged_weight(dense_weight(m.base)) - dense_weight(m.base) for p, m in adapters_on(model).items()}
    unmount(model)
    return adapter, updates


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["llama", "moe"])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_svd_are_the_weighted_sum(method, config, tokens):
    model = make_model(config)
    keys = ["q_proj", "down_proj", "model.embed_tokens"]
    one, first = make(model, 1, keys=keys)
    two, second = make(model, 2, keys=keys[1:], rank=6, alpha=3, scale=None, scale_pattern={"1.*down_proj": 0.3})
    merged = merge_adapters([one, two], [0.7, -1.3], method, **({"rank": 10} if method == "svd" else {}))
    mount(model, merged.check())
    for path, layer in adapters_on(model).items():
        expected = 0.7 * first[path] - (1.3 * second[path] if path in second else 0)
        base = dense_weight(layer.base)
        assert_close(layer.merged_weight(base) - base, expected, 2e-5, path)


@pytest.mark.parametrize(
    ("method", "sign", "expected"),
    [
        # Half of the values are kept: [0, -3, 4, 0], [5, 0, 0, -2], [0, -1, 0, 6]; signs by sum +, -, +, +.
        ("ties", "total", [5, -2, 4, 6]),
        ("ties", "frequency", [5, -2, 4, 6]),
        ("magnitude_prune", "total", [5, -4, 4, 4]),
    ],
)
def test_rules_by_hand(method, sign, expected):
    tensors = [np.array(t, np.float32) for t in ([1, -3, 4, 2], [5, 1, 0.5, -2], [0.1, -1, 0.2, 6])]
    got = _Rule(method, 0.5, sign, np.random.RandomState(0))(tensors, [1.0, 1.0, 1.0])
    assert got.tolist() == expected


def test_svd_is_the_best_approximation_of_its_rank(tokens):
    model = make_model()
    (one, first), (two, second) = make(model, 1, keys=["q_proj"]), make(model, 2, keys=["q_proj"])
    merged = merge_adapters([one, two], method="svd", rank=3)
    mount(model, merged)
    for path, layer in adapters_on(model).items():
        total = np.array(first[path] + second[path])
        kept = np.array(layer.merged_weight(dense_weight(layer.base)) - dense_weight(layer.base))
        s = np.linalg.svd(total, compute_uv=False)
        assert np.linalg.norm(total - kept) <= 1.0001 * np.linalg.norm(s[3:])


def test_every_method_runs_and_saves(tmp_path):
    model = make_model(QWEN3_MOE)
    keys = ["v_proj", "switch_mlp.down_proj"]
    (one, _), (two, _) = make(model, 1, num_layers=1, keys=keys), make(model, 2, num_layers=1, keys=keys)
    for method in MERGES:
        density = None if method in ("linear", "cat", "svd") else 0.5
        merged = merge_adapters([one, two], [0.5, 0.5], method, density=density)
        save_adapter(merged, tmp_path / method)
        mount(model, load_adapter(tmp_path / method))
    again = merge_adapters([one, two], [0.5, 0.5], "dare_linear", density=0.5, seed=0)
    other = merge_adapters([one, two], [0.5, 0.5], "dare_linear", density=0.5, seed=1)
    stored = load_adapter(tmp_path / "dare_linear")
    assert all(mx.array_equal(again.weights[n], w).item() for n, w in stored.weights.items())
    assert not all(mx.array_equal(again.weights[n], w).item() for n, w in other.weights.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(method="add"), "method must be one of"),
        (dict(weights=[1.0]), "1 weights for 2 adapters"),
        (dict(weights=[1.0, float("nan")]), "weights must be numbers"),
        (dict(weights=[0, 0]), "every weight is 0"),
        (dict(method="ties"), "give density"),
        (dict(method="cat", density=0.5), "density is for"),
        (dict(method="ties", density=1.5), "density must be"),
        (dict(method="cat", rank=3), "rank is for svd"),
        (dict(method="svd", sign="frequency"), "sign is for ties"),
        (dict(method="svd", clamp=2.0), "clamp"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_invalid_settings_are_refused(arguments, said):
    adapter, _ = make(make_model(), 1)
    with pytest.raises(ConfigError, match=said):
        merge_adapters([adapter, adapter], **arguments)


def test_adapters_that_cannot_be_merged():
    model = make_model()
    plain, _ = make(model, 1)
    for config, said in [
        (dict(method="dora"), "its method is dora"),
        (dict(method="vera", rank=8, scale=None), "as_lora"),
        (dict(modules_to_save=["norm"]), "more than low-rank"),
    ]:
        attach(model, AdapterConfig(**config))
        other = extract(model)
        unmount(model)
        with pytest.raises(AdapterError, match=said):
            merge_adapters([plain, other])
    wide, _ = make(make_model(hidden_size=128), 1)
    with pytest.raises(AdapterError, match="different size"):
        merge_adapters([plain, wide], method="cat")
    with pytest.raises(AdapterError, match="one rank"):
        merge_adapters([plain, make(model, 2, rank=5)[0]], method="linear")


def test_the_command(tmp_path):
    assert command.METHODS == MERGES
    model = make_model()
    for seed, name in ((1, "a"), (2, "b")):
        save_adapter(make(model, seed)[0], tmp_path / name)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    done = CliRunner().invoke(
        command.merge, [*folders, "--weights", "0.7,0.3", "--to", "peft", "--save-path", str(tmp_path / "c"), "--json"]
    )
    assert done.exit_code == 0 and '"event": "Merged"' in done.output, done.output
    assert load_adapter(tmp_path / "c").rank_of("model.layers.0.self_attn.q_proj") == 4
    for arguments in (["--weights", "1"], ["--method", "ties"]):
        assert CliRunner().invoke(command.merge, [*folders, *arguments, "--save-path", str(tmp_path / "d")]).exception
