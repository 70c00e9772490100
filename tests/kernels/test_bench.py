"""``bench kernels`` runs where there is no Metal, and says what is what."""

from __future__ import annotations

import json

from click.testing import CliRunner

from mlx_lora.cli.main import cli


def run(*args) -> str:
    done = CliRunner().invoke(
        cli, ["bench", "kernels", "--size", "tiny", "--iters", "1", *args], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


def test_table():
    lines = run().splitlines()
    assert len(lines) == 1 + 5 * 4
    launches = {tuple(line.split()[:2]): int(line.split()[2]) for line in lines if line.startswith("layer")}
    assert launches == {("layer", "base"): 7, ("layer", "kernels"): 11, ("layer", "plain"): 21, ("layer", "mlx-lm"): 35}


def test_json():
    found = [json.loads(line) for line in run("--json", "--bits", "16", "--rows", "3").splitlines()]
    assert {event["event"] for event in found} == {"KernelTime"} and len(found) == 20
    assert all(event["microseconds"] > 0 for event in found)
