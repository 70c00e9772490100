"""``--prompt-cache-file``: mlx-lm's files, of every kind of cache that it writes, give what they give in mlx-lm."""

from __future__ import annotations

import importlib
import sys

import mlx.core as mx
import pytest

from conftest import shake
from mlx_lora import AdapterConfig, attach, extract, load, save_adapter
from mlx_lora.cli.main import main
from mlx_lora.tiny_base import PATH

START, QUESTION = "A red umbrella was found on a bench.", " It belongs to Carmen. Where is it?"


def mlx_lm(monkeypatch, command: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_lm", *options])
    importlib.import_module(f"mlx_lm.{command}").main()


def ours(*options: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", *options])
    assert not end.value.code


@pytest.mark.parametrize(
    "options",
    [(), ("--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0"), ("--max-kv-size", "12")],
    ids=["plain", "quantized", "rotating"],
)
def test_a_file_of_mlx_lm_is_continued_as_mlx_lm_continues_it(tmp_path, monkeypatch, capsys, options):
    file = str(tmp_path / "cache.safetensors")
    made = ("--model", str(PATH), "--prompt", START, "--prompt-cache-file", file)
    mlx_lm(monkeypatch, "cache_prompt", *made, *options)
    capsys.readouterr()
    before = (tmp_path / "cache.safetensors").read_bytes()
    ask = ("--prompt", QUESTION, "--prompt-cache-file", file, "--max-tokens", "16")
    mlx_lm(monkeypatch, "generate", *ask, "--verbose", "False", *options)
    expected = capsys.readouterr().out
    ours("--model", str(PATH), *ask)
    assert capsys.readouterr().out.strip() == expected.strip() != ""
    assert (tmp_path / "cache.safetensors").read_bytes() == before, "the file is only read"


def test_a_file_of_mlx_lm_with_an_adapter(tmp_path, monkeypatch, capsys):
    model, _ = load(PATH)
    mx.random.seed(0)
    attach(model, AdapterConfig(rank=4, num_layers=-1))
    shake(model, size=0.03)  # the answer stays one that the model is sure of: mlx-lm's layers round otherwise
    save_adapter(extract(model), tmp_path / "adapter")
    file, adapter = str(tmp_path / "cache.safetensors"), ("--adapter-path", str(tmp_path / "adapter"))
    mlx_lm(
        monkeypatch,
        *("cache_prompt", "--model", str(PATH), "--prompt", START, "--prompt-cache-file", file),
        *adapter,
    )
    ask = ("--prompt", QUESTION, "--prompt-cache-file", file, "--max-tokens", "16", *adapter)
    capsys.readouterr()
    mlx_lm(monkeypatch, "generate", *ask, "--verbose", "False")
    expected = capsys.readouterr().out
    ours("--model", str(PATH), *ask)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_what_is_no_cache_or_of_another_model_is_said(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "cache.safetensors")
    mlx_lm(monkeypatch, "cache_prompt", "--model", str(PATH), "--prompt", START, "--prompt-cache-file", file)
    packed = str(tmp_path / "packed.safetensors")
    quantized = ("--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0")
    made = ("--model", str(PATH), "--prompt", START, "--prompt-cache-file", packed)
    mlx_lm(monkeypatch, "cache_prompt", *made, *quantized)
    for options, text in (
        (("--model", str(PATH), "--prompt-cache-file", packed, "--kv-bits", "8"), "bits 4, and --kv-bits is 8"),
        (("--model", str(PATH), "--prompt-cache-file", packed, "--kv-bits", "4"), "and --kv-group-size is 64"),
        (("--model", str(PATH), "--draft-model", str(PATH)), "draft-model"),
        (("--model", "another"), "was made with"),
        (("--model", str(PATH), "--prompt-cache-file", str(PATH / "config.json")), "is not a prompt cache"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", "--prompt", "x", "--prompt-cache-file", file, *options])
        assert text in capsys.readouterr().err
