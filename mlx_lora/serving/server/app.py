"""The FastAPI application: every route, behind the checks of ``safety.Guard``."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ... import __version__
from . import adapters, anthropic, errors, health, openai, page, responses, runs, uploads
from .document import describe
from .safety import Guard
from .state import Server


def create_app(server: Server) -> FastAPI:
    """Create the application for ``server``. It starts the generating thread on startup and stops it on shutdown.

    No route imports code from a model, opens a path from a request, or answers a host that the options do not allow.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        uploads.remove_left(server.engine.bank.folder)
        server.worker.start()
        try:
            yield
        finally:
            server.draining = True
            server.worker.stop()

    app = FastAPI(title="mlx-lora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.openapi = lambda: describe(app, server)
    for part in (openai, responses, anthropic, adapters, health, page, runs, uploads):
        app.include_router(part.router)
    app.add_exception_handler(RequestValidationError, errors.on_invalid)
    app.add_exception_handler(HTTPException, errors.on_http)
    app.add_exception_handler(Exception, errors.on_error)
    for kind in (errors.MLXLoRAError, errors.OutOfTime):
        app.add_exception_handler(kind, errors.on_error)
    app.add_middleware(Guard, config=server.config, draining=lambda: server.draining)
    return app
