"""OpenAI's chat completions, completions and models."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ...errors import ConfigError
from .connection import unless_disconnected
from .errors import body_of
from .events import Answer, Event
from .state import Ask, Server

router = APIRouter()
_TOP = 20  # most top_logprobs, as OpenAI's
_TEXTS = ("text", "input_text", "output_text", "refusal")  # types of content parts


class Sampling(BaseModel):
    """What both kinds of completions take. Unknown fields are refused by name, as OpenAI does."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: str
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    xtc_probability: Annotated[float | None, Field(ge=0, le=1)] = None
    xtc_threshold: Annotated[float | None, Field(ge=0, le=0.5)] = None
    presence_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | list[str] | None = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    # For OpenAI's own bookkeeping: accepted, without a meaning here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def options(self) -> dict[str, Any]:
        """As fields of ``GenerateConfig``."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return {
            "temp": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "xtc_probability": self.xtc_probability,
            "xtc_threshold": self.xtc_threshold if self.xtc_probability else None,
            "presence_penalty": self.presence_penalty or None,
            "frequency_penalty": self.frequency_penalty or None,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias or None,
            "seed": self.seed,
            "stop": tuple(text for text in stop or () if text) or None,
        }

    @property
    def usage_in_stream(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class ChatCompletion(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=_TOP)] = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Completion(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=_TOP)] = None
    echo: Literal[False] | None = None
    suffix: None = None


def server_of(request: Request) -> Server:
    return request.app.state.server


@router.get("/v1/models", tags=["models"])
async def models(request: Request) -> dict[str, Any]:
    """The base, and each adapter by its name."""
    server = server_of(request)
    return {"object": "list", "data": [_model(server, None), *(_model(server, n) for n in server.engine.bank.names)]}


@router.get("/v1/models/{model:path}", tags=["models"])
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    server = server_of(request)
    return _model(server, server.adapter_of(model))


def _model(server: Server, adapter: str | None) -> dict[str, Any]:
    base = {"id": adapter or server.name, "object": "model", "created": int(server.started), "owned_by": "mlx-lora"}
    return {**base, "parent": server.name} if adapter else base


@router.post("/v1/chat/completions", tags=["completions"])
async def chat_completions(request: Request, body: ChatCompletion) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    if body.top_logprobs and not body.logprobs:
        raise ConfigError("top_logprobs needs logprobs: true", "Set logprobs, or leave top_logprobs out.")
    tools = None if body.tool_choice == "none" else body.tools or None
    ask = Ask(
        server.adapter_of(body.model),
        server.generation(
            **body.options(),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            chat_template_config=body.chat_template_kwargs,
        ),
        messages=[read_message(message) for message in body.messages],
        tools=tools,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
        response_format=body.response_format,
    )
    about = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "object": "chat.completion",
    }
    answers = [Answer(server.engine.tokenizer, tools) for _ in range(ask.n)]
    if body.stream:
        chunks = _chat_chunks(server, ask, answers, about, body.usage_in_stream)
        return await stream(request, chunks)
    await unless_disconnected(request, collect(server, ask, answers))
    choices = [_chat_choice(server, number, answer, body.logprobs) for number, answer in enumerate(answers)]
    return JSONResponse({**about, "choices": choices, "usage": usage(answers)})


@router.post("/v1/completions", tags=["completions"])
async def completions(request: Request, body: Completion) -> Any:
    """Continue one text or several."""
    server = server_of(request)
    prompts = body.prompt
    if not isinstance(prompts, list) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not prompts or not all(prompts) or len(prompts) * (body.n or 1) > 64:
        raise ConfigError("prompt must be one to 64 texts that are not empty", "Give a text, or a list of them.")
    config = server.generation(**body.options(), max_tokens=body.max_tokens or 16)
    adapter = server.adapter_of(body.model)
    asks = [Ask(adapter, config, text=prompt, logprobs=body.logprobs, n=body.n or 1) for prompt in prompts]
    about = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "object": "text_completion",
    }
    answers = [Answer() for ask in asks for _ in range(ask.n)]
    if body.stream:
        return await stream(request, _text_chunks(server, asks, answers, about, body.usage_in_stream))
    await unless_disconnected(request, collect(server, asks, answers))
    choices = [_text_choice(server, number, answer, body.logprobs) for number, answer in enumerate(answers)]
    return JSONResponse({**about, "choices": choices, "usage": usage(answers)})


async def events(
    server: Server, asks: Ask | list[Ask], answers: list[Answer]
) -> AsyncIterator[tuple[int, list[Event]]]:
    """(number of the answer, what is new in it), as it comes."""
    requests = [
        request for ask in (asks if isinstance(asks, list) else [asks]) for request in await server.requests(ask)
    ]
    async for number, piece in server.pieces(requests):
        yield number, answers[number].feed(piece)


async def collect(server: Server, asks: Ask | list[Ask], answers: list[Answer]) -> None:
    """Wait for all answers."""
    async for _ in events(server, asks, answers):
        pass


async def stream(request: Request, chunks: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events. What goes wrong before the first one is an answer with a status, as without streaming."""
    first = await unless_disconnected(request, anext(chunks))

    async def rest() -> AsyncIterator[str]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        except asyncio.CancelledError:
            raise
        except Exception as error:
            yield sse(body_of(request.url.path, error)[1])
        finally:
            await chunks.aclose()

    return StreamingResponse(rest(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


def usage(answers: list[Answer]) -> dict[str, Any]:
    """OpenAI's counts of tokens."""
    last = [answer.last for answer in answers if answer.last is not None]
    prompt, made = sum(piece.prompt_tokens for piece in last), sum(piece.generation_tokens for piece in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(piece.cached_tokens for piece in last)},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


async def _chat_chunks(server, ask: Ask, answers: list[Answer], about: dict, with_usage: bool) -> AsyncIterator[str]:
    about = {**about, "object": "chat.completion.chunk"}

    def chunk(number: int, delta: dict, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": number, "delta": delta, "finish_reason": reason}
        if ask.logprobs is not None:
            choice["logprobs"] = logprobs
        return sse({**about, "choices": [choice], **({"usage": None} if with_usage else {})})

    opened: set[int] = set()
    async for number, new in events(server, ask, answers):
        if number not in opened:
            opened.add(number)
            yield chunk(number, {"role": "assistant", "content": ""})
        for event in new:
            logprobs = event.logprobs and {"content": [_token_logprobs(server, event.logprobs)]}
            if event.kind == "tool_call":
                index = answers[number].calls.index(event.call)
                yield chunk(number, {"tool_calls": [{"index": index, **_tool_call(event.call)}]})
            else:
                key = "reasoning_content" if event.kind == "reasoning" else "content"
                yield chunk(number, {key: event.text}, logprobs=logprobs)
        if reason := answers[number].finish_reason:
            yield chunk(number, {}, reason)
    if with_usage:
        yield sse({**about, "choices": [], "usage": usage(answers)})
    yield sse("[DONE]")


async def _text_chunks(
    server, asks: list[Ask], answers: list[Answer], about: dict, with_usage: bool
) -> AsyncIterator[str]:
    async for number, new in events(server, asks, answers):
        reason = answers[number].finish_reason
        for event in new:
            logprobs = None if event.logprobs is None else _text_logprobs(server, [event.logprobs])
            choice = {"index": number, "text": event.text, "finish_reason": None, "logprobs": logprobs}
            yield sse({**about, "choices": [choice]})
        if reason:
            yield sse({**about, "choices": [{"index": number, "text": "", "finish_reason": reason, "logprobs": None}]})
    if with_usage:
        yield sse({**about, "choices": [], "usage": usage(answers)})
    yield sse("[DONE]")


def _chat_choice(server: Server, number: int, answer: Answer, logprobs: bool | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if answer.calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_tool_call(call) for call in answer.calls]
    choice = {"index": number, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    if logprobs:
        choice["logprobs"] = {"content": [_token_logprobs(server, each) for each in answer.logprobs]}
    return choice


def _text_choice(server: Server, number: int, answer: Answer, logprobs: int | None) -> dict[str, Any]:
    return {
        "index": number,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "logprobs": None if logprobs is None else _text_logprobs(server, answer.logprobs),
    }


def _tool_call(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token_logprobs(server: Server, each: Any) -> dict[str, Any]:
    def shown(token: int, logprob: float) -> dict[str, Any]:
        text = server.engine.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**shown(each.token, each.logprob), "top_logprobs": [shown(*pair) for pair in each.top]}


def _text_logprobs(server: Server, found: list) -> dict[str, Any]:
    decode = server.engine.tokenizer.decode
    texts = [decode([each.token]) for each in found]
    offsets = [sum(map(len, texts[:number])) for number in range(len(texts))]
    top = [{decode([token]): logprob for token, logprob in each.top} for each in found]
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def read_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it. Raises: ConfigError: it has no role, or content that is no text."""
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant", "tool", "function"):
        raise ConfigError(f"messages: {role!r} is no role", "Use system, user, assistant or tool.")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in _TEXTS]
        texts = [part.get("text") for part in parts]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            kinds = {str(part.get("type") if isinstance(part, dict) else part)[:50] for part in content} - {*_TEXTS}
            raise ConfigError(
                f"messages: only text content can be read, not {', '.join(sorted(kinds)) or 'a part without text'}",
                'Send parts of {"type": "text", "text": ...}.',
            )
        content = "".join(texts)
    elif content is not None and not isinstance(content, str):
        raise ConfigError(f"messages: content must be text, not {type(content).__name__}", "Send a string.")
    if content is None and not message.get("tool_calls"):
        raise ConfigError(f"messages: the {role} message has no content", "Send its text in content.")
    shown = {key: value for key, value in message.items() if value is not None}
    shown |= {"role": "system" if role == "developer" else role}
    if content is not None:
        shown["content"] = content
    if calls := message.get("tool_calls"):
        shown["tool_calls"] = [_read_call(call) for call in calls]
    return shown


def _read_call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect."""
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        if not isinstance(function["name"], str) or not isinstance(function["arguments"], dict):
            raise ValueError
        return {**call, "type": "function", "function": function}
    except (TypeError, KeyError, ValueError):
        raise ConfigError(
            "messages: a tool call has no function with JSON arguments", "Send back the tool calls that the model made."
        ) from None
