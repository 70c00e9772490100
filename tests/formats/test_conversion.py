"""Adapters of every system against the logits that the system itself computes, and back into every format; PEFT's
adapters beyond LoRA of linear layers; what is refused; the memory of a conversion.

The golden numbers are made by scripts/make_peft_fixtures and scripts/make_format_fixtures.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_lora
from conftest import shake
from mlx_lora import AdapterConfig, attach, extract, fuse, load_adapter, mount, save_adapter, save_model
from mlx_lora.adapter import Adapter
from mlx_lora.base.decompositions import olora_pair, pissa_pair
from mlx_lora.base.names import BaseModel
from mlx_lora.errors import AdapterError, ConfigError, FormatError, MLXLoRAError, ModelError
from mlx_lora.formats import FORMATS, describe, detect_format
from mlx_lora.formats.files import read_safetensors
from mlx_lora.formats.torch.read import read_torch
from mlx_lora.formats.torch.write import write_torch
from mlx_lora.merge.export import export_merged

import mlx.core as mx  # isort: skip  (mlx_lora opens a BLAS before MLX is imported)
import numpy as np

ROOT = Path(__file__).resolve().parents[1] / "fixtures"
PEFT, OTHERS = ROOT / "peft", ROOT / "formats"
INPUT = mx.array(np.load(PEFT / "input_ids.npy"))
TOLERANCE = 5e-6  # max |difference| / max |logit|
BESIDES_LINEAR = [
    *("llama/lora_bias", "llama/head_saved", "llama/embedding", "llama/vera", "llama/vera_drawn", "llama/tokens"),
    *("qwen2/bias_all", "qwen2/bias_lora_only", "qwen2/embedding_tied", "qwen2/embedding_both", "qwen2/token_rows"),
    *("qwen2/ia3", "qwen2/head", "qwen2/head_and_embedding", "qwen2/saved_tied", "qwen2/saved_apart"),
    *("gpt2/conv1d", "mixtral/experts", "mixtral/router", "qwen3_moe/experts", "qwen3_moe/down"),
]
REWRITTEN = ["llama/adalora", "llama/loha", "llama/lokr"]
SYSTEMS = sorted(folder.name for folder in OTHERS.iterdir())


def base(model: str) -> Path:
    return PEFT / model / "base"


def load(model: str | Path):
    return mlx_lora.load(base(model) if isinstance(model, str) else model, dtype="float32")[0]


def logits(model) -> np.ndarray:
    return np.array(model(INPUT).astype(mx.float32))


def with_adapter(model: str, adapter: Adapter) -> np.ndarray:
    loaded = load(model)
    mount(loaded, adapter)
    return logits(loaded)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def assert_equal(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    worst, mean = difference(got, expected), float(np.abs(got - expected).mean() / np.abs(expected).max())
    assert worst <= tolerance, f"max difference {worst:.2e}, mean {mean:.2e}, tolerance {tolerance:.0e}"


def same_bits(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and mx.array_equal(a[k], b[k]).item() for k in a
    )


def other(name: str) -> tuple[Path, str, dict]:
    """(path of the adapter, its base, the facts that its files do not store)."""
    folder = OTHERS / name
    files = [f for f in folder.iterdir() if f.name not in ("base.txt", "options.json", "logits.npy")]
    path = files[0] if len(files) == 1 else next((f for f in files if f.name == "adapter.pt"), folder)
    options = json.loads((folder / "options.json").read_text())
    return path, (folder / "base.txt").read_text().strip(), options


def read_other(name: str) -> Adapter:
    path, model, options = other(name)
    return load_adapter(path, base=base(model), **options)


# -- other systems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYSTEMS)
def test_adapter_gives_the_logits_of_its_own_system(name):
    _, model, _ = other(name)
    expected = np.load(OTHERS / name / "logits.npy")
    loaded = load(model)
    plain = logits(loaded)
    mount(loaded, read_other(name))
    assert_equal(logits(loaded), expected)
    assert difference(plain, expected) > 0.1
    mlx_lora.fuse(loaded)
    assert_equal(logits(loaded), expected)


@pytest.mark.parametrize("name", SYSTEMS)
def test_format_is_detected_from_the_files(name):
    path, _, _ = other(name)
    expected = next(f for f in sorted(FORMATS, key=len, reverse=True) if name.startswith(f))
    assert detect_format(path) == expected
    facts = describe(path)
    adapter = read_other(name)
    assert facts["format"] == expected and facts["method"] == adapter.config.method
    if name != "loralib-merged":  # whose ranks depend on enable_lora
        assert facts["rank"] == sorted({adapter.rank_of(p) for p in adapter.modules})
    assert (facts["parameters"], facts["bytes"]) == (facts["bytes"] // 4, facts["bytes"]) and facts["dtype"] == [
        "float32"
    ]


def scale_off(adapter: Adapter) -> Adapter:
    config = adapter.config
    pattern = {k: 1.01 * v for k, v in config.scale_pattern.items()}
    return replace(adapter, config=replace(config, scale=1.01 * config.scale, scale_pattern=pattern))


def rows_reordered(adapter: Adapter) -> Adapter:
    """q's rows in the other order of rotary embeddings: the shapes are right, the function is wrong."""
    from mlx_lora.formats.fused_projections import to_interleaved

    weights = dict(adapter.weights)
    for name in [n for n in weights if n.endswith("q_proj.lora_b")]:
        weights[name] = to_interleaved(weights[name], 4)
    return replace(adapter, weights=weights)


