"""Models that mlx-lm or the Hub does not give at once: what is read all the same, and hints that help."""

from __future__ import annotations

import json

import httpx
import pytest

from mlx_lora.base.downloads import download_hint
from mlx_lora.base.names import BaseModel
from mlx_lora.errors import ModelError

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def base(folder, config: dict) -> BaseModel:
    (folder / "config.json").write_text(json.dumps(config))
    return BaseModel(folder)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_config_with_the_text_fields_beside_those_of_images_is_read(kind, tmp_path):
    model = base(tmp_path, {"model_type": kind, **TEXT, "vision_config": {"hidden_size": 32}}).model
    assert len(model.layers) == 2


def test_a_config_without_the_fields_names_them(tmp_path):
    with pytest.raises(ModelError, match=r"llama needs config fields that are missing: .*hidden_size"):
        base(tmp_path, {"model_type": "llama", "vocab_size": 64}).model  # noqa: B018


def test_an_unknown_model_with_images_is_named_as_one(tmp_path):
    with pytest.raises(ModelError, match="mlx-lm has no idefics, a model with images") as error:
        base(tmp_path, {"model_type": "idefics", "vision_config": {}}).model  # noqa: B018
    assert "language model" in error.value.hint


def test_the_hint_for_a_download_fits_what_happened(monkeypatch):
    from huggingface_hub import constants, errors

    def hint(kind: type[Exception] | None = None) -> str:
        response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
        return download_hint(OSError("no route") if kind is None else kind("refused", response=response))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "Accept the repository's conditions" in hint(errors.GatedRepoError)
    assert hint(errors.RepositoryNotFoundError).startswith("Check the name. For a private")
    assert "network" in hint()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for kind in (None, errors.GatedRepoError):
        assert "HF_HUB_OFFLINE=1 forbids downloads" in hint(kind) and "network" not in hint(kind)
