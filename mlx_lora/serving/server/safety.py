"""Who may ask: Host and Origin are checked against DNS rebinding and foreign web pages, the key, the size of a body.

A plain ASGI middleware: it sees every request first, and streams the body through without keeping it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import Any

from starlette.responses import Response

from ...config import LOCAL_NAMES, ServeConfig
from . import errors

_BODY_SECONDS = 30  # from one part of a body to the next
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
}
# Where no key is asked for: the page's files, which ask the user for it, and what tells that the server runs.
# Reports of runs are opened as pages, without headers; their addresses are signed, see runs.py.
_OPEN, _OPEN_FOLDERS = ("/", "/health"), ("/static/", "/reports/")
_UPLOAD = "/page/adapters"


class Guard:
    """Refuses requests before they reach a route."""

    def __init__(self, app: Any, config: ServeConfig):
        self._app, self._config = app, config
        self._hosts = {name.lower() for name in (*LOCAL_NAMES, config.host, *config.allow_host)}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is not None:
            return await errors.answer(scope["path"], *refused)(scope, receive, self._with_headers(send, headers))
        if scope["method"] == "OPTIONS" and headers.get("origin") in self._config.allow_origin:  # a browser's preflight
            return await Response(status_code=204)(scope, receive, self._with_headers(send, headers))
        await self._app(scope, self._limited(receive, self._body_limit(scope)), self._with_headers(send, headers))

    def _refusal(self, scope: dict, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, message) of a request that is refused."""
        host = _name(headers.get("host", ""))
        if self._config.local and host not in self._hosts and not _is_loopback(host):
            return 403, f"the Host {host[:100]!r} is not served here; to allow it, start the server with --allow-host"
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, headers) and origin not in self._config.allow_origin:
            return 403, f"web pages of {origin[:100]!r} may not ask; to allow it, start the server with --allow-origin"
        limit = self._body_limit(scope)
        if (length := headers.get("content-length", "")).isdecimal() and int(length) > limit:
            return 413, f"the body is larger than {limit} bytes"
        if scope["method"] == "OPTIONS" and origin is not None:
            return None
        open_path = scope["path"] in _OPEN or scope["path"].startswith(_OPEN_FOLDERS)
        if self._config.api_key is not None and not open_path and not self._knows_key(headers):
            return 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY"
        return None

    def _own(self, origin: str, headers: dict[str, str]) -> bool:
        """Whether the page that asks is this server's own."""
        return origin.partition("://")[2] == headers.get("host")

    def _knows_key(self, headers: dict[str, str]) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._config.api_key.encode())

    def _body_limit(self, scope: dict) -> int:
        upload = scope["method"] == "POST" and scope["path"] == _UPLOAD
        return self._config.upload_limit if upload else self._config.body_limit

    def _limited(self, receive: Any, limit: int) -> Any:
        """``receive`` that ends a body, of whatever announced length, at the limit."""
        seen, whole = 0, False

        async def limited() -> dict:
            nonlocal seen, whole
            try:  # a client that sends its body byte by byte; afterwards only its leaving is waited for
                message = await (receive() if whole else asyncio.wait_for(receive(), _BODY_SECONDS))
            except asyncio.TimeoutError:
                raise errors.HTTPException(408, f"the body did not arrive within {_BODY_SECONDS} seconds") from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > limit:
                raise errors.HTTPException(413, f"the body is larger than {limit} bytes")
            return message

        return limited

    def _with_headers(self, send: Any, headers: dict[str, str]) -> Any:
        origin = headers.get("origin")

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                found = [*message.get("headers", []), *_HEADERS.items()]
                if origin in self._config.allow_origin:
                    found += [
                        (b"access-control-allow-origin", origin.encode()),
                        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
                        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version"),
                        (b"vary", b"Origin"),
                    ]
                message = {**message, "headers": found}
            await send(message)

        return sending


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