@pytest.mark.parametrize("name", ["torchtune", "gguf", "nemo"])
@pytest.mark.parametrize("damage", [scale_off, rows_reordered])
def test_a_wrong_conversion_would_fail_the_comparison(name, damage):
    _, model, _ = other(name)
    got = with_adapter(model, damage(read_other(name)))
    assert difference(got, np.load(OTHERS / name / "logits.npy")) > 100 * TOLERANCE


def target_of(format: str, folder: Path) -> Path:
    suffix = {"loralib": ".pt", "nemo": ".nemo", "gguf": ".gguf"}.get(format, "")
    return folder / f"out{suffix}"


@pytest.mark.parametrize("format", ["mlx-lm", "peft", "loralib", "torchtune", "nemo", "litgpt", "gguf"])
def test_into_every_format_and_back_to_the_bit(format, tmp_path):
    """An adapter of one rank and scale over all linear layers of a Llama."""
    adapter = load_adapter(PEFT / "mistral/lora", base=base("mistral"))
    path = save_adapter(adapter, target_of(format, tmp_path), format, base=base("mistral"))
    assert detect_format(path) == format
    options = {"alpha": 8} if format == "loralib" else {}
    again = load_adapter(path, base=base("mistral"), **options)
    assert same_bits(again.weights, adapter.weights)
    assert {again.config.scale_of(p) for p in again.modules} == {2.0}
    if path.is_file() and format != "nemo":  # the same adapter gives the same file
        written = path.read_bytes()
        save_adapter(again, path, format, base=base("mistral"), overwrite=True)
        assert path.read_bytes() == written


@pytest.mark.parametrize("name", ["loralib", "loralib-merged", "torchtune", "torchtune-dora", "nemo", "litgpt", "gguf"])
def test_back_into_its_own_system_to_the_bit(name, tmp_path):
    path, model, _ = other(name)
    format = detect_format(path)
    adapter = read_other(name)
    written = save_adapter(adapter, target_of(format, tmp_path), format, base=base(model))
    if format == "gguf":
        from mlx_lora.formats.gguf_file import read_gguf

        assert same_bits(read_gguf(written)[1], read_gguf(path)[1])
    elif format == "nemo":
        again = load_adapter(written, base=base(model))
        assert same_bits(again.weights, adapter.weights)
    else:
        inner = {"torchtune": "adapter_model.pt", "litgpt": "lit_model.pth.lora"}.get(format)
        before, after = (read_torch(p / inner if inner else p) for p in (path, written))
        before, after = (value.get("model", value) for value in (before, after))
        assert same_bits(before, after)


@pytest.mark.parametrize("format", ["mlx-lm", "peft", "loralib", "torchtune", "nemo", "litgpt", "gguf"])
def test_mixed_ranks_and_scales_keep_the_function(format, tmp_path):
    weights, ranks, scales = {}, {}, {}
    mx.random.seed(3)
    for name, (rows, columns, rank, scale) in {
        "q_proj": (32, 32, 2, 1.7),
        "k_proj": (32, 16, 5, 0.3),
        "o_proj": (32, 32, 3, 1.7),
        "v_proj": (32, 16, 4, -2),
    }.items():
        path = f"model.layers.1.self_attn.{name}"
        weights[f"{path}.lora_a"] = mx.random.normal((rows, rank)) / rows**0.5
        weights[f"{path}.lora_b"] = mx.random.normal((rank, columns)) * 0.3
        ranks[f"^{path}"], scales[f"^{path}"] = rank, scale
    adapter = Adapter(AdapterConfig(num_layers=-1, rank_pattern=ranks, scale_pattern=scales), weights)
    path = save_adapter(adapter, target_of(format, tmp_path), format, base=base("mistral"), **_to_alpha(format))
    again = load_adapter(path, base=base("mistral"), **({"alpha": 7} if format == "loralib" else {}))
    assert_equal(with_adapter("mistral", again), with_adapter("mistral", adapter), 1e-6)


