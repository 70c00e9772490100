"""Adapters on disk: PEFT's folders against PEFT's own logits, mlx-lm's against mlx-lm, new formats, what is refused.

The golden numbers are made by scripts/make_peft_fixtures.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora import AdapterConfig, load_adapter, mount, save_adapter, save_model
from mlx_lora.adapter import Adapter
from mlx_lora.errors import AdapterError, ConfigError, FormatError, MLXLoRAError, ModelError
from mlx_lora.formats import describe, detect_format

import mlx.core as mx  # isort: skip  (mlx_lora opens a BLAS before MLX is imported)
import numpy as np
from mlx.utils import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures" / "peft"
REAL = ROOT.parent.parent / "shared" / "data" / "adapters"
MODELS = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def is_plain(folder: Path) -> bool:
    """LoRA or DoRA of linear layers. PEFT's other adapters are in test_conversion.py."""
    config = json.loads((folder / "adapter_config.json").read_text())
    extras = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "fan_in_fan_out")
    plain = config["peft_type"] == "LORA" and config["bias"] == "none" and not any(config.get(e) for e in extras)
    return plain and not {"embed_tokens", "lm_head", "kv_b_proj"} & set(config["target_modules"])


ADAPTERS = [
    f"{m}/{a.name}" for m in MODELS for a in sorted((FIXTURES / m).iterdir()) if a.name != "base" and is_plain(a)
]
TOLERANCE = 5e-6  # max |difference| / max |logit|; measured: 3e-6
INPUT = mx.array(np.load(FIXTURES / "input_ids.npy"))


def load(model: str | Path):
    return mlx_lora.load(FIXTURES / model / "base", dtype="float32")[0]


def logits(model) -> np.ndarray:
    return np.array(model(INPUT).astype(mx.float32))


def golden(name: str) -> np.ndarray:
    return np.load(FIXTURES / name / "logits.npy")


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def assert_equal(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    worst, mean = difference(got, expected), float(np.abs(got - expected).mean() / np.abs(expected).max())
    assert worst <= tolerance, f"max difference {worst:.2e}, mean {mean:.2e}, tolerance {tolerance:.0e}"


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, folder))


def edit_config(folder: Path, **changes) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def tensors(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, mx.array]:
    return mx.load(str(folder / name))


def edit_tensors(folder: Path, change, name: str = "adapter_model.safetensors") -> Path:
    arrays = change(tensors(folder, name))
    mx.eval(arrays)
    mx.save_safetensors(str(folder / name), arrays)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def saved_bases(tmp_path_factory):
    """Each fixture's base as ``save_model`` writes it: what plain mlx-lm can load."""
    root = tmp_path_factory.mktemp("bases")
    return {name: save_model(load(name), root / name) for name in MODELS}


def mixed_adapter(dtype=mx.float32, method: str = "lora") -> Adapter:
    """Ranks 2 to 5 and three scales over the llama fixture."""
    mx.random.seed(3)
    sizes = {
        "q_proj": (32, 64, 2, 1.7),
        "k_proj": (32, 32, 5, 0.3),
        "o_proj": (64, 32, 3, 1.7),
        "v_proj": (32, 32, 4, -2),
    }
    weights, ranks, scales = {}, {}, {}
    for layer in range(2):
        for name, (rows, columns, rank, scale) in sizes.items():
            path = f"model.layers.{layer}.self_attn.{name}"
            weights[f"{path}.lora_a"] = (mx.random.normal((rows, rank)) / rows**0.5).astype(dtype)
            weights[f"{path}.lora_b"] = (mx.random.normal((rank, columns)) * 0.1).astype(dtype)
            if method == "dora":
                weights[f"{path}.m"] = mx.random.uniform(0.7, 1.3, (columns,))
            ranks[f"^{path}"], scales[f"^{path}"] = rank, scale
    mx.eval(weights)
    return Adapter(AdapterConfig(method=method, num_layers=-1, rank_pattern=ranks, scale_pattern=scales), weights)


# -- PEFT: the golden logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_base_agrees_with_transformers(model):
    assert_equal(logits(load(model)), golden(f"{model}/base"))


