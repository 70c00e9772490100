"""A server on a free port of this machine, in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from conftest import shake
from mlx_lora import AdapterConfig, attach, extract, load, save_adapter, unmount
from mlx_lora.config import ServeConfig
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.server.app import create_app
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
        engine = Engine(model, tokenizer, bank, batch_size=settings.batch_size, queue_size=settings.queue_size)
    server = Server(engine, Worker(engine), settings, "tiny")
    runner = uvicorn.Server(uvicorn.Config(create_app(server), port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        runner.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and not server.worker.alive
