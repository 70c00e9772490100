"""A small version of ``scripts/benchmarks/long_run.py``: the same bytes after a kill, flat memory, few traces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mlx_lora

ROOT = Path(mlx_lora.__file__).parents[1]
SCRIPT = ROOT / "scripts" / "benchmarks" / "long_run.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the scripts are not here")
def test_a_run_with_many_options_survives_kills(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import long_run

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(long_run, "OPTIONS", {"pack": {**long_run.OPTIONS["pack"], "report_prompts": 0}})
    # With this seed it is killed after iteration 5, so that on a slow machine, too, it has not ended before.
    words = ["--iters", "15", "--kills", "1", "--seed", "13", "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["long_run", *words])
    with pytest.raises(SystemExit) as end:
        long_run.main()
    said = capsys.readouterr().out
    assert not end.value.code, said
    assert "1 of accumulate for 1 shapes" in said and "0 differ" in said
    # Another adapter, log or best one is seen: the check itself works.
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
