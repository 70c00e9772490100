"""Errors as answers: what is wrong with a request and the fix, never the inside of the server."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import AdapterError, ConfigError, DataError, FormatError, MLXLoRAError
from ..engine import BusyError
from ..memory import TooLongError
from ..worker import Stopped
from .state import OutOfTime, UnknownModel

RETRY_AFTER = "1"  # seconds
log = logging.getLogger(__name__)

# Status, OpenAI's type, Anthropic's type; the first class that fits.
_KINDS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (BusyError, 429, "rate_limit_error", "rate_limit_error"),
    (Stopped, 503, "server_error", "overloaded_error"),
    (OutOfTime, 504, "server_error", "timeout_error"),
    (UnknownModel, 404, "invalid_request_error", "not_found_error"),
    (TooLongError, 413, "invalid_request_error", "request_too_large"),
    (ConfigError, 400, "invalid_request_error", "invalid_request_error"),
    (DataError, 400, "invalid_request_error", "invalid_request_error"),
    (AdapterError, 400, "invalid_request_error", "invalid_request_error"),
    (FormatError, 400, "invalid_request_error", "invalid_request_error"),
)
_BY_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}


def described(error: Exception) -> tuple[int, dict[str, Any], str]:
    """(status, OpenAI's error, Anthropic's type). Of an unexpected error only that it happened is told."""
    for kind, status, openai, anthropic in _KINDS:
        if isinstance(error, kind):
            code = "model_not_found" if kind is UnknownModel else None
            message = f"{error.message}. {error.hint}" if isinstance(error, MLXLoRAError) else str(error)
            return status, {"message": message, "type": openai, "param": None, "code": code}, anthropic
    log.error("a request failed", exc_info=error)
    body = {"message": "the server failed at this request", "type": "server_error", "param": None, "code": None}
    return 500, body, "api_error"


def body_of(path: str, error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and body of ``error`` in the shape of the interface that ``path`` belongs to."""
    status, openai, anthropic = described(error)
    return status, _shaped(path, openai, anthropic)


def _shaped(path: str, openai: dict[str, Any], anthropic: str) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": anthropic, "message": openai["message"]}}
    return {"error": openai}


def answer(path: str, status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error that is no exception of the engine."""
    anthropic = _BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
    kind = "invalid_request_error" if status < 500 else "server_error"
    openai = {"message": message, "type": kind, "param": param, "code": None}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(_shaped(path, openai, anthropic), status, headers)


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that raised."""
    status, body = body_of(request.url.path, error)
    return JSONResponse(body, status, {"Retry-After": RETRY_AFTER} if status in (429, 503) else None)


async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """The answer to a body that does not fit the interface: every fault, by its field."""
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'body'}: {fault['msg']}" for fault in error.errors()
    ]
    param = ".".join(str(part) for part in error.errors()[0]["loc"][1:]) or None
    return answer(request.url.path, 400, "; ".join(faults[:20]), param)


async def on_http(request: Request, error: HTTPException) -> JSONResponse:
    """The answer to an unknown path or method."""
    found = answer(request.url.path, error.status_code, str(error.detail))
    found.headers.update(error.headers or {})
    return found
