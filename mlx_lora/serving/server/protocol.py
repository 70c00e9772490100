"""uvicorn's HTTP connection with timeouts for clients that send their headers or read the answer too slowly."""

from __future__ import annotations

import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0  # to send all headers, counted from the connection or the previous request
TAKE_SECONDS = 60.0  # within which a client must read some of the waiting answer


class Connection(H11Protocol):
    """One connection. The server calls ``end_if_overdue`` about once a second.

    Memory for a slow client is bounded: 64 KB of the answer are buffered here, and the request's token limit bounds
    the rest.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._quiet_since = self._taken_at = time.monotonic()
        self._waiting = 0  # bytes that the client has not read

    def on_response_complete(self) -> None:
        self._quiet_since = time.monotonic()
        super().on_response_complete()

    def end_if_overdue(self, now: float) -> None:
        """Close the connection if the client is too slow. This also cancels its request."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or waiting < self._waiting:
            self._taken_at = now
        self._waiting = waiting
        asking = self.cycle is not None and not self.cycle.response_complete
        if now - self._taken_at > TAKE_SECONDS or (
            not asking and not waiting and now - self._quiet_since > HEADER_SECONDS
        ):
            self.transport.abort()