@pytest.mark.parametrize("model", MODELS)
def test_saved_base_loads_in_mlx_lora_and_in_plain_mlx_lm(model, saved_bases):
    import mlx_lm

    assert_equal(logits(mlx_lora.load(saved_bases[model], dtype="float32")[0]), golden(f"{model}/base"))
    assert_equal(logits(mlx_lm.load(str(saved_bases[model]))[0]), golden(f"{model}/base"))


@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma2", "phi3"])
def test_without_the_older_fields_the_rotary_settings_are_lost(model, monkeypatch):
    """The control of the two tests above: plain mlx-lm silently computes something else."""
    monkeypatch.setattr("mlx_lora.base.loading.missing_fields", lambda config: {})
    assert difference(logits(load(model)), golden(f"{model}/base")) > 1e-2


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_adapter_gives_pefts_logits_live_and_fused(name):
    model = load(name.split("/")[0])
    mount(model, load_adapter(FIXTURES / name))
    assert_equal(logits(model), golden(name))
    assert difference(logits(model), golden(f"{name.split('/')[0]}/base")) > 0.1
    mlx_lora.fuse(model)
    assert_equal(logits(model), golden(name))


def swapped(adapter: Adapter) -> Adapter:
    """A and B exchanged on the square layers: the shapes are right, the update is transposed."""
    weights = dict(adapter.weights)
    for path in adapter.modules:
        a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
        if a.shape == b.T.shape:
            weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = b.T, a.T
    return replace(adapter, weights=weights)


def without_a_module(adapter: Adapter) -> Adapter:
    gone = adapter.modules[-1] + "."
    return replace(adapter, weights={k: v for k, v in adapter.weights.items() if not k.startswith(gone)})


def scale_off(adapter: Adapter) -> Adapter:
    return replace(adapter, config=replace(adapter.config, scale=adapter.config.scale * 1.01))


def magnitudes_off(adapter: Adapter) -> Adapter:
    return replace(adapter, weights={k: v * 1.01 if k.endswith(".m") else v for k, v in adapter.weights.items()})


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("llama/lora", swapped),
        ("llama/lora", without_a_module),
        ("llama/lora", scale_off),
        ("llama/dora", magnitudes_off),
        ("llama/dora", scale_off),
        ("phi3/rslora", scale_off),
    ],
)
def test_a_damaged_adapter_would_fail_the_comparison(name, damage):
    model = load(name.split("/")[0])
    mount(model, damage(load_adapter(FIXTURES / name)))
    assert difference(logits(model), golden(name)) > 100 * TOLERANCE


