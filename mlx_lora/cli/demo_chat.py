"""``demo --chat``: compare the built-in tiny model with two small adapters on the chat page."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from urllib.parse import urlencode

from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import ConfigError
from . import console, demo
from .reports import Stop, show_reports

ROWS = {"train": 2000, "valid": 20}
ADAPTER = AdapterConfig(rank=16, scale=4.0, num_layers=-1)
OPTIMIZER = OptimizerConfig(learning_rate=4e-3, lr_schedule="cosine_decay", warmup=10)
TRAIN = TrainConfig(iters=270, batch_size=8, steps_per_report=25, steps_per_eval=100, save_every=1000, report_prompts=0)
ANSWERS = ("record", "reply")  # an adapter for each of the skill's kinds of answer
PROMPT = "Anna left a red kite at the park."


def chat_demo(folder: Path, port: int, browser: bool) -> None:
    """Train an adapter for each of ``ANSWERS`` in ``folder``, then serve them and open the page, until Ctrl-C.

    Args:
        port: 0 for any that is free.
    """
    from .serve import check_installed, serve, start

    check_installed("demo --chat")
    _check_port(port)
    base, adapters = demo.quantized_base(folder / "base-4bit"), folder / "adapters"
    for number, answer in enumerate(ANSWERS, 1):
        console.title(f"{number}. An adapter that answers with a {answer}")
        demo.write_rows(folder / "data" / answer, ROWS, answer)
        _train(base, folder / "data" / answer, adapters / answer)
    console.title(f"{len(ANSWERS) + 1}. The chat page")
    options = ["--model", str(base), "--adapters-dir", str(adapters), "--runs-dir", str(adapters), "--port", str(port)]
    query = urlencode({"columns": ",".join(("base", *ANSWERS)), "prompt": PROMPT})

    def ready(url: str) -> None:
        console.note(f"Press Enter on the page to compare the answers: {url}/?{query}")
        if browser and _has_display():  # in a thread: some browsers return only when they are closed
            threading.Thread(target=webbrowser.open, args=(f"{url}/?{query}",), daemon=True).start()

    start(serve.make_context("serve", options).params, ready)


def _train(base: Path, data: Path, adapter: Path) -> None:
    from ..model.loading import load
    from ..runs import run

    stop = Stop()
    reports = run(
        adapter,
        model=load(base),
        data=DataConfig(data=str(data), mask_prompt=True),
        adapter=ADAPTER,
        optimizer=OPTIMIZER,
        train=TRAIN,
        stop=stop,
    )
    if show_reports(reports, stop)["Done"].stopped:
        raise KeyboardInterrupt


def _check_port(port: int) -> None:
    """Refuse a port that is taken before the training, not after it."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} cannot be used ({error})", "Choose another --port, or leave it out.") from None


def _has_display() -> bool:
    """Whether a browser would open in a window; one that runs in the terminal would take it over."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
