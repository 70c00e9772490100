"""``convert`` and ``merge`` on the command line, where they write GGUF or torchtune."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_lora.cli.main import cli
from mlx_lora.errors import MLXLoRAError
from mlx_lora.formats import load_adapter
from mlx_lora.formats.gguf_file import read_gguf

PEFT = Path(__file__).resolve().parents[1] / "fixtures/peft"
LORA, BASE = PEFT / "llama/lora", PEFT / "llama/base"
TINY = Path(__file__).resolve().parents[2] / "mlx_lora/tiny_base"


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if isinstance(result.exception, MLXLoRAError):
        return 1, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def tiny_adapter(tmp_path_factory) -> Path:
    from conftest import shake
    from mlx_lora.config import AdapterConfig
    from mlx_lora.formats import save_adapter
    from mlx_lora.model.attach import attach, extract
    from mlx_lora.model.loading import load

    model, _ = load(TINY)
    attach(model, AdapterConfig(rank=2, num_layers=-1))
    shake(model)
    return save_adapter(extract(model), tmp_path_factory.mktemp("tiny") / "adapters", "mlx-lm")


@pytest.mark.parametrize(("to", "name"), [("gguf", "both.gguf"), ("torchtune", "both")])
def test_merge_writes_other_formats(to, name, tmp_path):
    """Twice the adapter by weights 0.5 is the adapter."""
    arguments = ("merge", LORA, LORA, "--weights", "0.5,0.5", "--method", "cat", "--to", to, "--model", BASE)
    code, said = run(*arguments, "--save-path", tmp_path / name)
    assert code == 0, said
    one, both = load_adapter(LORA), load_adapter(tmp_path / name, base=BASE)
    assert both.modules == one.modules
    for path in one.modules:
        update, expected = (
            a.config.scale_of(path) * a.weights[f"{path}.lora_a"] @ a.weights[f"{path}.lora_b"] for a in (both, one)
        )
        assert mx.allclose(update, expected, atol=1e-5).item(), path


def test_model_and_modelfile(tiny_adapter, tmp_path):
    arguments = ("convert", tiny_adapter, tmp_path / "m.gguf", "--to", "merged", "--model", TINY, "--dtype", "q8_0")
    code, said = run(*arguments, "--modelfile")
    assert code == 0, said
    assert f"llama-cli -m {tmp_path / 'm.gguf'}" in said and f"ollama create m -f {tmp_path / 'Modelfile'}" in said
    assert "lost part of their update in q8_0" in said or "cosine" not in said
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\nTEMPLATE ")
    assert read_gguf(tmp_path / "m.gguf")[0]["general.name"] == "m"


def test_adapter_and_modelfile(tiny_adapter, tmp_path):
    arguments = ("convert", tiny_adapter, tmp_path / "a.gguf", "--to", "gguf", "--modelfile")
    code, said = run(*arguments, "--model", TINY)
    assert code == 0, said
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {TINY.resolve()}", "ADAPTER ./a.gguf"]


def test_modelfile_needs_a_base_that_ollama_can_import(tiny_adapter, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(TINY, quantized)
    text = (quantized / "config.json").read_text().rstrip().rstrip("}")
    (quantized / "config.json").write_text(text + ', "quantization": {"bits": 4, "group_size": 64}}')
    code, said = run("convert", tiny_adapter, tmp_path / "a.gguf", "--to", "gguf", "--modelfile", "--model", quantized)
    assert code == 1 and "quantized" in said and "--to merged" in said and not (tmp_path / "a.gguf").exists()
    code, said = run("convert", tiny_adapter, tmp_path / "a", "--to", "peft", "--modelfile")
    assert code == 1 and "--modelfile is for GGUF files" in said