def peft_scales(folder: Path) -> dict[str, float]:
    """The multipliers by PEFT's rule, implemented a second time for this test."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def lookup(patterns, path, default):
        return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", path)), default)

    scales = {}
    for name in tensors(folder):
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = lookup(config.get("rank_pattern"), path, config["r"])
        alpha = lookup(config.get("alpha_pattern"), path, config["lora_alpha"])
        scales[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_to_ours_to_peft_is_bit_equal(name, tmp_path):
    adapter = load_adapter(FIXTURES / name)
    save_adapter(adapter, tmp_path / "out", format="peft")
    before = {key.replace(".default", ""): array for key, array in tensors(FIXTURES / name).items()}
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    expected, got = peft_scales(FIXTURES / name), peft_scales(tmp_path / "out")
    assert got == pytest.approx(expected, rel=1e-12)
    # The second implementation also checks the scales that were read.
    assert {path: adapter.config.scale_of(path) for path in adapter.modules} == pytest.approx(expected, rel=1e-12)


def test_peft_config_selects_exactly_the_adapted_modules(tmp_path):
    def targets(name):
        save_adapter(load_adapter(FIXTURES / name), tmp_path / name, format="peft")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        return config["target_modules"], config.get("layers_to_transform")

    assert targets("llama/qv_layer1") == (["self_attn.q_proj", "self_attn.v_proj"], [1])
    adapter = without_a_module(load_adapter(FIXTURES / "llama/lora"))
    save_adapter(adapter, tmp_path / "uneven", format="peft")
    config = json.loads((tmp_path / "uneven" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(adapter.modules) and "layers_to_transform" not in config
    # One layer in each of two towers: relative names and layer numbers would select four modules.
    paths = ["language_model.layers.0.fc", "vision_tower.layers.1.fc"]
    weights = {f"{p}.lora_{leaf}": mx.ones((2, 2)) for p in paths for leaf in "ab"}
    save_adapter(Adapter(AdapterConfig(rank=2, num_layers=-1), weights), tmp_path / "towers", format="peft")
    assert json.loads((tmp_path / "towers" / "adapter_config.json").read_text())["target_modules"] == paths


def test_peft_alpha_is_written_as_an_integer_where_it_is_one(tmp_path):
    save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "a", format="peft")
    assert '"lora_alpha": 16,' in (tmp_path / "a" / "adapter_config.json").read_text()


def test_peft_init_is_never_written_back(tmp_path):
    """PEFT would apply EVA's or PiSSA's initialisation to the base again."""
    folder = edit_config(copy_of("llama/lora", tmp_path / "eva"), init_lora_weights="eva")
    save_adapter(load_adapter(folder), tmp_path / "out", format="peft")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize("config", sorted((REAL / "peft-configs").glob("*.json")), ids=lambda path: path.name[:24])
def test_real_peft_configs_are_read(config, tmp_path):
    """Published configs, with tensors made for their rank."""
    raw = json.loads(config.read_text())
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(config, folder / "adapter_config.json")
    stem, rank = "base_model.model.model.layers.0.mlp.up_proj.", raw["r"]
    arrays = {f"{stem}lora_A.weight": mx.ones((rank, 96)), f"{stem}lora_B.weight": mx.ones((80, rank))}
    if raw["use_dora"]:
        arrays[f"{stem}lora_magnitude_vector"] = mx.ones(80)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
    adapter = load_adapter(folder)
    expected = raw["lora_alpha"] / (math.sqrt(rank) if raw["use_rslora"] else rank)
    assert adapter.config.scale_of("model.layers.0.mlp.up_proj") == pytest.approx(expected)
    assert adapter.config.method == ("dora" if raw["use_dora"] else "lora")


# -- the native folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama/lora", "llama/rslora", "llama/dora", "llama/dropout_bf16", "phi3/rslora"])
def test_native_round_trip_of_a_uniform_adapter_is_bit_equal(name, tmp_path):
    adapter = load_adapter(FIXTURES / name)
    save_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    assert again.weights.keys() == adapter.weights.keys()
    assert all(same_bits(again.weights[k], adapter.weights[k]) for k in adapter.weights)
    for path in adapter.modules:
        assert again.config.scale_of(path) == adapter.config.scale_of(path)
    assert (again.config.method, again.config.dropout) == (adapter.config.method, adapter.config.dropout)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_native_round_trip_of_mixed_ranks_and_scales(method, dtype, tmp_path):
    adapter = mixed_adapter(dtype, method)
    save_adapter(adapter, tmp_path / "out")
    again, model = load_adapter(tmp_path / "out"), load("llama")
    mount(model, adapter)
    expected = logits(model)
    mount(model, again)
    assert_equal(logits(model), expected, 1e-6)
    for path in adapter.modules:
        assert again.rank_of(path) == adapter.rank_of(path)
        assert again.config.scale_of(path) == adapter.config.scale_of(path)
    if dtype != mx.float32:  # folding in float32 keeps every bit of half precision
        assert all(same_bits(again.weights[k], adapter.weights[k]) for k in adapter.weights)


def mlx_lm_logits(base: Path, adapter: Path) -> np.ndarray:
    import mlx_lm

    return logits(mlx_lm.load(str(base), adapter_path=str(adapter))[0])


@pytest.mark.parametrize("name", ADAPTERS)
def test_native_folder_gives_pefts_logits_in_plain_mlx_lm(name, tmp_path, saved_bases):
    save_adapter(load_adapter(FIXTURES / name), tmp_path / "native")
    assert_equal(mlx_lm_logits(saved_bases[name.split("/")[0]], tmp_path / "native"), golden(name))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_native_folder_of_mixed_ranks_and_scales_in_plain_mlx_lm(method, dtype, tmp_path, saved_bases):
    adapter, model = mixed_adapter(dtype, method), load("llama")
    save_adapter(adapter, tmp_path / "native")
    mount(model, adapter)
    # mlx-lm takes the norms of a DoRA layer in the adapter's dtype, ours in float32.
    tolerance = 5e-3 if method == "dora" and dtype == mx.bfloat16 else TOLERANCE
    assert_equal(mlx_lm_logits(saved_bases["llama"], tmp_path / "native"), logits(model), tolerance)


@pytest.mark.parametrize(
    ("fine_tune_type", "num_layers", "keys"),
    [
        ("lora", 1, None),
        ("lora", 0, ["self_attn.q_proj", "mlp.down_proj"]),
        ("lora", -1, ["self_attn.k_proj", "lm_head", "model.embed_tokens"]),
        ("dora", 2, None),
    ],
)
def test_folder_made_by_mlx_lm(fine_tune_type, num_layers, keys, tmp_path, saved_bases):
    import mlx_lm
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(11)
    model, _ = mlx_lm.load(str(saved_bases["llama"]))
    model.freeze()
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, num_layers, parameters, use_dora=fine_tune_type == "dora")
    trained = [(k, v + 0.1 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(trained, strict=False)
    model.eval()
    folder = tmp_path / "adapters"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))
    config = {"fine_tune_type": fine_tune_type, "num_layers": num_layers, "lora_parameters": parameters, "seed": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    ours = load("llama")
    mount(ours, load_adapter(folder))
    assert_equal(logits(ours), logits(model))
    again = save_adapter(mlx_lora.extract(ours), tmp_path / "again")
    assert_equal(mlx_lm_logits(saved_bases["llama"], again), logits(model))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/adapters")
def test_real_mlx_lm_adapter_gives_mlx_lms_logits():
    """An adapter of Qwen2.5-0.5B, over layers of its size: random where it sits, zeros (quicker) below."""
    from mlx_lm.models import qwen2
    from mlx_lm.tuner.utils import load_adapters

    folder = REAL / "mlx-lm-qwen2.5-0.5b"
    sizes = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 8, "num_attention_heads": 14}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-6, "model_type": "qwen2"}

    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(sizes))
    for layer in model.layers[:20]:
        layer.update(tree_map(mx.zeros_like, layer.parameters()))
    model.eval()
    base = logits(model)
    mount(model, load_adapter(folder))
    ours = logits(model)
    mlx_lora.unmount(model)
    assert_equal(logits(model), base, 0)
    theirs = load_adapters(model, str(folder))
    theirs.eval()
    assert_equal(ours, logits(theirs))
    assert difference(ours, base) > 1e-4
    assert describe(folder)["scale"] == [10.0]


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mlx-lm", "peft"])
def test_nothing_is_replaced_unless_asked(format, tmp_path):
    first, second = load_adapter(FIXTURES / "llama/lora"), load_adapter(FIXTURES / "llama/rslora")
    save_adapter(first, tmp_path / "out", format=format)
    before = contents(tmp_path / "out")
    with pytest.raises(FormatError, match="already holds"):
        save_adapter(second, tmp_path / "out", format=format)
    assert contents(tmp_path / "out") == before
    save_adapter(second, tmp_path / "out", format=format, overwrite=True)
    assert load_adapter(tmp_path / "out").modules == second.modules


def test_an_adapter_may_replace_the_one_it_was_read_from(tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "out")
    adapter = load_adapter(folder)  # its arrays still lie in the file
    save_adapter(adapter, folder, overwrite=True)
    expected = load_adapter(FIXTURES / "llama/lora").weights
    assert all(same_bits(load_adapter(folder).weights[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("there", "format"), [("mlx-lm", "peft"), ("peft", "mlx-lm")])
def test_an_adapter_is_never_written_beside_one_of_another_format(there, format, tmp_path):
    adapter = load_adapter(FIXTURES / "llama/lora")
    save_adapter(adapter, tmp_path / "out", format=there)
    before = contents(tmp_path / "out")
    with pytest.raises(FormatError, match=f"format {there}"):
        save_adapter(adapter, tmp_path / "out", format=format, overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.fixture
def full_disk():
    """No file may grow beyond 4 KB, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ["mlx-lm", "peft"])