def _to_alpha(format: str) -> dict:
    return {} if format in ("mlx-lm", "peft") else {"alpha": 7}


def test_phi3_in_systems_that_do_not_fuse_its_projections(tmp_path):
    """Fused q, k and v are split and joined again, with one A or with three."""
    adapter = load_adapter(PEFT / "phi3/rslora", base=base("phi3"))
    expected = np.load(PEFT / "phi3/rslora/logits.npy")
    for format in ("torchtune", "nemo", "litgpt"):
        path = save_adapter(adapter, target_of(format, tmp_path / format), format, base=base("phi3"))
        assert_equal(with_adapter("phi3", load_adapter(path, base=base("phi3"))), expected)
        raw = read_torch(path / "adapter_model.pt") if format == "torchtune" else None
        if raw:  # three different A: the fused module has the sum of their ranks
            raw["layers.0.attn.k_proj.lora_a.weight"] = raw["layers.0.attn.k_proj.lora_a.weight"] + 1
            write_torch(path / "adapter_model.pt", raw)
            apart = load_adapter(path, base=base("phi3"))
            assert apart.rank_of("model.layers.0.self_attn.qkv_proj") == 12
            again = save_adapter(apart, tmp_path / "again", "torchtune", base=base("phi3"))
            assert same_bits(read_torch(again / "adapter_model.pt"), raw)


# -- PEFT beyond LoRA of linear layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BESIDES_LINEAR)
def test_pefts_logits_live_and_fused(name):
    model, expected = name.split("/")[0], np.load(PEFT / name / "logits.npy")
    loaded = load(model)
    plain = logits(loaded)
    mount(loaded, load_adapter(PEFT / name, base=base(model)))
    assert_equal(logits(loaded), expected)
    assert difference(plain, expected) > 0.1
    mlx_lora.fuse(loaded)
    assert_equal(logits(loaded), expected)


@pytest.mark.parametrize("name", REWRITTEN)
def test_methods_that_are_lora_in_another_form(name, tmp_path):
    model, expected = name.split("/")[0], np.load(PEFT / name / "logits.npy")
    adapter = load_adapter(PEFT / name, base=base(model))
    assert adapter.config.method == "lora" and describe(PEFT / name)["problems"] == []
    assert_equal(with_adapter(model, adapter), expected)
    assert difference(with_adapter(model, scale_off(adapter)), expected) > 100 * TOLERANCE
    save_adapter(adapter, tmp_path / "peft", "peft", base=base(model))
    raw = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and not {"init_r", "total_step", "rank_dropout", "alpha"} & raw.keys()
    assert_equal(with_adapter(model, load_adapter(tmp_path / "peft", base=base(model))), expected)
    assert_equal(with_adapter(model, load_adapter(save_adapter(adapter, tmp_path / "native"))), expected)


@pytest.mark.parametrize("name", ["adalora", "loha", "lokr"])
def test_other_methods_without_one_of_their_arrays(name, tmp_path):
    folder = shutil.copytree(PEFT / "llama" / name, tmp_path / "a")
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    gone = sorted(arrays)[-1]
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {k: v for k, v in arrays.items() if k != gone})
    with pytest.raises(FormatError, match="not a complete"):
        load_adapter(folder)


@pytest.mark.parametrize("name", BESIDES_LINEAR)
def test_peft_to_ours_to_peft_is_bit_equal(name, tmp_path):
    model = name.split("/")[0]
    adapter = load_adapter(PEFT / name, base=base(model))
    save_adapter(adapter, tmp_path / "out", "peft", base=base(model))
    assert same_bits(
        read_safetensors(tmp_path / "out/adapter_model.safetensors"),
        read_safetensors(PEFT / name / "adapter_model.safetensors"),
    )
    before, after = (json.loads((p / "adapter_config.json").read_text()) for p in (PEFT / name, tmp_path / "out"))
    for key in ("peft_type", "r", "lora_alpha", "bias", "modules_to_save", "lora_bias", "ensure_weight_tying"):
        if before.get(key) and name not in ("qwen2/saved_tied", "qwen2/saved_apart"):  # which name whole paths
            assert after.get(key) == before[key], key
    again = load_adapter(tmp_path / "out", base=base(model))
    assert {p: again.config.scale_of(p) for p in again.modules} == pytest.approx(
        {p: adapter.config.scale_of(p) for p in adapter.modules}, rel=1e-12
    )


