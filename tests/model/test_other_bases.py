"""An adapter remembers the base model that it was trained on, in every format that has room for it."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_lora
from conftest import make_model, shake
from mlx_lora import AdapterConfig
from mlx_lora.adapter import FINGERPRINT
from mlx_lora.base.fingerprint import Fingerprint
from mlx_lora.cli.main import main
from mlx_lora.errors import MLXLoRAWarning
from mlx_lora.model.multi import MultiLoRA
from mlx_lora.runs.adapters import attach_for_run
from mlx_lora.tiny_base import PATH

CONFIG = AdapterConfig(rank=4, num_layers=2)


@pytest.fixture(scope="module")
def adapter():
    model, _ = mlx_lora.load(PATH)
    mlx_lora.attach(model, CONFIG)
    shake(model)
    return mlx_lora.extract(model)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
    """The same shapes, other weights: as after training on something else."""
    model, _ = mlx_lora.load(PATH)
    mx.random.seed(7)
    changed = [(n, a + 0.02 * a.std() * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())]
    model.update(tree_unflatten(changed))
    return mlx_lora.save_model(model, tmp_path_factory.mktemp("other") / "base")


@pytest.mark.parametrize("format", ["mlx-lm", "peft", "gguf"])
def test_another_base_is_used_with_a_warning_that_names_the_right_one(format, adapter, other_base, tmp_path):
    path = tmp_path / ("a.gguf" if format == "gguf" else "a")
    mlx_lora.save_adapter(adapter, path, format, base=PATH)
    with pytest.warns(MLXLoRAWarning, match="whose weights are not those of") as caught:
        model, _ = mlx_lora.load(other_base, path)
    assert str(PATH) in str(caught[0].message) and str(other_base) in str(caught[0].message)
    assert len(mlx_lora.extract(model).modules) == len(adapter.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MLXLoRAWarning)
        mlx_lora.load(PATH, path)
        again = mlx_lora.load_adapter(path, base=PATH)
    assert again.metadata[FINGERPRINT] == adapter.metadata[FINGERPRINT]


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nf4"])
def test_a_quantized_version_of_the_base_gives_no_warning(mode, adapter, tmp_path):
    model, _ = mlx_lora.load(PATH)
    mlx_lora.quantize(model, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MLXLoRAWarning)
        mlx_lora.mount(model, adapter)
        mlx_lora.unmount(model)
        mlx_lora.attach(model, CONFIG)
        back = mlx_lora.extract(model)
        plain, _ = mlx_lora.load(PATH)
        mlx_lora.mount(plain, back)


def test_a_base_with_the_adapter_merged_in_gives_a_warning(adapter):
    model, _ = mlx_lora.load(PATH)
    mlx_lora.mount(model, adapter)
    mlx_lora.fuse(model)
    with pytest.warns(MLXLoRAWarning, match="not those of"):
        mlx_lora.mount(model, adapter)


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(method="full", num_layers=2),
        AdapterConfig(rank=2, num_layers=1, modules_to_save=("lm_head", "norm")),
    ],
    ids=["full", "modules_to_save"],
)
def test_trained_parameters_of_the_base_do_not_change_its_fingerprint(config):
    model, same = make_model(), Fingerprint.of(dict(make_model().named_modules()))
    mlx_lora.attach(model, config)
    trained = [(name, array + 1) for name, array in tree_flatten(model.trainable_parameters())]
    model.update(tree_unflatten(trained))
    adapter = mlx_lora.extract(model)
    assert Fingerprint.from_stored(adapter.metadata[FINGERPRINT]).matches(same)
    mlx_lora.mount(model, adapter)
    assert mlx_lora.extract(model).metadata == adapter.metadata


def test_several_adapters_on_another_base(adapter, other_base):
    model, _ = mlx_lora.load(other_base)
    with pytest.warns(MLXLoRAWarning, match="not those of"):
        MultiLoRA(model, {"a": adapter}).unmount()


def test_conversion_and_merging_keep_it(adapter, tmp_path):
    mlx_lora.save_adapter(adapter, tmp_path / "peft", "peft", base=PATH)
    mlx_lora.save_adapter(mlx_lora.load_adapter(tmp_path / "peft", base=PATH), tmp_path / "back")
    merged = mlx_lora.merge_adapters([adapter, mlx_lora.load_adapter(tmp_path / "back")], [0.5, 0.5])
    assert merged.metadata[FINGERPRINT] == adapter.metadata[FINGERPRINT]
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert FINGERPRINT not in raw  # PEFT warns of entries that it does not know
    assert "tiny_base" not in json.dumps(adapter.metadata[FINGERPRINT])  # it holds no path


@pytest.mark.parametrize("stored", ["x", 3, [], {"weights": "x"}, {"weights": "", "norms": "AAA", "quantized": 1}])
def test_a_damaged_fingerprint_is_ignored(stored, adapter, tmp_path):
    mlx_lora.save_adapter(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), FINGERPRINT: stored}))
    mlx_lora.load(PATH, tmp_path / "a")


def test_the_command_line_shows_the_warning(adapter, other_base, tmp_path, capsys):
    from mlx_lora.cli.main import main

    mlx_lora.save_adapter(adapter, tmp_path / "a")
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(other_base), "--adapter-path", str(tmp_path / "a"), "--prompt", "Hi",
              "--max-tokens", "1"])  # fmt: skip
    assert "Warning: The adapter was trained on" in capsys.readouterr().err


def test_a_run_that_starts_from_an_adapter_of_another_base_is_warned(adapter, other_base, tmp_path):
    folder = mlx_lora.save_adapter(adapter, tmp_path / "a")
    for base, warned in ((other_base, 1), (PATH, 0)):
        model, _ = mlx_lora.load(base)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach_for_run(model, CONFIG, 0, file=folder / "adapters.safetensors")
        assert sum("whose weights are not those of" in str(w.message) for w in caught) == warned


def test_a_merge_of_adapters_of_different_bases_is_warned_and_remembers_none(adapter, other_base):
    model, _ = mlx_lora.load(other_base)
    mlx_lora.attach(model, CONFIG)
    shake(model)
    other = mlx_lora.extract(model)
    with pytest.warns(MLXLoRAWarning, match="base models with different weights"):
        merged = mlx_lora.merge_adapters([adapter, other])
    assert FINGERPRINT not in merged.metadata
    with warnings.catch_warnings():
        warnings.simplefilter("error", MLXLoRAWarning)
        assert mlx_lora.merge_adapters([adapter, adapter]).metadata[FINGERPRINT] == adapter.metadata[FINGERPRINT]


@pytest.mark.parametrize("format", ["peft", "gguf"])
def test_convert_warns_of_another_base(format, adapter, other_base, tmp_path, capsys):
    folder = mlx_lora.save_adapter(adapter, tmp_path / "a")
    for base, warned in ((other_base, True), (PATH, False)):
        target = tmp_path / f"{warned}.{format}"
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(folder), str(target), "--to", format, "--model", str(base)])
        assert not ended.value.code
        assert ("whose weights are not those of" in capsys.readouterr().err) == warned