def test_full_disk_leaves_the_folder_as_it_was(format, tmp_path, request):
    small, large = load_adapter(FIXTURES / "llama/dora_named_default"), load_adapter(FIXTURES / "llama/lora")
    save_adapter(small, tmp_path / "out", format=format)
    before = contents(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(FormatError, match="cannot be written"):
        save_adapter(large, tmp_path / "out", format=format, overwrite=True)
    with pytest.raises(FormatError, match="cannot be written"):
        save_adapter(large, tmp_path / "new", format=format)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_full_disk_leaves_a_saved_model_as_it_was(tmp_path, request):
    model = load("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    request.getfixturevalue("full_disk")
    with pytest.raises(ModelError, match="cannot be written"):
        save_model(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out/kept.txt": b"kept"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_saved_model_replaces_all_of_another(tmp_path):
    model = load("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.json").write_text("{}")
    with pytest.raises(ModelError, match="already exists"):
        save_model(model, tmp_path / "out")
    save_model(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "stale.json").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_model_is_never_saved_over_its_base(tmp_path):
    copy_of("llama/base", tmp_path / "models" / "base")
    model, _ = mlx_lora.load(tmp_path / "models" / "base")
    for folder in (tmp_path / "models" / "base", tmp_path / "models"):
        with pytest.raises(ModelError, match="the base model itself"):
            save_model(model, folder, overwrite=True)


def test_a_failing_writer_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("mlx_lora.formats.mlx_lm.write_json", fail)
    with pytest.raises(ZeroDivisionError):
        save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_one_file_stops_the_whole_write(tmp_path):
    (tmp_path / "out" / "adapters.safetensors").mkdir(parents=True)
    with pytest.raises(FormatError, match="is a folder"):
        save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_writing_onto_a_file_or_in_an_unknown_format(tmp_path):
    adapter = load_adapter(FIXTURES / "llama/lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="is a file"):
        save_adapter(adapter, tmp_path / "file")
    with pytest.raises(ConfigError, match="unknown format 'pfet'"):
        save_adapter(adapter, tmp_path / "out", format="pfet")


@pytest.mark.parametrize(
    ("weights", "method", "said"),
    [
        ({"model.embed_tokens.lora_a": (64, 2), "model.embed_tokens.lora_b": (2, 32)}, "lora", "ties its output"),
        ({"x.embed.lora_a": (64, 2), "x.embed.lora_b": (2, 32), "x.embed.m": (64,)}, "dora", "magnitudes by token"),
        (
            {
                "x.switch_mlp.up_proj.lora_a": (4, 2, 8),
                "x.switch_mlp.up_proj.lora_b": (4, 8, 2),
                "x.switch_mlp.up_proj.m": (4, 8),
            },
            "dora",
            "no DoRA on experts",
        ),
        ({"model.layers.0.mlp.up_proj.weight": (4, 4)}, "full", "fully trained"),
    ],
)
def test_what_peft_folders_cannot_hold_is_refused(weights, method, said, tmp_path):
    adapter = Adapter(
        AdapterConfig(method=method, rank=None if method == "full" else 2, num_layers=-1),
        {k: mx.ones(shape) for k, shape in weights.items()},
    )
    with pytest.raises(FormatError, match=said):
        save_adapter(adapter, tmp_path / "out", format="peft")
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
        ({"peft_type": "IA3"}, "ia3 has no such array"),
        ({"peft_type": "OFT"}, "peft_type OFT"),
        ({"peft_type": "PREFIX_TUNING"}, "adds vectors to the prompt"),
        ({"peft_type": "VERA"}, "vera"),
        ({"peft_type": None}, "no peft_type"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"bias": "some"}, "bias 'some'"),
        ({"lora_bias": True}, "lora_bias missing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"monteclora_config": {}, "use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"use_dora": True}, "magnitudes are not"),
        ({"r": None}, "not a LoRA config"),
        ({"r": 0}, "not a LoRA config"),
        ({"r": "8"}, "adapter_config.json: rank must be"),
        ({"lora_alpha": 0}, "adapter_config.json: scale is 0"),
        ({"lora_dropout": 2}, "adapter_config.json: dropout"),
        ({"rank_pattern": {"q_proj(": 4}}, "not a LoRA config"),
        ({"rank_pattern": ["q_proj"]}, "not a LoRA config"),
        ({"r": 4}, "its arrays have rank 8, the config says 4"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items())[:40],
)
def test_peft_config_is_refused_by_name(changes, said, tmp_path):
    folder = edit_config(copy_of("llama/lora", tmp_path / "adapter"), **changes)
    with pytest.raises(MLXLoRAError, match=re.escape(said)):
        load_adapter(folder)


def added(name: str, *shape: int):
    return lambda arrays: {**arrays, name: mx.zeros(shape)}


def renamed(old: str, new: str):
    return lambda arrays: {k.replace(old, new): v for k, v in arrays.items()}


def replaced(name: str, array: mx.array):
    return lambda arrays: {**arrays, name: array}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (added("base_model.model.lm_head.lora_E", 4, 4), "lora_E: not an array of"),
        (added("base_model.model.model.embed_tokens.lora_embedding_A", 8, 64), "embed_tokens: lora_b missing"),
        (added(f"{Q}.lora_B.bias", 64), "lora_bias: lora has no such array"),
        (added(f"{Q}.ia3_l", 64), "ia3_l: lora has no such array"),
        (added(f"{Q}.lora_magnitude_vector", 64), "magnitudes are there"),
        (added(f"{Q}.lora_A.default.weight", 8, 32), "a second array"),
        (added("base_model.model.model.layers.0.mlp.experts.lora_A.weight", 8, 32), "target_parameters does not name"),
        (added("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", 8, 32), "experts 0, 1, 2 are"),
        (renamed("base_model.model.", ""), "not an array of"),
        (lambda arrays: {k: v for k, v in arrays.items() if k != f"{Q}.lora_B.weight"}, "q_proj: lora_b missing"),
        (lambda arrays: {}, "holds no arrays"),
        (replaced(f"{Q}.lora_A.weight", mx.zeros((4, 32))), "do not multiply"),
        (replaced(f"{Q}.lora_A.weight", mx.zeros((256,))), "expected two dimensions"),
        (replaced(f"{Q}.lora_A.weight", mx.zeros((0,))), "expected two dimensions"),
        (replaced(f"{Q}.lora_A.weight", mx.zeros((0, 32))), "empty arrays"),
        (replaced(f"{Q}.lora_A.weight", mx.full((8, 32), math.nan)), "NaN or infinite"),
        (replaced(f"{Q}.lora_B.weight", mx.full((64, 8), -math.inf)), "NaN or infinite"),
        (replaced(f"{Q}.lora_A.weight", mx.zeros((8, 32), mx.int32)), "not floats"),
    ],
)
def test_peft_tensors_are_refused_by_name(change, said, tmp_path):
    folder = edit_tensors(copy_of("llama/lora", tmp_path / "adapter"), change)
    with pytest.raises((FormatError, AdapterError), match=re.escape(said)):
        load_adapter(folder)