@pytest.mark.parametrize("name", BESIDES_LINEAR)
def test_through_the_native_folder(name, tmp_path):
    model = name.split("/")[0]
    save_adapter(load_adapter(PEFT / name, base=base(model)), tmp_path / "native")
    assert_equal(with_adapter(model, load_adapter(tmp_path / "native")), np.load(PEFT / name / "logits.npy"))


@pytest.mark.parametrize("name", ["mixtral/experts", "mixtral/router", "qwen3_moe/experts", "qwen3_moe/down"])
@pytest.mark.parametrize("options", [{"moe": "per_expert"}, {"profile": "serving"}, {"moe": "target_parameters"}])
def test_layouts_of_experts(name, options, tmp_path):
    model = name.split("/")[0]
    adapter = load_adapter(PEFT / name, base=base(model))
    folder = save_adapter(adapter, tmp_path / "out", "peft", base=base(model), **options)
    keys = read_safetensors(folder / "adapter_model.safetensors")
    single = options != {"moe": "target_parameters"}
    assert any(re.search(r"experts\.\d+\.", key) for key in keys) == single
    raw = json.loads((folder / "adapter_config.json").read_text())
    if "profile" in options:
        assert isinstance(raw["lora_alpha"], int) and not raw.keys() & {"rank_pattern", "alpha_pattern"}
        ranks = {a.shape[0] for key, a in keys.items() if key.endswith("lora_A.weight")}
        assert ranks == {raw["r"]}
    again = load_adapter(folder, base=base(model))
    assert_equal(with_adapter(model, again), np.load(PEFT / name / "logits.npy"))


def test_experts_as_peft_017_and_018_packed_them(tmp_path):
    """In and out were exchanged (huggingface/peft#3083): recognised by the shapes, or else by the version."""
    shutil.copytree(PEFT / "qwen3_moe/experts", tmp_path / "old")
    file = tmp_path / "old/adapter_model.safetensors"
    tensors, old = read_safetensors(file), {}
    for key, array in tensors.items():
        if ".experts." not in key:
            old[key] = array
            continue
        other = tensors[key.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")]
        if "lora_A" in key:  # [experts * r, in] from B [out, r * experts], and the other way round
            old[key] = other.reshape(other.shape[0], 4, 4).transpose(2, 1, 0).reshape(16, -1)
        else:
            old[key] = other.reshape(4, 4, -1).transpose(2, 1, 0).reshape(other.shape[1], 16)
    mx.eval(old)
    mx.save_safetensors(str(file), old)
    expected = np.load(PEFT / "qwen3_moe/experts/logits.npy")
    assert_equal(with_adapter("qwen3_moe", load_adapter(tmp_path / "old", base=base("qwen3_moe"))), expected)
    assert_equal(with_adapter("qwen3_moe", load_adapter(tmp_path / "old")), expected)  # by the two shapes alone


def test_patterns_of_a_parameter_name_the_parameter(tmp_path):
    """A router is a target parameter in PEFT, so its patterns end in .weight."""
    stem = "base_model.model.model.layers.0.mlp.gate.lora_"
    arrays = {f"{stem}A.weight": mx.random.normal((2, 8)), f"{stem}B.weight": mx.random.normal((4, 2))}
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_parameters": ["mlp.gate.weight"]}
    raw |= {"rank_pattern": {"mlp.gate.weight": 2}, "alpha_pattern": {"mlp.gate.weight": 5}}
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), arrays)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    assert load_adapter(tmp_path).config.scale_of("model.layers.0.mlp.gate") == 2.5


def test_square_experts_are_read_by_pefts_version(tmp_path):
    """One parameter with in = out: only the version shows how it was packed."""
    stem = "base_model.model.model.layers.0.mlp.experts.lora_"
    arrays = {f"{stem}A.weight": mx.random.normal((6, 8)), f"{stem}B.weight": mx.random.normal((8, 6))}
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    found = {}
    for version in (None, "0.18.1", "0.19.0", "0.21.2"):
        folder = tmp_path / str(version)
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), arrays)
        (folder / "adapter_config.json").write_text(json.dumps({**raw, "peft_version": version}))
        found[version] = load_adapter(folder).weights["model.layers.0.mlp.switch_mlp.down_proj.lora_a"]
    assert mx.array_equal(found[None], found["0.18.1"]) and mx.array_equal(found["0.19.0"], found["0.21.2"])
    assert not mx.array_equal(found[None], found["0.19.0"])


