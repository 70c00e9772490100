"""Turn exceptions into HTTP errors that say what is wrong and how to fix it, without internals of the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import AdapterError, ConfigError, DataError, FormatError, MLXLoRAError
from ..engine import BusyError
from ..memory import TooLongError
from ..worker import Stopped
from . import shapes
from .state import OutOfTime, PromptTooLong, UnknownModel

RETRY_AFTER = "1"  # seconds
log = logging.getLogger(__name__)

# Status, OpenAI's type, Anthropic's type. The first class that matches is used.
_KINDS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (BusyError, 429, "rate_limit_error", "rate_limit_error"),
    (Stopped, 503, "server_error", "overloaded_error"),
    (OutOfTime, 504, "server_error", "timeout_error"),
    (UnknownModel, 404, "invalid_request_error", "not_found_error"),
    (PromptTooLong, 400, "invalid_request_error", "invalid_request_error"),
    (TooLongError, 413, "invalid_request_error", "request_too_large"),
    (ConfigError, 400, "invalid_request_error", "invalid_request_error"),
    (DataError, 400, "invalid_request_error", "invalid_request_error"),
    (AdapterError, 400, "invalid_request_error", "invalid_request_error"),
    (FormatError, 400, "invalid_request_error", "invalid_request_error"),
)
_CODES = {UnknownModel: "model_not_found", PromptTooLong: "context_length_exceeded"}  # OpenAI's
_BY_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}


def described(error: Exception, hide: Callable[[str], str]) -> tuple[int, dict[str, Any], str]:
    """Return (status, OpenAI's error, Anthropic's type). For an unexpected error the message gives no details.

    Args:
        hide: removes private text, such as folders of this machine, from a message.
    """
    for kind, status, openai, anthropic in _KINDS:
        if isinstance(error, kind):
            code = _CODES.get(kind)
            message = f"{error.message}. {error.hint}" if isinstance(error, MLXLoRAError) else str(error)
            message = hide(message)
            return status, {"message": message, "type": openai, "param": None, "code": code}, anthropic
    log.error("a request failed", exc_info=error)
    body = {"message": "the server failed to answer this request", "type": "server_error", "param": None, "code": None}
    return 500, body, "api_error"


def body_of(request: Request, error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and body of ``error`` in the format of the API that the request's path belongs to."""
    status, openai, anthropic = described(error, request.app.state.server.hide_folders)
    return status, _shaped(request.url.path, openai, anthropic, getattr(error, "details", None))


def _shaped(path: str, openai: dict[str, Any], anthropic: str, details: Any = None) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        told = {"type": anthropic, "message": openai["message"], **({"details": details} if details else {})}
        return {"type": "error", "error": told}
    return {"error": openai}


def answer(path: str, status: int, message: str, param: str | None = None) -> JSONResponse:
    """Return an error answer that no exception of the engine caused."""
    anthropic = _BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
    kind = "invalid_request_error" if status < 500 else "server_error"
    openai = {"message": message, "type": kind, "param": param, "code": None}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else _come_back(status)
    return JSONResponse(_shaped(path, openai, anthropic), status, headers)


def _come_back(status: int) -> dict[str, str] | None:
    return {"Retry-After": RETRY_AFTER} if status in (429, 503) else None


# Errors of every route, and those of routes that generate.
_ALWAYS = (400, 401, 403, 408, 413, 500)
ANSWERED = (404, 415, 429, 503, 504)
_REASON = {
    400: "The request is not valid.",
    401: "The API key is missing or wrong.",
    403: "Requests from this host or web page are not allowed.",
    404: "There is no such model, adapter or path.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or the answer does not fit into memory.",
    415: "The body is not JSON, or is compressed.",
    429: "Too many requests are waiting. Retry-After says when to send it again.",
    500: "The server failed.",
    503: "The server is shutting down, or cannot answer. Retry-After says when to send it again.",
    504: "The answer took too long.",
}


def responses(good: dict[str, Any], *statuses: int, stream: bool = False, error: Any = shapes.ERROR) -> dict:
    """Return FastAPI's ``responses`` for a route: the schema of its answer, and its errors.

    Args:
        stream: whether the answer may also be server-sent events.
    """
    content: dict[str, Any] = {"application/json": {"schema": good}}
    if stream:
        content["text/event-stream"] = {"schema": shapes.SERVER_SENT}
    found: dict = {200: {"description": "The answer.", "content": content}}
    for status in sorted({*_ALWAYS, *statuses}):
        found[status] = {"description": _REASON[status], "content": {"application/json": {"schema": error}}}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "string", "pattern": "^[0-9]+$"}}}
    return found


anthropic_responses = partial(responses, error=shapes.ANTHROPIC_ERROR)


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Return the answer to a request whose route raised ``error``."""
    status, body = body_of(request, error)
    return JSONResponse(body, status, _come_back(status))


async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Return the answer to an invalid body. It lists every problem with its field."""
    faults = [(_field(fault["loc"]), _said(fault)) for fault in error.errors()]
    told = dict.fromkeys(f"{field or 'body'}: {message}" for field, message in faults)
    return answer(request.url.path, 400, "; ".join(list(told)[:20]), faults[0][0] or None)


# Fields of other servers -> the fields that do the same here.
_INSTEAD = {
    **dict.fromkeys(("n_predict", "max_new_tokens", "max_gen_len", "num_predict"), "max_tokens"),
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_context_size",
    **dict.fromkeys(("json_schema", "guided_json", "structured_outputs", "format"), "response_format"),
    **dict.fromkeys(("enable_thinking", "thinking", "think"), "chat_template_kwargs: {enable_thinking: ...}"),
    "functions": "tools",
    "function_call": "tool_choice",
    **dict.fromkeys(("adapter", "adapters", "adapter_path", "adapter_id"), "model, with the name of an adapter"),
}


def _said(fault: dict[str, Any]) -> str:
    if fault["type"] not in ("extra_forbidden", "none_required"):
        return fault["msg"].removeprefix("Value error, ")
    instead = _INSTEAD.get(str(fault["loc"][-1]))
    return f"is not supported; use {instead}" if instead else "is not supported; leave it out"


def _field(place: tuple) -> str:
    """Return the field's path in the body, without the names of the types that pydantic tried."""
    names = [str(part) for part in place[1:]]
    return ".".join(name for name in names if name.isidentifier() or name.isdecimal())


async def on_http(request: Request, error: HTTPException) -> JSONResponse:
    """Return the answer to an ``HTTPException``, such as an unknown path or method."""
    found = answer(request.url.path, error.status_code, str(error.detail))
    found.headers.update(error.headers or {})
    return found
