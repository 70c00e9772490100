"""Run the server until a signal stops it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from ...config import ServeConfig
from ...errors import ConfigError
from .app import create_app
from .protocol import Connection
from .state import Server

_DRAIN = 30.0  # seconds that running answers have to finish after SIGTERM or Ctrl-C
_CLOSE = 5  # seconds that clients then have to read them


def serve(server: Server, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answer requests until SIGTERM or Ctrl-C. The server then finishes running answers, and refuses new ones with 503.

    After SIGTERM this returns, so that the process exits with 0; after Ctrl-C it raises KeyboardInterrupt. A second
    signal ends everything at once.

    Args:
        ready: called with the server's address when it listens.

    Raises: ConfigError: the port cannot be used.
    """
    _allow_connections()
    listening = listen(server.config)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        Runner(server, lambda: ready(url)).run(sockets=[listening])
    finally:
        listening.close()
        server.worker.stop()


class Runner(uvicorn.Server):
    """A uvicorn server that reports when it listens, refuses requests while it drains, and disconnects slow clients.

    It always parses HTTP with h11, because httptools has no size limit for headers.
    """

    def __init__(self, server: Server, ready: Callable[[], None] = lambda: None, **settings: Any):
        fixed: dict[str, Any] = dict(
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE,
            h11_max_incomplete_event_size=64_000,  # of headers
        )
        super().__init__(uvicorn.Config(create_app(server), **{**fixed, **settings}))
        self._ready, self._server = ready, server
        self._drain_until: float | None = None  # set by the first signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % 10 == 0:  # every second
            for connection in list(self.server_state.connections):
                connection.end_if_overdue(now)
        if self._drain_until is not None and (not self.server_state.tasks or now > self._drain_until):
            self._server.worker.stop(timeout=0)  # so that each unfinished answer ends with an error
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.draining = True
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain on the first signal, end on the second. uvicorn raises the captured signals again at the end."""
        again = self._drain_until is not None
        if again or sig == signal.SIGINT:
            self._captured_signals.append(sig)
        if again:
            self.should_exit = self.force_exit = True
        else:
            self._server.draining, self._drain_until = True, time.monotonic() + _DRAIN


def _allow_connections() -> None:
    """Raise the limit of open files. Each connection is one, and macOS allows 256 by default."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240)  # macOS refuses a higher limit
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(config: ServeConfig) -> socket.socket:
    """Open a socket that listens at the host and port of ``config``. Raises: ConfigError: the port is unusable."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((config.host, config.port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}",
            "Choose another --port, or stop the program that uses it.",
        ) from None
    made.listen(2048)
    return made