def test_pickled_and_named_adapters_and_the_choice_between_several(tmp_path):
    source = PEFT / "llama/dora"
    (tmp_path / "many/first").mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", tmp_path / "many/first")
    write_torch(tmp_path / "many/first/adapter_model.bin", read_safetensors(source / "adapter_model.safetensors"))
    expected = load_adapter(source).weights
    assert same_bits(load_adapter(tmp_path / "many").weights, expected)  # the only one there is
    shutil.copytree(PEFT / "llama/lora", tmp_path / "many/second")
    with pytest.raises(FormatError, match="adapters first, second"):
        load_adapter(tmp_path / "many")
    assert same_bits(load_adapter(tmp_path / "many", adapter="first").weights, expected)
    with pytest.raises(FormatError, match="no adapter 'third'"):
        load_adapter(tmp_path / "many", adapter="third")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_is_undone(init, tmp_path):
    """Only the training remains: an adapter that was initialised and not trained must change nothing."""
    facts, tensors, scale = BaseModel(base("llama")), {}, 1.5
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.q_proj"
        weight = np.array(facts.tensor(f"{path}.weight"))
        a, b = pissa_pair(weight, 4, scale) if init == "pissa" else olora_pair(weight, 4)
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.array(np.ascontiguousarray(a))
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.array(np.ascontiguousarray(b))
    mx.eval(tensors)
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), tensors)
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="changed the base"):
        load_adapter(tmp_path)
    adapter = load_adapter(tmp_path, base=base("llama"))
    assert {adapter.rank_of(path) for path in adapter.modules} == {8}
    assert_equal(with_adapter("llama", adapter), np.load(PEFT / "llama/base/logits.npy"), 2e-5)


# -- mlx-lm's history ------------------------------------------------------------------------------------------------


@pytest.fixture
def old_mlx_lm(tmp_path):
    """Makes an mlx-lm folder with a given config; returns (folder, the adapter that it should be read as)."""

    def make(config: dict | None, *, npz: bool = False) -> tuple[Path, Adapter]:
        adapter = load_adapter(PEFT / "mistral/lora")
        folder = tmp_path / "old"
        folder.mkdir()
        if npz:
            np.savez(folder / "adapters.npz", **{k: np.array(v) for k, v in adapter.weights.items()})
        else:
            mx.save_safetensors(str(folder / "adapters.safetensors"), adapter.weights)
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder, adapter

    return make


LEGACY = {"rank": 4, "alpha": 16.0, "dropout": 0.0, "scale": 2.0}


def test_archive_of_numpy_without_config(old_mlx_lm):
    folder, adapter = old_mlx_lm(None, npz=True)
    with pytest.raises(FormatError, match="--alpha"):
        load_adapter(folder)
    again = load_adapter(folder, alpha=8)
    assert same_bits(again.weights, adapter.weights) and again.config.scale == 2.0
    assert describe(folder)["rank"] == [4]


@pytest.mark.parametrize(("rule", "scale"), [("scale", 2.0), ("alpha", 8.0)])
def test_mlx_lm_folders_of_the_months_of_scale_times_alpha(rule, scale, old_mlx_lm):
    folder, _ = old_mlx_lm({"lora_layers": 16, "lora_parameters": LEGACY})
    with pytest.raises(FormatError, match="--legacy-scale alpha"):
        load_adapter(folder)
    assert load_adapter(folder, legacy_scale=rule).config.scale == scale
    assert any("lora_layers with alpha" in p for p in describe(folder)["problems"])


def test_legacy_scale_is_refused_where_the_scale_is_unambiguous(old_mlx_lm):
    folder, _ = old_mlx_lm({"num_layers": 16, "lora_parameters": LEGACY})
    assert load_adapter(folder).config.scale == 2.0
    with pytest.raises(ConfigError, match="one meaning only"):
        load_adapter(folder, legacy_scale="alpha")


def test_configs_of_mlx_lm_lora_and_unsloth(old_mlx_lm, tmp_path):
    """mlx-lm-lora: use_dora and num_layers in lora_parameters; Unsloth: PEFT's settings beside mlx-lm's."""
    inner = {"rank": 4, "dropout": 0.0, "scale": 2.0, "use_dora": False, "num_layers": 2}
    folder, adapter = old_mlx_lm({"lora_parameters": inner, "num_layers": 2})
    assert same_bits(load_adapter(folder).weights, adapter.weights)
    told = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "unsloth_mlx_lora_module_paths": ["x"], "rank": 4}
    told |= {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}, "num_layers": 2}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    read = load_adapter(folder)
    assert (read.base, read.config.scale) == ("a/b", 2.0) and same_bits(read.weights, adapter.weights)


def test_flat_experts_of_earlier_mlx_lm(tmp_path):
    adapter = load_adapter(PEFT / "qwen3_moe/experts", base=base("qwen3_moe"))
    flat = {
        n: w.reshape(-1, w.shape[-1]) if n.endswith("lora_a") and w.ndim == 3 else w for n, w in adapter.weights.items()
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), flat)
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": parameters, "num_layers": 2}))
    assert same_bits(load_adapter(tmp_path).weights, adapter.weights)


