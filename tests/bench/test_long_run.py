"""A small version of ``scripts/benchmarks/long_run.py``: the same bytes after a kill, flat memory, few traces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_lora

ROOT = Path(mlx_lora.__file__).parents[1]
SCRIPT = ROOT / "scripts" / "benchmarks" / "long_run.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the scripts are not here")
def test_a_run_with_many_options_survives_kills(tmp_path):
    command = [sys.executable, str(SCRIPT), "--iters", "15", "--kills", "1", "--options", "pack"]
    # With this seed it is killed after iteration 5, so that on a slow machine, too, it has not ended before.
    command += ["--seed", "13", "--folder", str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of accumulate for 1 shapes" in done.stdout and "0 differ" in done.stdout
    # Another adapter, log or best one is seen: the check itself works.
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import long_run
    finally:
        sys.path.pop(0)
    one, two = (tmp_path / "runs" / f"pack-{name}" for name in ("one", "two"))
    for name in ("run/adapters.safetensors", "run/best/adapters.safetensors"):
        file = two / name
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    log = two / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"train_loss": ', '"train_loss": 1'))
    faults = long_run.check("pack", one, two, [])
    assert [fault.partition(" differs")[0].split()[-1] for fault in faults] == [
        *("run/adapters.safetensors", "run/best/adapters.safetensors", "log")
    ]
