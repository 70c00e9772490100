"""Connections that do not last for ever: uvicorn's, with an end for clients that neither send nor take anything."""

from __future__ import annotations

import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0  # for the whole of a request's headers, from the connection or the request before on
TAKE_SECONDS = 60.0  # in which a client must take some of the answer that waits for it


class Connection(H11Protocol):
    """One connection. ``end_if_overdue`` is to be called every second or so.

    What waits for a slow client is bounded: 64 KB of the answer here, and of what is generated meanwhile no more than
    the request's own limit of tokens.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._quiet_since = self._taken_at = time.monotonic()
        self._waiting = 0  # bytes for the client to take

    def on_response_complete(self) -> None:
        self._quiet_since = time.monotonic()
        super().on_response_complete()

    def end_if_overdue(self, now: float) -> None:
        """Close the connection where the client is too slow; what was computed for it ends."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or waiting < self._waiting:
            self._taken_at = now
        self._waiting = waiting
        asking = self.cycle is not None and not self.cycle.response_complete
        if now - self._taken_at > TAKE_SECONDS or (
            not asking and not waiting and now - self._quiet_since > HEADER_SECONDS
        ):
            self.transport.abort()
