"""``convert`` and ``inspect`` with files of every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_lora.cli.main import cli
from mlx_lora.errors import MLXLoRAError
from mlx_lora.formats import load_adapter

ROOT = Path(__file__).resolve().parents[1] / "fixtures"
LORA, BASE = ROOT / "peft/llama/lora", ROOT / "peft/llama/base"


def run(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, all output). Expected errors are returned as ``main`` would print them."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if isinstance(result.exception, MLXLoRAError):
        return 1, result.stdout, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.output


def test_round_trip_through_every_format(tmp_path):
    steps = [
        ("gguf", "a.gguf"),
        ("nemo", "b.nemo"),
        ("torchtune", "c"),
        ("litgpt", "d"),
        ("mlx-lm", "e"),
        ("peft", "f"),
    ]
    source = LORA
    for format, name in steps:
        code, out, said = run("convert", source, tmp_path / name, "--to", format, "--model", BASE, "--json")
        assert code == 0, said
        event = json.loads(out)
        assert (event["event"], event["target"], event["modules"], event["lost"]) == ("Converted", format, 14, [])
        source = tmp_path / name
    first, last = load_adapter(LORA), load_adapter(source)
    assert first.weights.keys() == last.weights.keys()
    assert all((first.weights[k] == last.weights[k]).all().item() for k in first.weights)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "merged"], "--model"),
        (["--to", "peft", "--dtype", "float16"], "--dtype"),
        (["--to", "merged", "--model", BASE, "--moe", "per_expert"], "--moe"),
        (["--to", "mlx-lm", "--moe", "per_expert"], "--moe: writing mlx-lm does not use"),
        (["--to", "peft", "--to-alpha", "3"], "--to-alpha: writing peft does not use"),
        (["--to", "peft", "--alpha", "3"], "--alpha: reading peft does not use"),
        (["--to", "peft", "--enable-lora", "1,x"], "1,0,1"),
        (["--to", "torchtune"], "needs the base model's config"),
        (["--to", "gguf", "--model", BASE], "one file"),
        (["--to", "kohya"], "unknown format"),
        (["--to", "lightning"], "can be read, but not written"),
    ],
)
def test_invalid_options_are_refused_by_name(arguments, said, tmp_path):
    code, _, output = run("convert", LORA, tmp_path / "out", *arguments)
    assert code != 0 and said in output
    assert not list(tmp_path.iterdir())


def test_losses_are_named_when_allowed(tmp_path):
    source = ROOT / "peft/llama/head_saved"
    arguments = ("convert", source, tmp_path / "x.gguf", "--to", "gguf", "--model", BASE)
    code, _, said = run(*arguments)
    assert code == 1 and "--allow-lossy" in said
    code, _, said = run(*arguments, "--allow-lossy")
    assert code == 0 and "left out: lm_head.weight" in said


def test_merged_model(tmp_path):
    code, _, said = run("convert", LORA, tmp_path / "merged", "--to", "merged", "--model", BASE, "--dtype", "float16")
    assert code == 0 and "from_pretrained" in said
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float16"
    code, _, said = run("convert", LORA, tmp_path / "merged", "--to", "merged", "--model", BASE)
    assert code == 1 and "--force" in said


def test_loralib_needs_alpha_and_reports_it(tmp_path):
    code, _, said = run("convert", LORA, tmp_path / "x.pt", "--to", "loralib", "--to-alpha", "4")
    assert code == 0 and "lora_alpha=4" in said
    code, _, said = run("convert", tmp_path / "x.pt", tmp_path / "back", "--to", "peft")
    assert code == 1 and "--alpha" in said
    code, _, said = run("convert", tmp_path / "x.pt", tmp_path / "back", "--to", "peft", "--alpha", "4")
    assert code == 0 and json.loads((tmp_path / "back/adapter_config.json").read_text())["lora_alpha"] == 4


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "formats").iterdir()), ids=lambda p: p.name)
def test_inspect_reads_every_format_without_a_model(path):
    files = [f for f in path.iterdir() if f.name not in ("base.txt", "options.json", "logits.npy")]
    target = files[0] if len(files) == 1 else next((f for f in files if f.name == "adapter.pt"), path)
    code, out, _ = run("inspect", target, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["event"] == "Adapter" and facts["modules"] and facts["parameters"] and facts["dtype"]
    code, out, _ = run("inspect", target)
    assert code == 0 and f"format       {facts['format']}" in out
