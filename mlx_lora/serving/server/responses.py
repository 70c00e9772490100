"""OpenAI's responses endpoint: text and tools. Nothing is stored, so requests cannot continue an answer by id."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field, WithJsonSchema

from ...errors import ConfigError
from . import shapes
from .body import Body, StrictRoute, only
from .connection import unless_disconnected
from .errors import ANSWERED
from .errors import responses as described
from .events import Answer
from .openai_requests import (
    Bookkeeping,
    Effort,
    Function,
    Model,
    StreamOptions,
    Tokens,
    ToolChoice,
    read_message,
    template_variables,
)
from .state import Ask, Server
from .streams import collect, events, server_of, sse, stream
from .tool_choice import tools_of_openai

router = APIRouter(tags=["responses"], route_class=StrictRoute)


class ResponsesTool(Function):
    """A function tool. Its fields are not nested under "function" as in chat completions."""

    type: Literal["function"]


class Reasoning(Body):
    """How long the model thinks, if its chat template supports that. Answers have all reasoning, never a summary."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Responses(Bookkeeping):
    """POST /v1/responses."""

    model: Model | None = None  # the base by default
    input: (
        str
        | Annotated[
            list[Annotated[dict[str, Any], WithJsonSchema(shapes.INPUT_ITEM)]], Field(min_length=1, max_length=10_000)
        ]
    )
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stream: bool | None = None
    tools: Annotated[list[ResponsesTool] | None, Field(max_length=256)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Annotated[dict[str, Any] | None, WithJsonSchema(shapes.nullable(shapes.TEXT_OPTIONS))] = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    stream_options: StreamOptions | None = None
    background: only(False) | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None


@router.post("/v1/responses", responses=described(shapes.RESPONSE, *ANSWERED, stream=True))
async def responses(request: Request, body: Responses) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    tools = tools_of_openai([_tool(tool) for tool in body.tools or ()], body.tool_choice, body.parallel_tool_calls)
    ask = Ask(
        server.adapter_of(body.model),
        server.generation(
            temp=body.temperature,
            top_p=body.top_p,
            max_tokens=body.max_output_tokens,
            chat_template_config=template_variables(body.reasoning.effort if body.reasoning else None),
        ),
        messages=_messages(body),
        tools=tools,
        response_format=_format(body.text),
    )
    answer = Answer(server.engine.tokenizer, tools.shown, tools.one_call)
    about = {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model or server.name,
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "parallel_tool_calls": not tools.one_call,
        "temperature": ask.config.temp,
        "top_p": ask.config.top_p,
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        "error": None,
    }
    if body.stream:
        return await stream(request, _chunks(server, ask, answer, about))
    await unless_disconnected(request, collect(server, ask, [answer]))
    return JSONResponse({**about, **_end(answer), "output": _output(answer)})


def _messages(body: Responses) -> list[dict[str, Any]]:
    chat = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*chat, {"role": "user", "content": body.input}]
    if not body.input:
        raise ConfigError("input is empty", "Send a text, or a list of messages.")
    answer: list[dict[str, Any]] = []  # items of one answer, which become one message
    for item in [*body.input, None]:
        if item is not None and _of_answer(item):
            answer.append(item)
            continue
        chat += _answered(answer)
        answer = []
        if item is not None:
            chat.append(_message(item))
    return chat


def _of_answer(item: dict[str, Any]) -> bool:
    kind = item.get("type", "message")
    return kind in ("function_call", "reasoning") or (kind == "message" and item.get("role") == "assistant")