def test_dora_without_one_magnitude(tmp_path):
    gone = f"{Q}.lora_magnitude_vector"
    folder = edit_tensors(
        copy_of("llama/dora", tmp_path / "adapter"), lambda arrays: {k: v for k, v in arrays.items() if k != gone}
    )
    with pytest.raises(AdapterError, match="q_proj: m missing"):
        load_adapter(folder)


def test_all_faults_are_listed_in_one_error(tmp_path):
    folder = copy_of("llama/lora", tmp_path / "adapter")
    edit_config(folder, layer_replication=[[0, 2]], bias="some", use_qalora=True)
    with pytest.raises(FormatError) as caught:
        load_adapter(folder)
    assert all(word in caught.value.message for word in ("layer_replication", "'some'", "use_qalora"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-10], "not a complete safetensors file"),
        (lambda data: data[:100], "not a complete safetensors file"),
        (lambda data: b"", "not a complete safetensors file"),
        (lambda data: (2**62).to_bytes(8, "little") + data[8:], "not a complete safetensors file"),
        (lambda data: (10).to_bytes(8, "little") + data[8:], "not a complete safetensors file"),
        (lambda data: data + b"more", "not a complete safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "not a complete safetensors file"),
    ],
    ids=["truncated", "header-cut", "empty", "header-length-huge", "header-length-short", "trailing", "lfs-pointer"],
)
@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_damaged_weights(format, damage, said, tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "adapter", format=format)
    file = folder / {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}[format]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError, match=said):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list"),
        (b"\xff\xfe{}", "cannot be read"),
        (None, "adapter_config.json"),
    ],
    ids=["cut", "empty", "deep", "list", "not-utf8", "missing"],
)
@pytest.mark.parametrize("format", ["peft", "mlx-lm"])
def test_damaged_config(format, text, said, tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "adapter", format=format)
    file = folder / "adapter_config.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match=said):
        load_adapter(folder)


