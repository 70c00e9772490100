"""Detect that the client has disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

CLOSED = 499  # nginx's status for "client closed request"; nobody reads the answer


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of ``work``, or cancel it if the client disconnects first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(CLOSED, "the client closed the request")
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)
