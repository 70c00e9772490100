"""What is written once for all: reading config.json, refusing to overwrite, counting shared arrays, NF4's values."""

from __future__ import annotations

import pytest

from conftest import make_model
from mlx_lora.base.config import read_config
from mlx_lora.base.modules import total_bytes
from mlx_lora.base.names import BaseModel
from mlx_lora.base.nf4 import NF4_VALUES
from mlx_lora.base.saving import check_target
from mlx_lora.errors import ConfigError, ModelError
from mlx_lora.kernels import stored


def test_check_target(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for name, overwrite in (("new", False), ("empty", False), ("used", True)):
        check_target(tmp_path / name, overwrite)
    for name, overwrite in (("used", False), ("used/file", False), ("used/file", True)):
        with pytest.raises(ModelError, match="already exists"):
            check_target(tmp_path / name, overwrite)
    with pytest.raises(ConfigError):
        check_target(str(tmp_path / "used"), error=ConfigError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "model_type"),
        ('{"model_type": null}', "model_type"),
    ],
    ids=["missing", "cut", "nested", "list", "null"],
)
def test_configs_that_are_refused(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        read_config(tmp_path)
    with pytest.raises(ModelError, match=said):
        _ = BaseModel(tmp_path).config


def test_a_config_by_folder_or_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == {"model_type": "llama"}
    assert BaseModel(tmp_path / "config.json").same_names


def test_a_shared_layer_takes_its_bytes_once():
    model = make_model()
    before = total_bytes(model)
    model.model.layers[2] = model.model.layers[1]
    assert total_bytes(model) < before
    assert total_bytes(model) == before - sum(a.nbytes for a in _arrays(make_model().layers[2]))


def _arrays(module):
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(module.parameters())]


def test_nf4_has_one_table():
    assert NF4_VALUES is stored.NF4


def test_a_model_never_replaces_an_adapter(tmp_path):
    """Such as the one that is being fused, in the folder itself or below it."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapters.safetensors").write_text("an adapter")
    for folder in (tmp_path / "adapters", tmp_path):
        with pytest.raises(ModelError, match="holds an adapter"):
            check_target(folder, overwrite=True, model=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    check_target(tmp_path / "model", overwrite=True, model=True)
    with pytest.raises(ModelError, match="cannot be written"):
        check_target("/proc/model")
