"""A client that goes away while a thread still waits to hand its request to the engine; numbers that JSON lacks."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from mlx_lora.config import ServeConfig
from mlx_lora.serving.server import openai
from mlx_lora.serving.server.state import Server


class Engine:
    """An engine whose ``submit`` waits for ``go``."""

    def __init__(self):
        self.begun, self.go, self.rows = threading.Event(), threading.Event(), []

    def submit(self, request, deliver):
        self.begun.set()
        assert self.go.wait(60)
        self.rows.append(SimpleNamespace(cancelled=False))
        return self.rows[-1]

    def cancel(self, row):
        row.cancelled = True


def test_a_row_that_is_submitted_for_a_client_that_has_gone_is_cancelled():
    engine = Engine()
    server = Server(engine, SimpleNamespace(alive=True, wake=lambda: None), ServeConfig(), "tiny")

    async def leave() -> None:
        pieces = server.pieces([None])
        first = asyncio.ensure_future(anext(pieces))
        await asyncio.to_thread(engine.begun.wait, 60)
        first.cancel()
        await asyncio.sleep(0)
        engine.go.set()
        with suppress(asyncio.CancelledError):
            await first
        for _ in range(6000):
            if engine.rows and engine.rows[0].cancelled:
                return
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert engine.rows and engine.rows[0].cancelled


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan"), -1e30])
def test_log_probabilities_are_numbers_of_json(logprob):
    assert json.dumps(openai._finite(logprob), allow_nan=False) == "-9999.0"
    assert openai._finite(-1.5) == -1.5
