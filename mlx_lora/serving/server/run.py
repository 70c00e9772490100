"""Runs the server until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from ...config import ServeConfig
from ...errors import ConfigError
from .app import create_app
from .state import Server

_DRAIN = 30  # seconds that running answers may take after SIGTERM or Ctrl-C; a second one ends them


def serve(server: Server, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answer requests until SIGTERM or Ctrl-C. Running answers are then finished, and new ones refused.

    Args:
        ready: called with the server's address when it listens.

    Raises: ConfigError: the port cannot be used.
    """
    config = server.config
    listening = _listen(config)
    host, port = listening.getsockname()[:2]
    runner = _Runner(
        uvicorn.Config(
            create_app(server),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_DRAIN,
            server_header=False,
            h11_max_incomplete_event_size=64_000,  # of headers
        ),
        lambda: ready(f"http://{f'[{host}]' if ':' in host else host}:{port}"),
        server,
    )
    try:
        runner.run(sockets=[listening])
    finally:
        listening.close()


class _Runner(uvicorn.Server):
    """uvicorn's server, which tells when it listens and when it drains."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], server: Server):
        super().__init__(config)
        self._ready, self._server = ready, server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.draining = True
        await super().shutdown(sockets)


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((config.host, config.port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}",
            "Choose another --port, or end the program that uses it.",
        ) from None
    made.listen(2048)
    return made