def test_a_bin_that_is_not_a_pytorch_file_is_refused(tmp_path):
    folder = copy_of("llama/lora", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="not a complete PyTorch file"):
        load_adapter(folder)


def test_a_folder_of_two_formats_needs_the_format_named(tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "both")
    shutil.copy(FIXTURES / "llama/lora" / "adapter_model.safetensors", folder)
    with pytest.raises(FormatError, match="mlx-lm and peft"):
        load_adapter(folder)
    assert load_adapter(folder, format="mlx-lm").modules
    with pytest.raises(FormatError, match="no peft_type"):
        load_adapter(folder, format="peft")


def test_paths_that_hold_no_adapter(tmp_path):
    for path, said in [
        (tmp_path / "none", "does not exist"),
        (Path(__file__), "a file of an unsupported format"),
        (tmp_path, "it has nothing"),
    ]:
        with pytest.raises(FormatError, match=said):
            load_adapter(path)
    with pytest.raises(ConfigError, match="unknown format"):
        load_adapter(FIXTURES / "llama/lora", format="gguf9")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "alpha": 16}, "lora_layers": 4}, "lora_layers with alpha"),
        ({"lora_parameters": None}, "lora_parameters is missing"),
        ({"lora_parameters": {"scale": 2.0}}, "no rank"),
        ({"lora_parameters": {"rank": 8}}, "no scale"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "rnak": 1}}, "unknown entries: rnak"),
        ({"lora_parameters": {"rank": "8", "scale": 2.0}}, "adapter_config.json: rank must be"),
        ({"lora_parameters": {"rank": 8, "scale": math.inf}}, "adapter_config.json: scale must be"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "rank_pattern": ["q"]}}, "adapter_config.json"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "keys": 5}}, "adapter_config.json"),
        ({"lora_parameters": {"rank": 16, "scale": 2.0}}, "rank 8, the config says 16"),
        ({"num_layers": "all"}, "adapter_config.json: num_layers"),
        ({"fine_tune_type": "qdora"}, "unknown fine_tune_type 'qdora'"),
        ({"fine_tune_type": "dora"}, "m missing"),
        ({"peft_type": "LORA", "lora_parameters": None}, "PEFT config, but the weights are mlx-lm's"),
    ],
)
def test_mlx_lm_config_is_refused_by_name(changes, said, tmp_path):
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "adapter")
    with pytest.raises(MLXLoRAError, match=re.escape(said)):
        load_adapter(edit_config(folder, **changes))