# -- what a format cannot hold, and what is not known ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["loralib", "litgpt", "gguf"])
def test_dora_is_refused_by_name(format, tmp_path):
    adapter = load_adapter(PEFT / "llama/dora")
    with pytest.raises(FormatError, match=r"dora(.|\n)*merged"):
        save_adapter(adapter, target_of(format, tmp_path), format, base=base("llama"))
    with pytest.raises(FormatError, match="dora"):  # LoRA without the magnitudes is another adapter
        save_adapter(adapter, target_of(format, tmp_path), format, base=base("llama"), allow_lossy=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["loralib", "torchtune", "nemo", "litgpt", "gguf"])
def test_losses_happen_only_when_allowed_and_are_listed(format, tmp_path):
    adapter, path = load_adapter(PEFT / "llama/head_saved", base=base("llama")), target_of(format, tmp_path)
    with pytest.raises(FormatError, match=r"lm_head.weight(.|\n)*--allow-lossy"):
        save_adapter(adapter, path, format, base=base("llama"))
    assert not list(tmp_path.iterdir())
    lost: list[str] = []
    save_adapter(adapter, path, format, base=base("llama"), allow_lossy=True, lost=lost)
    assert len(lost) == 1 and "lm_head.weight" in lost[0]
    assert load_adapter(path, base=base("llama"), **({"alpha": 6} if format == "loralib" else {})).modules


def test_vera_becomes_the_lora_it_is(tmp_path):
    for name in ("llama/vera", "llama/vera_drawn"):
        adapter = load_adapter(PEFT / name, base=base("llama"))
        path = save_adapter(adapter, tmp_path / f"{name[6:]}.gguf", "gguf", base=base("llama"))
        assert_equal(with_adapter("llama", load_adapter(path, base=base("llama"))), np.load(PEFT / name / "logits.npy"))


@pytest.mark.parametrize(
    ("format", "path", "said"),
    [
        ("torchtune", "torchtune", "needs the base model's config"),
        ("gguf", "gguf", "needs the base model's config"),
        ("loralib", "loralib", "does not store the adapter's alpha"),
        ("loralib", "loralib-merged", "--enable-lora"),
        ("deepspeed", "deepspeed-chat", "does not store the adapter's alpha"),
    ],
)
def test_facts_that_are_missing_are_asked_for(format, path, said):
    path, _, _ = other(path)
    with pytest.raises(FormatError, match=said):
        load_adapter(path)
    facts = describe(path)  # shows what is known without them
    assert facts["format"] == format and facts["modules"] and facts["problems"]


@pytest.mark.parametrize("name", ["torchtune", "litgpt", "nemo", "lightning"])
def test_an_alpha_beside_the_stored_one_is_refused(name):
    path, model, _ = other(name)
    with pytest.raises(ConfigError, match="already stores alpha 6"):
        load_adapter(path, base=base(model), alpha=6)


@pytest.mark.parametrize("format", ["loralib", "torchtune", "nemo", "litgpt", "gguf"])
def test_an_adapter_without_lora_is_refused_where_nothing_else_can_be_stored(format, tmp_path):
    adapter = Adapter(
        AdapterConfig(modules_to_save=("lm_head",), keys=(), num_layers=-1), {"lm_head.weight": mx.ones((64, 32))}
    )
    with pytest.raises(FormatError, match="has no LoRA"):
        save_adapter(adapter, target_of(format, tmp_path), format, base=base("llama"), allow_lossy=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 3.0}, "--alpha"),
        ({"enabled": (True,)}, "--enable-lora"),
        ({"legacy_scale": "scale"}, "--legacy-scale"),
    ],
)
def test_options_that_a_format_does_not_use_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        load_adapter(PEFT / "llama/lora", **options)
    with pytest.raises(ConfigError, match="--moe"):
        save_adapter(load_adapter(PEFT / "llama/lora"), "nowhere", "mlx-lm", moe="per_expert")


@pytest.mark.parametrize("format", ["lightning", "deepspeed"])
def test_formats_that_are_read_only(format, tmp_path):
    with pytest.raises(FormatError, match="can be read, but not written"):
        save_adapter(load_adapter(PEFT / "llama/lora"), tmp_path / "out", format)


