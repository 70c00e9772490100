"""The health check, and metrics for Prometheus."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from . import shapes
from .errors import responses
from .state import Server
from .streams import server_of

router = APIRouter(tags=["health"])
_PROMETHEUS = "text/plain; version=0.0.4"
_STUCK = 120  # seconds that one step may take; reading a long prompt takes several steps


_SAYS = {"content": {"application/json": {"schema": shapes.HEALTH}}}


@router.get("/health", responses={**responses(shapes.HEALTH), 503: {"description": "The server is stuck.", **_SAYS}})
async def health(request: Request) -> JSONResponse:
    """Answer 200 while the generating thread runs and makes progress, otherwise 503 with the problem."""
    server = server_of(request)
    worker, status = server.worker, "ok"
    if not worker.alive:
        status = "the generating thread has stopped"
    elif worker.busy_seconds > _STUCK:
        status = f"a step has taken {worker.busy_seconds:.0f} seconds"
    elif server.draining:
        status = "shutting down"
    body = {"status": status, "active": server.engine.active, "queued": server.engine.queued}
    return JSONResponse(body, 200 if status == "ok" else 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={**responses(shapes.HEALTH), 200: {"description": "The numbers.", "content": {_PROMETHEUS: {}}}},
)
async def metrics(request: Request) -> Response:
    """Return the counters and gauges of this server in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(server_of(request)))
    return Response(await run_in_threadpool(generate_latest, registry), media_type=_PROMETHEUS)


class _Numbers:
    """A Prometheus collector that reads its values at each scrape."""

    def __init__(self, server: Server):
        self._server = server

    def collect(self) -> Any:
        server, engine = self._server, self._server.engine
        requests = CounterMetricFamily("mlx_lora_requests", "Requests that ended, by outcome.", labels=["outcome"])
        for outcome in ("completed", "cancelled", "failed"):
            requests.add_metric([outcome], engine.counts[outcome])
        yield requests
        tokens = CounterMetricFamily("mlx_lora_tokens", "Tokens, by kind.", labels=["kind"])
        for kind in ("prompt", "cached", "generation"):
            tokens.add_metric([kind], engine.counts[f"{kind}_tokens"])
        yield tokens
        listed = engine.bank.listed()
        for name, text, value in (
            ("requests_active", "Requests being computed.", engine.active),
            ("requests_queued", "Requests waiting.", engine.queued),
            ("adapters_loaded", "Adapters in memory.", sum(each.loaded for each in listed)),
            ("adapter_bytes", "Bytes of adapters in memory.", sum(each.nbytes for each in listed)),
            ("prompt_cache_bytes", "Bytes of the prompt cache.", engine.prompt_cache.nbytes),
            ("memory_active_bytes", "Bytes that MLX has in use.", mx.get_active_memory()),
            ("memory_peak_bytes", "Peak bytes that MLX has had in use.", mx.get_peak_memory()),
            ("worker_alive", "1 while the generating thread runs, otherwise 0.", int(server.worker.alive)),
        ):
            yield GaugeMetricFamily(f"mlx_lora_{name}", text, value)