def _answered(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert items of an answer to assistant messages: one, unless text follows text or a tool call."""
    made: list[dict[str, Any]] = []
    for item in items:
        kind, last = item.get("type", "message"), made[-1] if made else {}
        if not made or (kind != "function_call" and ("tool_calls" in last or "content" in last)):
            last = {"role": "assistant"}
            made.append(last)
        if kind == "reasoning":
            last["reasoning_content"] = _thoughts(item)
        elif kind == "message":
            last["content"] = item.get("content")
        else:
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            last.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
    return [read_message({"content": "", **message}) for message in made]


def _thoughts(item: dict[str, Any]) -> str:
    told = [[] if item.get(name) is None else item[name] for name in ("content", "summary")]
    if not all(isinstance(parts, list) and all(isinstance(part, dict) for part in parts) for parts in told):
        raise ConfigError(
            "input: content and summary of reasoning must be lists of objects", "Send reasoning items back unchanged."
        )
    return "".join(text for part in told[0] or told[1] if isinstance(text := part.get("text"), str))


def _message(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        return read_message({key: item.get(key) for key in ("role", "content")})
    if kind == "function_call_output":
        return read_message({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    raise ConfigError(f"input: items of type {kind!r} are not supported", "Send messages and function calls.")


def _tool(tool: ResponsesTool) -> dict[str, Any]:
    """The tool in the form that chat templates expect."""
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """Convert ``text`` to the response_format of chat completions."""
    if unknown := sorted(
        key for key, value in (text or {}).items() if (key, value) != ("verbosity", "medium") and key != "format"
    ):
        raise ConfigError(f"text: {', '.join(unknown)[:200]} is not supported", "Send only format in text.")
    wanted = (text or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return wanted
    return {"type": "json_schema", "json_schema": wanted}


def _end(answer: Answer) -> dict[str, Any]:
    cut, last = answer.finish_reason == "length", answer.last
    return {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": last
        and {
            "input_tokens": last.prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.cached_tokens},
            "output_tokens": last.generation_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": last.prompt_tokens + last.generation_tokens,
        },
    }


def _output(answer: Answer) -> list[dict[str, Any]]:
    """Return the output items of an answer in the order in which they began."""
    return [item.done() for item in answer_items(answer)]


class Item:
    """One output item while it is generated."""

    def __init__(self, kind: str, call: Any = None):
        self.kind, self.call, self.text = kind, call, ""
        prefix = {"text": "msg", "reasoning": "rs", "tool_call": "fc"}[kind]
        self.id = f"{prefix}_{uuid.uuid4().hex}"

    def begun(self) -> dict[str, Any]:
        if self.kind == "tool_call":
            return {**self._call("in_progress"), "arguments": ""}
        if self.kind == "reasoning":
            return {"id": self.id, "type": "reasoning", "summary": [], "status": "in_progress"}
        return {"id": self.id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}

    def done(self) -> dict[str, Any]:
        if self.kind == "tool_call":
            return self._call("completed")
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self.text}]
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": "completed"}
        message = {"id": self.id, "type": "message", "role": "assistant", "status": "completed"}
        return {**message, "content": [self.part()]}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _call(self, status: str) -> dict[str, Any]:
        about = {"id": self.id, "type": "function_call", "status": status, "call_id": self.call.id}
        return {**about, "name": self.call.name, "arguments": self.call.arguments}


def answer_items(answer: Answer) -> list[Item]:
    items = []
    if answer.reasoning:
        items.append(Item("reasoning"))
        items[-1].text = answer.reasoning
    if answer.text or not answer.calls:
        items.append(Item("text"))
        items[-1].text = answer.text
    return items + [Item("tool_call", call) for call in answer.calls]


async def _chunks(server: Server, ask: Ask, answer: Answer, about: dict[str, Any]) -> AsyncIterator[str]:
    number, items = -1, []

    def tell(kind: str, **data: Any) -> str:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number, **data}, kind)

    def close() -> list[str]:
        item = items[-1]
        at = {"item_id": item.id, "output_index": len(items) - 1}
        told = []
        if item.kind == "text":
            told.append(tell("response.output_text.done", **at, content_index=0, text=item.text, logprobs=[]))
            told.append(tell("response.content_part.done", **at, content_index=0, part=item.part()))
        elif item.kind == "reasoning":
            told.append(tell("response.reasoning_text.done", **at, content_index=0, text=item.text))
        else:
            told.append(
                tell("response.function_call_arguments.done", **at, name=item.call.name, arguments=item.call.arguments)
            )
        return [*told, tell("response.output_item.done", output_index=len(items) - 1, item=item.done())]

    empty = {**about, "status": "in_progress", "incomplete_details": None, "usage": None, "output": []}
    async for _, new in events(server, ask, [answer]):
        if number < 0:
            yield tell("response.created", response=empty)
            yield tell("response.in_progress", response=empty)
        for event in new:
            if not items or items[-1].kind != event.kind or event.kind == "tool_call":
                for line in close() if items else ():
                    yield line
                items.append(Item(event.kind, event.call))
                yield tell("response.output_item.added", output_index=len(items) - 1, item=items[-1].begun())
                if event.kind == "text":
                    at = {"item_id": items[-1].id, "output_index": len(items) - 1, "content_index": 0}
                    yield tell("response.content_part.added", **at, part=items[-1].part())
            items[-1].text += event.text
            at = {"item_id": items[-1].id, "output_index": len(items) - 1}
            if event.kind == "tool_call":
                yield tell("response.function_call_arguments.delta", **at, delta=event.call.arguments)
            elif event.kind == "reasoning":
                yield tell("response.reasoning_text.delta", **at, content_index=0, delta=event.text)
            else:
                yield tell("response.output_text.delta", **at, content_index=0, delta=event.text, logprobs=[])
    for line in close() if items else ():
        yield line
    output = [item.done() for item in items] or _output(answer)
    kind = "response.incomplete" if answer.finish_reason == "length" else "response.completed"
    yield tell(kind, response={**about, **_end(answer), "output": output})