def test_the_unused_alpha_of_later_mlx_lm_is_ignored(tmp_path):
    """Until 2025-04 mlx-lm wrote alpha beside num_layers and never read it."""
    folder = save_adapter(load_adapter(FIXTURES / "llama/lora"), tmp_path / "adapter")
    edit_config(folder, lora_parameters={"rank": 8, "scale": 2.0, "alpha": 16})
    assert load_adapter(folder).config.scale_of("model.layers.0.self_attn.q_proj") == 2.0


def test_adapter_of_another_model_is_refused_and_the_model_stays_as_it_was():
    model = load("qwen2")
    for name in ("llama/lora", "phi3/rslora"):
        with pytest.raises(AdapterError, match="trained on tiny-"):
            mount(model, load_adapter(FIXTURES / name))
    assert_equal(logits(model), golden("qwen2/base"))


# -- describe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_describe(name, tmp_path):
    raw = json.loads((FIXTURES / name / "adapter_config.json").read_text())
    facts = describe(FIXTURES / name)
    native = describe(save_adapter(load_adapter(FIXTURES / name), tmp_path / "native"))
    assert (facts["format"], native["format"]) == ("peft", "mlx-lm") == (detect_format(FIXTURES / name), "mlx-lm")
    for key in ("method", "rank", "scale", "dropout", "modules", "targets", "layers", "parameters", "base", "problems"):
        assert facts[key] == native[key], key
    assert facts["problems"] == [] and facts["base"] == f"tiny-{name.split('/')[0]}"
    assert facts["dtype"] == (["bfloat16"] if name.endswith("bf16") else ["float32"])
    assert facts["method"] == ("dora" if raw["use_dora"] else "lora") and facts["dropout"] == raw["lora_dropout"]
    assert facts["parameters"] == sum(array.size for array in tensors(FIXTURES / name).values())
    assert facts["scale"] == pytest.approx(sorted(set(peft_scales(FIXTURES / name).values())))


