"""The chat page: its files, and the routes that they call.

The page's own routes are under ``/page/`` and need the API key if one is set. They are not a public API: programs
use OpenAI's or Anthropic's API.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from ... import __version__
from ...config import SAMPLING, GenerateConfig
from .difference import difference
from .errors import body_of
from .events import Answer, Event
from .markdown import code_stylesheet, render
from .openai_requests import read_message
from .state import Ask, UnknownModel
from .streams import server_of, sse, stream

router = APIRouter(include_in_schema=False)
MOST_COLUMNS = 8  # answers side by side
FILES = Path(__file__).parents[1] / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cache-Control": "no-cache",  # after an update of the package, old and new files must not mix
}
_RENDER_EVERY = 0.3  # seconds between renderings of an unfinished answer; at least 10x the last rendering's time
_SHOWN = [
    field
    for field in fields(GenerateConfig)
    if field.metadata.get("section") == SAMPLING or field.name in ("max_tokens", "stop", "chat_template_config")
]
_KINDS = get_type_hints(GenerateConfig)
Options = create_model(
    "Options",
    __config__=ConfigDict(extra="forbid"),
    **{field.name: (_KINDS[field.name] | None, None) for field in _SHOWN},
)


class Chat(BaseModel):
    """POST /page/chat."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    adapters: Annotated[list[str | None], Field(min_length=1, max_length=MOST_COLUMNS)] = [None]  # None: the base
    options: Options = Options()


class Texts(BaseModel):
    """POST /page/markdown."""

    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[str], Field(max_length=1000)]


class Two(BaseModel):
    """POST /page/difference."""

    model_config = ConfigDict(extra="forbid")

    old: str
    new: str


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    files = _files()
    if name not in files:
        raise HTTPException(404, "Not Found")
    return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)


@cache
def _files() -> dict[str, bytes]:
    """The page's files by name, so that no path ever comes from a request."""
    found = {path.name: path.read_bytes() for path in FILES.iterdir() if path.suffix in _TYPES}
    return {**found, "code.css": code_stylesheet().encode()}


@router.get("/page/settings")
async def settings(request: Request) -> dict[str, Any]:
    """Return what the page needs to know about the server: the base, the adapters and the sampling options."""
    server = server_of(request)
    options = [
        {
            "name": field.name,
            "kind": field.type.partition(" ")[0].partition("[")[0],
            "help": field.metadata["help"],
            "default": server.page_temp if field.name == "temp" else getattr(server.defaults, field.name),
        }
        for field in _SHOWN
    ]
    adapters = await run_in_threadpool(lambda: server.engine.bank.names)
    return {
        "version": __version__,
        "base": server.name,
        "adapters": adapters,
        "options": options,
        "max_tokens_limit": server.config.max_tokens_limit,
        "most_columns": MOST_COLUMNS,
    }


@router.post("/page/markdown")
async def markdown(body: Texts) -> dict[str, list[str]]:
    """Render Markdown texts as HTML."""
    return {"html": await run_in_threadpool(lambda: [render(text) for text in body.texts])}


@router.post("/page/difference")
async def differences(body: Two) -> dict[str, Any]:
    """Compare two texts word by word."""
    return {"parts": await run_in_threadpool(difference, body.old, body.new)}


@router.post("/page/chat")
async def chat(request: Request, body: Chat) -> Any:
    """Answer a conversation with each of ``adapters``, in one batch. Each event names its column.

    An error in one column does not end the others.
    """
    return await stream(request, _chunks(request, body))


async def _chunks(request: Request, body: Chat) -> AsyncIterator[str]:
    server = server_of(request)
    config = server.generation(**{"temp": server.page_temp, **body.options.model_dump(exclude_none=True)})
    messages = [read_message(message) for message in body.messages]
    names, columns, unknown = [], [], {}
    for column, adapter in enumerate(body.adapters):
        try:
            names.append(server.adapter_of(adapter))
            columns.append(column)
        except UnknownModel as error:
            unknown[column] = error
    if not names:
        raise unknown[0]
    for column, error in unknown.items():
        yield _failed(request, column, error)
    answers = [Answer(server.engine.tokenizer.tool_parser, None) for _ in body.adapters]
    begun, first, rendered = time.perf_counter(), [0.0] * len(answers), [time.perf_counter()] * len(answers)
    requests = [each for name in names for each in await server.requests(Ask(name, config, messages=messages))]
    async for number, piece in server.pieces(requests, apart=True):
        column = columns[number]
        if isinstance(piece, Exception):
            yield _failed(request, column, piece)
            continue
        answer, now = answers[column], time.perf_counter()
        new = answer.feed(piece)
        first[column] = first[column] or now - begun
        for event in new:
            yield sse({"column": column, **_told(event, answer)})
        if answer.finish_reason:
            html = await run_in_threadpool(render, answer.text)
            yield sse({"column": column, "kind": "end", "html": html, **_numbers(answer, first[column])})
        elif new and now >= rendered[column]:
            html = await run_in_threadpool(render, answer.text)
            took = time.perf_counter() - now
            rendered[column] = now + took + max(_RENDER_EVERY, 10 * took)
            yield sse({"column": column, "kind": "html", "html": html, **_numbers(answer, first[column])})
    yield sse("[DONE]")


def _failed(request: Request, column: int, error: Exception) -> str:
    return sse({"column": column, "kind": "error", "text": body_of(request, error)[1]["error"]["message"]})


def _told(event: Event, answer: Answer) -> dict[str, Any]:
    if event.kind != "tool_call":
        return {"kind": event.kind, "text": event.text}
    text = f"\n```json\n{event.call.name}({event.call.arguments})\n```\n"  # the page runs no tools: it shows the call
    answer.text += text
    return {"kind": "text", "text": text}


def _numbers(answer: Answer, first: float) -> dict[str, Any]:
    last = answer.last
    return {
        "finish_reason": answer.finish_reason,
        "first_token": first,  # seconds
        "tokens": last.generation_tokens,
        "tokens_per_second": last.generation_tps,
        "prompt_tokens": last.prompt_tokens,
        "cached_tokens": last.cached_tokens,
    }
