"""Send answers over HTTP: all at once when complete, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from .connection import unless_disconnected
from .errors import body_of
from .events import Answer, Event
from .state import Ask, Server


def server_of(request: Request) -> Server:
    return request.app.state.server


async def events(
    server: Server, asks: Ask | list[Ask], answers: list[Answer]
) -> AsyncIterator[tuple[int, list[Event]]]:
    """Yield (number of the answer, its new events)."""
    requests = [
        request for ask in (asks if isinstance(asks, list) else [asks]) for request in await server.requests(ask)
    ]
    async for number, piece in server.pieces(requests):
        yield number, answers[number].feed(piece)


async def collect(server: Server, asks: Ask | list[Ask], answers: list[Answer]) -> None:
    """Wait until all answers are complete."""
    async for _ in events(server, asks, answers):
        pass


async def stream(request: Request, chunks: AsyncIterator[str]) -> StreamingResponse:
    """Stream server-sent events. An error before the first event becomes a normal answer with an error status."""
    first = await unless_disconnected(request, anext(chunks))

    async def rest() -> AsyncIterator[str]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        except asyncio.CancelledError:
            raise
        except Exception as error:
            yield sse(body_of(request, error)[1])
        finally:
            await chunks.aclose()

    return StreamingResponse(rest(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def sse(data: Any, event: str | None = None) -> str:
    """Format one server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
