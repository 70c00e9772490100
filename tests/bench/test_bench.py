"""``bench kernels`` runs where there is no Metal, and says what is what."""

from __future__ import annotations

import json
import re

from click.testing import CliRunner

from mlx_lora.cli.main import cli


def run(*args) -> str:
    done = CliRunner().invoke(
        cli, ["bench", "kernels", "--size", "tiny", "--iters", "1", *args], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


def test_table():
    """Every kernel is there, on every path that does its work, with the launches that the other tests count."""
    found: dict[str, dict[str, str]] = {}
    for line in run().splitlines()[1:]:
        part, path, launches, *_ = re.split(r"  +", line)
        found.setdefault(part, {})[path] = launches
    for part in ("q, DoRA", "norms, DoRA"):  # by versions of mlx-lm
        assert int(found[part].pop("mlx-lm")) > 20
    assert found == {
        "q, k, v": {"base": "3", "kernels": "4", "plain": "9", "mlx-lm": "15"},
        "o": {"base": "1", "kernels": "2", "plain": "3", "mlx-lm": "5"},
        "gate, up": {"base": "2", "kernels": "3", "plain": "6", "mlx-lm": "10"},
        "down": {"base": "1", "kernels": "2", "plain": "3", "mlx-lm": "5"},
        "layer": {"base": "8", "kernels": "10", "plain": "22", "mlx-lm": "36"},
        "MLP": {"base": "4", "kernels": "4", "plain": "10", "mlx-lm": "16"},
        "q, DoRA": {"base": "1", "kernels": "2", "plain": "4"},
        "q, 4 adapters": {"base": "1", "kernels": "2", "plain": "21"},
        "q, NF4": {"base": "1", "kernels": "2", "plain": "11"},
        "norms, DoRA": {"kernels": "1", "plain": "11"},
        "dequantize, NF4": {"kernels": "1", "plain": "8"},
        "head and loss": {"kernels": "-", "plain": "-", "mlx-lm": "-"},
    }


def test_json():
    found = [json.loads(line) for line in run("--json", "--bits", "16", "--rows", "3").splitlines()]
    assert {event["event"] for event in found} == {"KernelTime"} and len(found) == 42
    assert all(event["microseconds"] > 0 for event in found)


def test_bits_that_mlx_lm_cannot_adapt_by_dora():
    """It takes the inputs of 3 bits for 10 to a word."""
    found = [json.loads(line) for line in run("--json", "--bits", "3").splitlines()]
    assert [event["path"] for event in found if "DoRA" in event["part"]] == [
        "base",
        "kernels",
        "plain",
        "kernels",
        "plain",
    ]
