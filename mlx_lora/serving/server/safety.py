"""Check each request: Host and Origin (against DNS rebinding and other web pages), API key, and size of the body.

A plain ASGI middleware: it sees every request first, and passes the body on in chunks without storing it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from ...config import LOCAL_NAMES, ServeConfig
from . import errors

_BODY_SECONDS = 30  # for a body to arrive, plus
_BODY_SPEED = 10_000  # one second for this many bytes
_BODIES = 32  # all bodies in memory together may have this many times --body-limit
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
}
# Paths that need no key: the page's files, which ask the user for the key, and the health check.
# A browser opens reports of runs without headers. Their addresses are signed instead, see runs.py.
_OPEN, _OPEN_FOLDERS = ("/", "/health"), ("/static/", "/reports/")
_WHILE_DRAINING = ("/health", "/metrics")
_UPLOAD = "/page/adapters"


class Guard:
    """Refuses requests before they reach a route.

    Args:
        draining: returns whether the server is shutting down and must refuse new requests.
    """

    def __init__(self, app: Any, config: ServeConfig, draining: Callable[[], bool] = lambda: False):
        self._app, self._config, self._draining = app, config, draining
        self._hosts = {name.lower() for name in (*LOCAL_NAMES, config.host, *config.allow_host)}
        self._held = 0  # bytes of the bodies of requests that are not finished

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # the server has no WebSockets
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is not None:
            return await errors.answer(scope["path"], *refused)(scope, receive, self._with_headers(send, headers))
        if scope["method"] == "OPTIONS" and headers.get("origin") in self._config.allow_origin:  # a browser's preflight
            return await Response(status_code=204)(scope, receive, self._with_headers(send, headers))
        uploads = _is_upload(scope)  # written to disk in chunks, so it takes no memory
        body = _Body(receive, self._body_limit(scope), (lambda _: None) if uploads else self._hold)
        try:
            await self._app(scope, body.receive, self._with_headers(send, headers))
        finally:
            self._held -= 0 if uploads else body.seen

    def _body_limit(self, scope: dict) -> int:
        return self._config.upload_limit if _is_upload(scope) else self._config.body_limit

    def _hold(self, size: int) -> None:
        """Add ``size`` bytes to the total. Raises: HTTPException: all bodies together are too large."""
        self._held += size
        if self._held > _BODIES * self._config.body_limit:
            raise errors.HTTPException(503, "too many large requests at the same time; send this one again in a moment")

    def _refusal(self, scope: dict, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return (status, message) if the request must be refused, else None."""
        if self._draining() and scope["path"] not in _WHILE_DRAINING:
            return 503, "the server is shutting down; send the request again later"
        host = _name(headers.get("host", ""))
        if self._config.local and host not in self._hosts and not _is_loopback(host):
            return 403, f"requests to the Host {host[:100]!r} are not allowed; --allow-host allows them"
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, headers) and origin not in self._config.allow_origin:
            return 403, f"requests from web pages on {origin[:100]!r} are not allowed; --allow-origin allows them"
        if _two_lengths(headers):
            return 400, "Content-Length and Transfer-Encoding contradict each other: send only one of them"
        limit = self._body_limit(scope)
        if (length := headers.get("content-length", "")).isdecimal() and int(length) > limit:
            return 413, f"the body is larger than {limit} bytes"
        if headers.get("content-encoding", "identity") != "identity":
            return 415, "compressed bodies are not supported: send the body without Content-Encoding"
        if scope["method"] == "OPTIONS" and origin is not None:
            return None
        open_path = scope["path"] in _OPEN or scope["path"].startswith(_OPEN_FOLDERS)
        if self._config.api_key is not None and not open_path and not self._knows_key(headers):
            return 401, "the API key is missing or wrong: send it as Authorization: Bearer KEY"
        return None

    def _own(self, origin: str, headers: dict[str, str]) -> bool:
        """Whether the request comes from this server's own page."""
        return origin.partition("://")[2] == headers.get("host")

    def _knows_key(self, headers: dict[str, str]) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("latin-1"), self._config.api_key.encode())

    def _with_headers(self, send: Any, headers: dict[str, str]) -> Any:
        origin = headers.get("origin")
        # The clients of OpenAI and Anthropic send additional headers, such as x-stainless-os and anthropic-beta.
        asked = headers.get("access-control-request-headers", "authorization, content-type, x-api-key")

        number = uuid.uuid4().hex.encode()  # OpenAI's and Anthropic's clients show this request id

        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                found = [*message.get("headers", []), *_HEADERS.items()]
                found += [(b"x-request-id", number), (b"request-id", number)]
                if _two_lengths(headers):  # the next bytes may still belong to this body
                    found.append((b"connection", b"close"))
                if origin in self._config.allow_origin:
                    found += [
                        (b"access-control-allow-origin", origin.encode()),
                        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
                        (b"access-control-allow-headers", asked.encode("latin-1")),
                        (b"vary", b"Origin"),
                    ]
                message = {**message, "headers": found}
            await send(message)

        return sending


class _Body:
    """A request's body while it is received. The size limit and the time limit hold whatever Content-Length says."""

    def __init__(self, receive: Any, limit: int, hold: Callable[[int], None]):
        self._receive, self._limit, self._hold = receive, limit, hold
        self._begun, self._whole = time.monotonic(), False
        self.seen = 0  # bytes

    async def receive(self) -> dict:
        if self._whole:  # from here on, only wait for the client to disconnect
            return await self._receive()
        left = self._begun + _BODY_SECONDS + self.seen / _BODY_SPEED - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except asyncio.TimeoutError:
            raise errors.HTTPException(408, "the body did not arrive in time") from None
        self._whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.seen += size
        self._hold(size)
        if self.seen > self._limit:
            raise errors.HTTPException(413, f"the body is larger than {self._limit} bytes")
        return message


def _two_lengths(headers: dict[str, str]) -> bool:
    """Whether a proxy and this server may disagree where the body ends (request smuggling; RFC 9112, 6.1)."""
    return "content-length" in headers and "transfer-encoding" in headers


def _is_upload(scope: dict) -> bool:
    return scope["method"] == "POST" and scope["path"] == _UPLOAD


def _name(host: str) -> str:
    """Return the host name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