def test_files_are_replaced_only_when_asked_and_never_for_another_kind_of_file(tmp_path):
    adapter, file = load_adapter(PEFT / "llama/lora"), tmp_path / "a.gguf"
    save_adapter(adapter, file, "gguf", base=base("llama"))
    before = file.read_bytes()
    with pytest.raises(FormatError, match="already exists"):
        save_adapter(load_adapter(PEFT / "llama/rslora"), file, "gguf", base=base("llama"))
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    save_adapter(load_adapter(PEFT / "llama/rslora"), file, "gguf", base=base("llama"), overwrite=True)
    assert file.read_bytes() != before
    with pytest.raises(FormatError, match=r"ends in \.gguf"):
        save_adapter(adapter, tmp_path / "folder", "gguf", base=base("llama"))


UNSUPPORTED = {
    "lora_unet_down_blocks_0.lora_down.weight": "kohya",
    "unet.down_blocks.0.attn.to_k.lora.up.weight": "diffusers",
    "x.hada_w1_a": "LoHa",
    "x.lokr_w1": "LoKr",
    "base_model.model.x.ia3_l": "IA",
    "base_model.model.x.lora_E": "AdaLoRA",
    "x.lora_diag": "KaSA",
    "base_model.model.x.oft_R": "OFT",
    "prompt_embeddings": "prompt",
    "xlora_classifier.inner.0.weight": "X-LoRA",
}


@pytest.mark.parametrize(("name", "said"), UNSUPPORTED.items())
def test_unsupported_adapters_are_refused_by_their_name(name, said, tmp_path):
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {name: mx.zeros((2, 2))})
    write_torch(tmp_path / "weights.pt", {name: mx.zeros((2, 2))})
    for path in (tmp_path / "weights.safetensors", tmp_path / "weights.pt"):
        with pytest.raises(FormatError, match=said):
            load_adapter(path)


def test_sharded_checkpoints_are_refused_by_name(tmp_path):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/zero_to_fp32.py").write_text("")
    with pytest.raises(FormatError, match="zero_to_fp32"):
        load_adapter(tmp_path / "zero")
    (tmp_path / "dist/weights").mkdir(parents=True)
    (tmp_path / "dist/weights/__0_0.distcp").write_text("")
    with pytest.raises(FormatError, match="sharded PyTorch distributed checkpoint"):
        load_adapter(tmp_path / "dist")
    write_torch(tmp_path / "empty.pt", {"m.lora_A": mx.zeros((4, 8)), "m.lora_B": mx.zeros((8, 0))})
    with pytest.raises(FormatError, match="do not match"):
        load_adapter(tmp_path / "empty.pt", alpha=1)
    write_torch(tmp_path / "shard.bin", {"m.lora_right_weight": mx.zeros((0,)), "m.lora_left_weight": mx.zeros((2, 4))})
    with pytest.raises(FormatError, match="not gathered"):
        load_adapter(tmp_path / "shard.bin", alpha=1)


# -- a merged model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama/dora", "gpt2/conv1d", "mixtral/experts", "qwen3_moe/experts", "gemma2/lora"])
def test_merged_model_computes_what_the_adapter_does(name, tmp_path):
    model = name.split("/")[0]
    export_merged(base(model), load_adapter(PEFT / name, base=base(model)), tmp_path / "merged")
    assert_equal(logits(load(tmp_path / "merged")), np.load(PEFT / name / "logits.npy"))
    before, after = (read_safetensors(p / "model.safetensors") for p in (base(model), tmp_path / "merged"))
    assert before.keys() == after.keys()  # transformers' names, whatever mlx-lm calls them
    assert all(before[k].shape == after[k].shape and before[k].dtype == after[k].dtype for k in before)
    kept = [k for k in before if "norm" in k or "ln_" in k]
    assert same_bits({k: before[k] for k in kept}, {k: after[k] for k in kept})


def test_merged_model_in_another_dtype_and_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_lora.merge.export._SHARD", 40_000)
    export_merged(base("llama"), load_adapter(PEFT / "llama/lora"), tmp_path / "merged", dtype="bfloat16")
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "merged").glob("*.safetensors")}
    assert len(files) > 1 and set(index["weight_map"].values()) == files
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert {a.dtype for f in files for a in mx.load(str(tmp_path / "merged" / f)).values()} == {mx.bfloat16}
    got = logits(load(tmp_path / "merged"))
    assert_equal(got, np.load(PEFT / "llama/lora/logits.npy"), 0.05)
    with pytest.raises(MLXLoRAError, match="already exists"):
        export_merged(base("llama"), load_adapter(PEFT / "llama/lora"), tmp_path / "merged")


