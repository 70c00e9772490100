"""Adapters while the server runs: loading and unloading by name, as vLLM and llama.cpp have it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from ...errors import AdapterError, ConfigError
from .openai import server_of

router = APIRouter(tags=["adapters"])


class Load(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str | None, Field(max_length=200)] = None
    load_inplace: bool = False


class Unload(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, body: Load) -> dict[str, str]:
    """Load an adapter of the adapters' folder: ``lora_path`` is the name of its subfolder, never another path."""
    bank = server_of(request).engine.bank
    path = body.lora_path or body.lora_name
    if path not in bank.in_folder():
        raise AdapterError(
            f"the folder of adapters has no {path!r}", "Put it there; the server's --adapters-dir names the folder."
        )
    if body.lora_name in bank and body.lora_name != path and not body.load_inplace:
        raise ConfigError(f"{body.lora_name!r} is loaded already", "Unload it first, or send load_inplace: true.")
    if body.lora_name != path or body.lora_name in bank.registered:
        await run_in_threadpool(bank.add, body.lora_name, bank.folder / path)
    await run_in_threadpool(bank.load, body.lora_name)
    return {"status": f"LoRA adapter {body.lora_name!r} added successfully"}


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, body: Unload) -> dict[str, str]:
    """Drop an adapter from memory; one that another name stands for is forgotten. Running answers finish with it."""
    await run_in_threadpool(server_of(request).engine.bank.unload, body.lora_name)
    return {"status": f"LoRA adapter {body.lora_name!r} removed successfully"}


@router.get("/lora-adapters")
async def lora_adapters(request: Request) -> list[dict[str, Any]]:
    """Every adapter, whether it is in memory, and why it cannot share a batch with others."""
    listed = server_of(request).engine.bank.listed()
    return [{"id": number, **asdict(each), "path": None, "scale": 1.0} for number, each in enumerate(listed)]
