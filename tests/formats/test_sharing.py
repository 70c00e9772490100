"""Files that are uploaded name no path of this machine, whatever the format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from mlx_lora.errors import FormatError
from mlx_lora.formats.files import read_safetensors, write_safetensors
from mlx_lora.formats.sharing import data_name, hub_name, shareable

BASE = "/Users/me/models/qwen"


def shared(file: Path, tmp_path: Path, base: str | None = None) -> tuple[Path, list[str]]:
    """(the file to upload, notes)."""
    (target := tmp_path / "out").mkdir(exist_ok=True)
    notes: list[str] = []
    (found,) = shareable([file], target, base, notes)
    return found, notes


@pytest.mark.parametrize("base", [None, "Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("key", ["model", "base_model_name_or_path", "_name_or_path"])
@pytest.mark.parametrize("path", [BASE, "~/models/x", "./qwen", "../qwen", "C:\\models\\qwen", "file:///m/q", "a/b/c"])
def test_the_base_is_named_as_on_the_hub_or_not_at_all(path, key, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: path, "r": 8}))
    file, notes = shared(tmp_path / "adapter_config.json", tmp_path, base)
    assert json.loads(file.read_text()) == ({key: base, "r": 8} if base else {"r": 8})
    assert len(notes) == 1 and path in notes[0].replace("\\\\", "\\")


def test_settings_without_paths_are_uploaded_byte_for_byte(tmp_path):
    settings = {
        "base_model_name_or_path": "Qwen/Qwen3-0.6B",
        "target_modules": r"model\.layers\.(0|1)\..*(q|k)_proj$",
        "exclude": [".*lm_head", r"^model\.embed"],
        "url": "https://huggingface.co/Qwen/Qwen3-0.6B",
        "training": {"data": "mlx-community/WikiSQL", "hf_dataset": {"path": "a/b"}},
        "revision": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file, notes = shared(tmp_path / "adapter_config.json", tmp_path, "Qwen/Qwen3-0.6B")
    assert file == tmp_path / "adapter_config.json" and not notes


def test_every_path_in_a_config_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    settings = {
        "training": {
            "data": str(tmp_path),
            "iters": 5,
            "hf_dataset": [{"path": "/data/rows"}],
            "adapter_path": "folder",
        },
        "model": "folder",  # a relative path that exists
        "notes": "trained on /Users/me/data/rows.jsonl with care",
        "list": ["/etc/passwd", "kept"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file, _ = shared(tmp_path / "adapter_config.json", tmp_path)
    assert json.loads(file.read_text()) == {
        "training": {"iters": 5},
        "notes": "trained on rows.jsonl with care",
        "list": ["kept"],
    }


def test_yaml_markdown_and_the_metadata_of_safetensors(tmp_path):
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump({"out_dir": "/home/me/out", "lora_r": 8}))
    assert yaml.safe_load(shared(tmp_path / "hyperparameters.yaml", tmp_path)[0].read_text()) == {"lora_r": 8}
    card = f"---\nbase_model: {BASE}\ntags:\n- base_model:adapter:{BASE}\n---\n"  # as PEFT writes it
    card += "See https://a.b/c/d, run /home/me/x/train.py\n"
    (tmp_path / "README.md").write_text(card)
    text = shared(tmp_path / "README.md", tmp_path)[0].read_text()
    assert "/Users" not in text and "/home" not in text and "https://a.b/c/d" in text and "train.py" in text
    named = shared(tmp_path / "README.md", tmp_path, "a/b")[0].read_text()
    assert "base_model: a/b\n" in named and "- base_model:adapter:a/b\n" in named
    arrays = {"x": mx.arange(6).reshape(2, 3)}
    write_safetensors(tmp_path / "a.safetensors", arrays, {"format": "pt", "model": BASE, "source": BASE})
    file, notes = shared(tmp_path / "a.safetensors", tmp_path, "a/b")
    read = mx.load(str(file), return_metadata=True)[1]
    assert read == {"format": "pt", "model": "a/b"} and len(notes) == 2
    assert mx.array_equal(read_safetensors(file)["x"], arrays["x"])


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", ["adapter.gguf", "adapter_model.bin", "a.nemo", "last.ckpt", "adapters.npz"])
def test_other_files_with_a_path_are_refused(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(b"\x00\x01data_path\x0f/Users/me/secret/data\x00"))
    with pytest.raises(FormatError, match="/Users/me/secret/data"):
        shared(tmp_path / name, tmp_path)
    (tmp_path / name).write_bytes(pack(b"\x00/self_attn/q_proj\x00" * 9))
    assert shared(tmp_path / name, tmp_path) == (tmp_path / name, [])


def test_a_cached_download_is_named_as_its_repository():
    cached = "/Users/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc"
    assert hub_name(cached) == "Qwen/Qwen3-0.6B"
    assert hub_name("gpt2") == "gpt2" and hub_name("/x/y") is None and hub_name(None) is None
    assert data_name("a/b") == "a/b" and data_name("data") is None and data_name("/a/b") is None


@pytest.mark.parametrize("section", [
    {"path": "json", "config": {"data_files": {"train": "clients/acme/train.jsonl"}}},
    {"path": "json", "data_files": {"valid": ["clients/x.jsonl"]}},
    {"path": "/srv/acme", "data_dir": "clients"},
])  # fmt: skip
def test_data_sets_from_files_leave_nothing_but_the_names_of_the_hub(section, tmp_path):
    for value, kept in ((section, {}), ([section, {"path": "a/b", "name": "en"}], {"hf_dataset": [{"path": "a/b"}]})):
        settings = {"training": {"iters": 5, "hf_dataset": value}, "/home/me/key": 1}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        file, notes = shared(tmp_path / "adapter_config.json", tmp_path)
        assert json.loads(file.read_text()) == {"training": {"iters": 5, **kept}}
        assert any("only names of data sets" in note for note in notes)


def test_network_drives_and_short_paths_within_texts_are_shortened(tmp_path):
    text = "See //corp/user/x, smb://host/user and /secret; <b>bold</b> or not/absolute, https://a.b/c and 1/2 stay.\n"
    (tmp_path / "README.md").write_text(text)
    file, _ = shared(tmp_path / "README.md", tmp_path)
    assert file.read_text() == ("See x, user and secret; <b>bold</b> or not/absolute, https://a.b/c and 1/2 stay.\n")
