"""Anthropic's messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from ...errors import ConfigError
from .connection import unless_disconnected
from .events import Answer, Event
from .openai import collect, events, server_of, sse, stream
from .state import Ask, Server

router = APIRouter(tags=["messages"])
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages(BaseModel):
    """POST /v1/messages."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    system: str | list[dict[str, Any]] | None = None
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None  # for Anthropic's own bookkeeping, as is service_tier
    service_tier: str | None = None


class CountTokens(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


@router.post("/v1/messages")
async def messages(request: Request, body: Messages) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    ask = _ask(server, body)
    answer = Answer(server.engine.tokenizer, ask.tools)
    about = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": body.model}
    if body.stream:
        return await stream(request, _chunks(server, ask, answer, about))
    await unless_disconnected(request, collect(server, ask, [answer]))
    content = [{"type": "thinking", "thinking": answer.reasoning, "signature": ""}] if answer.reasoning else []
    content += [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    content += [_tool_use(call, json.loads(call.arguments or "{}")) for call in answer.calls]
    return JSONResponse({**about, "content": content, **_end(answer), "usage": _usage(answer)})


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, body: CountTokens) -> dict[str, int]:
    """The length of a conversation in tokens."""
    server = server_of(request)
    ask = _ask(server, Messages(**body.model_dump(exclude_none=True), max_tokens=1))
    (made,) = await server.requests(ask)
    return {"input_tokens": len(made.tokens)}


def _ask(server: Server, body: Messages) -> Ask:
    tools = [_tool(tool) for tool in body.tools or ()] or None
    choice = (body.tool_choice or {}).get("type", "auto")
    if choice not in ("auto", "none"):
        raise ConfigError(f"tool_choice: {choice!r} cannot be forced", 'Use {"type": "auto"} or {"type": "none"}.')
    thinking = (body.thinking or {}).get("type")
    config = server.generation(
        temp=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(text for text in body.stop_sequences or () if text) or None,
        max_tokens=body.max_tokens,
        chat_template_config=None if thinking is None else {"enable_thinking": thinking != "disabled"},
    )
    system = _text(body.system) if body.system else None
    chat = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        chat += _message(message)
    return Ask(server.adapter_of(body.model), config, messages=chat, tools=None if choice == "none" else tools)


def _message(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as those of chat templates: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant") or not isinstance(content, (str, list)):
        raise ConfigError(
            f"messages: a message of role {role!r} with content of type {type(content).__name__}",
            "Send messages of user and assistant, whose content is text or a list of blocks.",
        )
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results, thoughts = [], [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text([block]))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(_text(block.get("thinking")))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content"))}
            results.append(result)
        elif kind != "redacted_thinking":
            raise ConfigError(f"messages: a block of type {kind!r} cannot be read", "Send text and results of tools.")
    made = {"role": role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}
    if any(thoughts):
        made["reasoning_content"] = "".join(thoughts)
    return [*results, made] if texts or calls or not results else results


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = [
        block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in content
    ]
    if not all(isinstance(text, str) for text in texts):
        kinds = {str(block.get("type") if isinstance(block, dict) else block)[:50] for block in content} - {"text"}
        raise ConfigError(
            f"only blocks of text can be read here, not {', '.join(sorted(kinds)) or 'one without text'}",
            'Send {"type": "text", "text": ...}.',
        )
    return "".join(texts)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chat templates take it."""
    if not isinstance(tool.get("name"), str) or tool.get("type") not in (None, "custom"):
        raise ConfigError("tools: only custom tools with a name can be used", "Send name, description, input_schema.")
    function = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}}


def _tool_use(call: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _end(answer: Answer) -> dict[str, Any]:
    word = answer.last.stop_word if answer.last else None
    reason = "stop_sequence" if word else _REASONS.get(answer.finish_reason)
    return {"stop_reason": reason, "stop_sequence": word}


def _usage(answer: Answer) -> dict[str, int]:
    last = answer.last
    if last is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": last.prompt_tokens - last.cached_tokens,
        "cache_read_input_tokens": last.cached_tokens,
        "output_tokens": last.generation_tokens,
    }


async def _chunks(server: Server, ask: Ask, answer: Answer, about: dict[str, Any]) -> AsyncIterator[str]:
    def tell(kind: str, **data: Any) -> str:
        return sse({"type": kind, **data}, kind)

    index, opened = -1, None
    async for _, new in events(server, ask, [answer]):
        if index < 0:
            start = {**about, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answer)}
            yield tell("message_start", message=start)
            index = 0
        for event in new:
            if opened is not None and (event.kind != opened or event.kind == "tool_call"):
                yield tell("content_block_stop", index=index)
                index, opened = index + 1, None
            if opened is None:
                opened = event.kind
                yield tell("content_block_start", index=index, content_block=_block(event))
            yield tell("content_block_delta", index=index, delta=_delta(event))
    if opened is not None:
        yield tell("content_block_stop", index=index)
    yield tell("message_delta", delta=_end(answer), usage=_usage(answer))
    yield tell("message_stop")


def _block(event: Event) -> dict[str, Any]:
    if event.kind == "tool_call":
        return _tool_use(event.call, {})
    return (
        {"type": "thinking", "thinking": "", "signature": ""}
        if event.kind == "reasoning"
        else {"type": "text", "text": ""}
    )


def _delta(event: Event) -> dict[str, Any]:
    if event.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": event.call.arguments}
    if event.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": event.text}
    return {"type": "text_delta", "text": event.text}
