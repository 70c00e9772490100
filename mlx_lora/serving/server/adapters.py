"""Routes that load, unload and list adapters while the server runs, with the names that vLLM and llama.cpp use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from ...errors import AdapterError
from . import shapes
from .body import Body, StrictRoute, integer
from .errors import responses
from .state import UnknownModel
from .streams import server_of

router = APIRouter(tags=["adapters"], route_class=StrictRoute)
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class Load(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: _Name
    lora_path: Annotated[str | None, Field(max_length=200)] = None
    load_inplace: bool = False


class Unload(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: _Name
    lora_int_id: integer(0, 2**53) | None = None  # sent by vLLM's clients; the name is enough


@router.post("/v1/load_lora_adapter", responses=responses(shapes.DONE, 404, 415))
async def load_lora_adapter(request: Request, body: Load) -> Any:
    """Load an adapter from ``--adapters-dir``. ``lora_path`` must be the name of a subfolder, not any other path."""
    server = server_of(request)
    bank, path = server.engine.bank, body.lora_path or body.lora_name
    known = await run_in_threadpool(bank.in_folder)
    if path not in known:
        raise UnknownModel(path, known, "adapter in the server's --adapters-dir")
    if body.lora_name in (server.name, "base") or (
        body.lora_name in bank and body.lora_name != path and not body.load_inplace
    ):
        hint = "Unload it first, or send load_inplace: true."
        raise AdapterError(f"{body.lora_name!r} is already loaded", hint)  # 400, as vLLM answers
    if body.lora_name != path or body.lora_name in bank.registered:
        await run_in_threadpool(bank.add, body.lora_name, bank.folder / path)
    await run_in_threadpool(bank.load, body.lora_name)
    return {"status": f"LoRA adapter {body.lora_name!r} added successfully"}


@router.post("/v1/unload_lora_adapter", responses=responses(shapes.DONE, 404, 415))
async def unload_lora_adapter(request: Request, body: Unload) -> Any:
    """Drop an adapter from memory, and remove a name that ``load_lora_adapter`` added. Running answers finish first."""
    bank = server_of(request).engine.bank
    if body.lora_name not in await run_in_threadpool(lambda: bank.names):
        raise UnknownModel(body.lora_name, bank.names, "adapter")
    await run_in_threadpool(bank.unload, body.lora_name)
    return {"status": f"LoRA adapter {body.lora_name!r} removed successfully"}


@router.get("/lora-adapters", responses=responses(shapes.ADAPTERS))
async def lora_adapters(request: Request) -> Any:
    """List every adapter, whether it is in memory, and why it cannot share a batch with others."""
    listed = await run_in_threadpool(server_of(request).engine.bank.listed)
    return [{"id": number, **asdict(each), "path": None, "scale": 1.0} for number, each in enumerate(listed)]
