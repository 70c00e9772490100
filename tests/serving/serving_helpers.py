"""A server on a free port of this machine, in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import shake
from mlx_lora import AdapterConfig, attach, extract, load, save_adapter, unmount
from mlx_lora.config import GenerateConfig, ServeConfig
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Request
from mlx_lora.serving.server.run import Runner, listen
from mlx_lora.serving.server.state import Server
from mlx_lora.serving.worker import Worker
from mlx_lora.tiny_base import PATH


def make_adapters(folder: Path, names: tuple[str, ...] = ("pirate", "lawyer")) -> None:
    """Random adapters of the tiny base in PEFT's format, a subfolder each."""
    model, _ = load(PATH)
    for seed, name in enumerate(names):
        attach(model, AdapterConfig(rank=4 + seed, num_layers=-1, method="dora" if name == "dora" else "lora"))
        shake(model, seed, size=0.3)
        save_adapter(extract(model), folder / name, "peft")
        unmount(model)


@contextmanager
def running(folder: Path | None = None, engine: Engine | None = None, **config) -> Iterator[tuple[str, Server]]:
    """(address, server) of ``engine``, or of the tiny base with the adapters in ``folder``."""
    settings = ServeConfig(port=0, **config)
    if engine is None:
        model, tokenizer = load(PATH)
        bank = AdapterBank(model, folder=folder)
        engine = Engine(
            *(model, tokenizer, bank),
            batch_size=settings.batch_size,
            queue_size=settings.queue_size,
            prompt_cache_size=settings.prompt_cache_size,
        )
    server = Server(engine, Worker(engine), settings, "tiny")
    runner = Runner(server, log_level="critical", timeout_graceful_shutdown=2)
    server.runner = runner  # for tests of its end
    listening = listen(settings)
    thread = threading.Thread(target=runner.run, args=([listening],), daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        runner.should_exit = True
        thread.join(120)
        assert not thread.is_alive() and not server.worker.alive


def greedy_answers(engine: Engine, models: tuple[str, ...], prompt: str, tokens: int) -> dict[str, str]:
    """The greedy continuation of ``prompt`` by each model, one after the other; "tiny" is the base."""
    found = {}
    for name in models:
        pieces, adapter = [], None if name == "tiny" else name
        request = Request(engine.plain_prompt(prompt), GenerateConfig(max_tokens=tokens), adapter)
        row = engine.submit(request, pieces.append)
        while not row.ended:
            time.sleep(0.01)
        found[name] = "".join(piece.text for piece in pieces)
    return found
