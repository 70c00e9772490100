"""Anthropic's messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, WithJsonSchema

from ...errors import ConfigError
from . import shapes
from .body import Body, StrictRoute, integer, only
from .connection import unless_disconnected
from .errors import ANSWERED, anthropic_responses
from .events import Answer, Event
from .openai_requests import Effort, Model, StopWord, Tokens, template_variables
from .state import Ask, Server
from .streams import collect, events, server_of, sse, stream
from .tool_choice import tools_of

router = APIRouter(tags=["messages"], route_class=StrictRoute)
_MODES = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}  # Anthropic's tool_choice -> OpenAI's
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesTool(Body):
    """A tool that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # accepted only: the server caches every prompt
    strict: bool | None = None  # accepted only: the schema is shown to the model, as with OpenAI's tools
    eager_input_streaming: bool | None = None  # accepted only: a tool call is sent once it is complete
    defer_loading: only(False) | None = None

    def for_template(self) -> dict[str, Any]:
        """The tool in the form that chat templates expect."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.input_schema or {}}
        return {"type": "function", "function": function}


class ToolChoice(Body):
    """Whether the model may call tools, or must call any of them or the named one."""

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks before it answers, if its chat template supports that."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Tokens | None = None
    display: str | None = None


class OutputConfig(Body):
    """How long the model thinks, if its chat template supports that, and the JSON schema of its answer."""

    effort: Effort | None = None
    format: dict[str, Any] | None = None

    def response_format(self) -> dict[str, Any] | None:
        """The schema as OpenAI's ``response_format``. Raises: ConfigError: it is not a JSON schema."""
        if self.format is None:
            return None
        if self.format.keys() != {"type", "schema"} or self.format["type"] != "json_schema":
            raise ConfigError(
                "output_config.format is not a JSON schema", 'Send {"type": "json_schema", "schema": {...}}.'
            )
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.format["schema"]}}


class NoThreads(ConfigError):
    """The server stores no conversations. ``details`` makes Anthropic's client send all messages in each request."""

    def __init__(self) -> None:
        super().__init__("thread: this server stores no conversations", "Send all messages, without thread.")
        self.details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


class CountTokens(Body):
    """POST /v1/messages/count_tokens."""

    model: Model | None = None  # the base by default
    messages: Annotated[
        list[Annotated[dict[str, Any], WithJsonSchema(shapes.ANTHROPIC_MESSAGE)]],
        Field(min_length=1, max_length=10_000),
    ]
    system: Annotated[
        str | list[dict[str, Any]] | None, WithJsonSchema({"anyOf": [*shapes.TEXT_OR_BLOCKS, {"type": "null"}]})
    ] = None
    tools: Annotated[list[MessagesTool] | None, Field(max_length=256)] = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None  # accepted only: no message is left out


class Messages(CountTokens):
    """POST /v1/messages."""

    max_tokens: Tokens
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: integer(0) | None = None
    stop_sequences: Annotated[list[StopWord] | None, Field(max_length=64)] = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None  # accepted only, like service_tier
    service_tier: str | None = None
    inference_geo: str | None = None
    diagnostics: dict[str, Any] | None = None
    speed: Literal["standard"] | None = None
    thread: dict[str, Any] | None = None


@router.post("/v1/messages", responses=anthropic_responses(shapes.MESSAGES, *ANSWERED, stream=True))
async def messages(request: Request, body: Messages) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    ask = _ask(server, body)
    answer = Answer(server.engine.tokenizer, ask.tools.shown, ask.tools.one_call)
    about = {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": body.model or server.name,
    }
    if body.stream:
        return await stream(request, _chunks(server, ask, answer, about))
    await unless_disconnected(request, collect(server, ask, [answer]))
    content = [{"type": "thinking", "thinking": answer.reasoning, "signature": ""}] if answer.reasoning else []
    content += [{"type": "text", "text": answer.text}] if answer.text or not answer.calls else []
    content += [_tool_use(call, json.loads(call.arguments or "{}")) for call in answer.calls]
    return JSONResponse({**about, "content": content, **_end(answer), "usage": _usage(answer)})


@router.post("/v1/messages/count_tokens", responses=anthropic_responses(shapes.TOKEN_COUNT, *ANSWERED))
async def count_tokens(request: Request, body: CountTokens) -> Any:
    """Count the tokens of a conversation."""
    server = server_of(request)
    ask = _ask(server, Messages(**body.model_dump(exclude_none=True), max_tokens=1))
    return {"input_tokens": await server.count(ask)}


def _ask(server: Server, body: Messages) -> Ask:
    if body.thread is not None:
        raise NoThreads
    choice = body.tool_choice or ToolChoice(type="auto")
    tools = tools_of(
        [tool.for_template() for tool in body.tools or ()],
        _MODES[choice.type],
        [choice.name or ""] if choice.type == "tool" else None,
        choice.type != "tool" and not choice.disable_parallel_tool_use,
    )
    thinking = body.thinking.type if body.thinking else None
    output = body.output_config or OutputConfig()
    config = server.generation(
        temp=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(text for text in body.stop_sequences or () if text) or None,
        max_tokens=body.max_tokens,
        chat_template_config=template_variables(
            output.effort, None if thinking is None else {"enable_thinking": thinking != "disabled"}
        ),
    )
    system = _text(body.system) if body.system else None
    chat = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        chat += _message(message)
    if chat[-1]["role"] == "assistant" and chat[-1].keys() == {"role", "content"}:  # the beginning of the answer
        config = replace(config, prefill_response=chat.pop()["content"] or None)
    return Ask(
        *(server.adapter_of(body.model), config),
        messages=chat,
        tools=tools,
        response_format=output.response_format(),
    )


def _message(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Convert a message to messages for chat templates. Each tool result becomes a separate message."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant") or not isinstance(content, (str, list)):
        raise ConfigError(
            f"messages: a message has role {role!r} and content of type {type(content).__name__}",
            "Use role user or assistant, and send content as text or a list of blocks.",
        )
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    texts, calls, results, thoughts = [], [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_text([block]))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(_text([{"type": "text", "text": block.get("thinking", "")}]))
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            if not isinstance(function["name"], str) or not isinstance(function["arguments"], dict):
                raise ConfigError(
                    "messages: a tool_use block has no name and input", "Send back the blocks that the model generated."
                )
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content"))}
            results.append(result)
        elif kind != "redacted_thinking":
            raise ConfigError(f"messages: blocks of type {kind!r} are not supported", "Send text and tool results.")
    made = {"role": role, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}
    if any(thoughts):
        made["reasoning_content"] = "".join(thoughts)
    return [*results, made] if texts or calls or not results else results


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConfigError("content must be text or a list of blocks", 'Send {"type": "text", "text": ...}.')
    texts = [
        block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in content
    ]
    if not all(isinstance(text, str) for text in texts):
        kinds = {str(block.get("type") if isinstance(block, dict) else block)[:50] for block in content} - {"text"}
        raise ConfigError(
            f"only text blocks are supported, not {', '.join(sorted(kinds)) or 'a block without text'}",
            'Send {"type": "text", "text": ...}.',
        )
    return "".join(texts)


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