def test_describe_lists_the_problems(tmp_path):
    folder = edit_tensors(
        copy_of("llama/lora", tmp_path / "adapter"), replaced(f"{Q}.lora_A.weight", mx.full((8, 32), math.nan))
    )
    assert describe(folder)["problems"] == ["model.layers.0.self_attn.q_proj.lora_a: holds NaN or infinite numbers"]


def test_the_format_is_detected_once(monkeypatch):
    """Detection reads the file. It is not done at all where the format is given."""
    from mlx_lora.formats import peft

    asked = []
    detect = peft.detect
    monkeypatch.setattr(peft, "detect", lambda path: asked.append(path) or detect(path))
    for call in (load_adapter, describe):
        for format, times in ((None, 1), ("peft", 0)):
            asked.clear()
            call(FIXTURES / "llama/lora", format)
            assert len(asked) == times, (call, format)


# -- a new format ----------------------------------------------------------------------------------------------------


def test_a_new_format_is_one_module_and_one_row(tmp_path, monkeypatch):
    """A toy format, detected, described, read, converted and written; its own options are checked as any other's."""
    from mlx_lora.formats import FORMATS
    from mlx_lora.formats.files import read_json, read_safetensors, write_json, write_safetensors
    from mlx_lora.formats.state_dicts import low_rank_adapter

    class Toy:
        READS, WRITES, FILES = {"alpha"}, set(), ("toy.json", "toy.safetensors")

        @staticmethod
        def detect(path):
            return (path / "toy.json").exists()

        @staticmethod
        def read(path, options):
            alpha = options.alpha_from(read_json(path / "toy.json").get("alpha"), path)
            return low_rank_adapter(read_safetensors(path / "toy.safetensors"), path, options, alpha=alpha)

        @staticmethod
        def write(adapter, folder, options):
            write_json(folder / "toy.json", {"alpha": adapter.config.scale * adapter.config.rank})
            write_safetensors(folder / "toy.safetensors", adapter.weights)

    monkeypatch.setitem(FORMATS, "toy", Toy)
    adapter = load_adapter(FIXTURES / "llama/lora")
    folder = save_adapter(adapter, tmp_path / "toy", "toy")
    assert detect_format(folder) == "toy"
    facts = describe(folder)
    assert (facts["format"], facts["scale"], facts["problems"]) == ("toy", [2.0], [])
    again = load_adapter(folder)
    assert all(same_bits(again.weights[name], adapter.weights[name]) for name in adapter.weights)
    native = load_adapter(save_adapter(again, tmp_path / "native"))
    assert all(same_bits(native.weights[name], adapter.weights[name]) for name in adapter.weights)
    with pytest.raises(FormatError, match=r"already holds toy\.json"):
        save_adapter(adapter, folder, "toy")
    with pytest.raises(FormatError, match="format toy"):
        save_adapter(adapter, folder, "peft")
    with pytest.raises(ConfigError, match="already stores alpha 16"):
        load_adapter(folder, alpha=16)
    with pytest.raises(ConfigError, match="--moe: writing toy does not use this option"):
        save_adapter(adapter, tmp_path / "other", "toy", moe="per_expert")
