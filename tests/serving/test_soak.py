"""Many clients at once, good and bad: a short form of ``./scripts/bench soak``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from serving_helpers import greedy_answers, make_adapters, running

SCRIPT = Path(__file__).parents[2] / "scripts/benchmarks/soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    sys.modules["soak"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_none_is_lost_and_nothing_is_left_behind(soak, tmp_path):
    names = ("pirate", "lawyer", "dora")
    make_adapters(tmp_path, names)
    with running(tmp_path, body_limit=50_000, queue_size=16, prompt_cache_size=0) as (url, server):
        expected = greedy_answers(server.engine, ("tiny", *names), soak.PROMPT, 4)
        clients, before, after = soak.soak(
            *(url, server.engine, server.runner.loop, expected, 5 * len(soak.KINDS), 200),
            tokens=4,
            pause=0.01,
            body_limit=50_000,
        )
        assert not clients.faults and not soak.grown(before, after), clients.faults
        assert all(clients.done[kind.__name__] >= 5 for kind in soak.KINDS)
        assert not server.engine.counts["failed"]