@pytest.mark.parametrize("name", ["llama/lora", "mixtral/experts"])
def test_merged_model_of_a_quantized_base(name, tmp_path):
    """MLX's layout, dequantized, under transformers' names."""
    from mlx_lora.model.loading import save_model

    model = name.split("/")[0]
    loaded = load(model)
    import mlx.nn as nn

    fits = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0  # noqa: E731
    nn.quantize(loaded, group_size=32, bits=8, class_predicate=fits)
    quantized = save_model(loaded, tmp_path / "quantized")
    adapter = load_adapter(PEFT / name, base=quantized)
    export_merged(quantized, adapter, tmp_path / "merged", dtype="float32")
    expected = load(quantized)
    mount(expected, adapter)
    assert_equal(logits(load(tmp_path / "merged")), logits(expected))
    names = read_safetensors(tmp_path / "merged/model.safetensors").keys()
    assert names == read_safetensors(base(model) / "model.safetensors").keys()
    assert "quantization" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.parametrize("model, keys", [("llama", None), ("qwen2", ["lm_head"]), ("qwen2", ["o_proj"])])
def test_biases_that_the_base_does_not_have_are_refused(model, keys, tmp_path):
    live = load(model)
    if keys is None:
        mount(live, PEFT / "llama/lora_bias")
    else:  # the head of this model is tied to its embedding
        attach(live, AdapterConfig(rank=2, lora_bias=True, keys=keys))
        shake(live)
    adapter, expected = extract(live), logits(live)
    with pytest.raises(AdapterError, match=r"_(proj|head)\b.*has biases(.|\n)*Keep the adapter separate"):
        export_merged(base(model), adapter, tmp_path / "merged")
    fuse(live)
    assert_equal(logits(live), expected)  # in memory it can be merged
    with pytest.raises(ModelError, match="a model folder cannot hold"):
        save_model(live, tmp_path / "fused")
    assert not list(tmp_path.iterdir())


def test_biases_that_the_base_has_are_merged(tmp_path):
    live = load("qwen2")
    attach(live, AdapterConfig(rank=2, lora_bias=True, keys=["q_proj", "v_proj"]))
    shake(live)
    expected = logits(live)
    export_merged(base("qwen2"), extract(live), tmp_path / "merged")
    fuse(live)
    save_model(live, tmp_path / "fused")
    for name in ("merged", "fused"):
        assert_equal(logits(load(tmp_path / name)), expected)


def test_a_conversion_holds_no_more_than_twice_the_file(tmp_path):
    """Arrays are copied one at a time. `scripts/bench convert` measures the conversion of a 7B model's adapter."""
    weights = {}
    for layer in range(24):
        stem = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        weights[f"{stem}.lora_A.weight"] = mx.random.normal((16, 4096))
        weights[f"{stem}.lora_B.weight"] = mx.random.normal((4096, 16))
    (tmp_path / "peft").mkdir()
    (tmp_path / "base").mkdir()
    shutil.copy(base("llama") / "config.json", tmp_path / "base")  # without weights, whose sizes are others
    mx.save_safetensors(str(tmp_path / "peft/adapter_model.safetensors"), weights)
    raw = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["up_proj"]}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(raw))
    size = (tmp_path / "peft/adapter_model.safetensors").stat().st_size
    del weights
    source, peaks = tmp_path / "peft", {}
    for format in ("mlx-lm", "peft", "loralib", "gguf"):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        target = target_of(format, tmp_path / f"to-{format}")
        save_adapter(load_adapter(source), target, format, base=tmp_path / "base")
        peaks[format] = (mx.get_peak_memory() - before) / size
    assert all(peak <= 2 for peak in peaks.values()), peaks


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "theirs", "ours"),
    [
        ({"model_type": "gpt2"}, "transformer.h.0.attn.c_attn", "model.h.0.attn.c_attn"),
        ("mixtral", "model.layers.1.mlp.gate", "model.layers.1.block_sparse_moe.gate"),
        ("llama", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        (
            {"model_type": "gemma3", "vocab_size": 64, "text_config": {"model_type": "gemma3_text", "hidden_size": 16}},
            "model.language_model.layers.0.self_attn.q_proj",
            "language_model.model.layers.0.self_attn.q_proj",
        ),
    ],
    ids=["gpt2", "mixtral", "llama", "gemma3"],
)
def test_names_of_modules_both_ways(config, theirs, ours, tmp_path):
    if isinstance(config, str):
        facts = BaseModel(base(config))
    elif config["model_type"] == "gpt2":
        facts = BaseModel(base("gpt2"))
    else:
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = BaseModel(tmp_path)
    assert facts.to_mlx(theirs) == ours and facts.to_hf(ours) == theirs
    assert facts.to_mlx("no.such.module") == "no.such.module"


def test_looking_at_a_base_draws_no_random_numbers():
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(5)
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj" in BaseModel(base("mixtral")).modules
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected)


def test_adapter_of_another_base_is_refused():
    with pytest.raises((AdapterError, FormatError)):
        with_adapter("gpt2", read_other("torchtune"))
