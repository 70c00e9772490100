"""OpenAI's chat completions, completions and models endpoints."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from ...config.generate import TEMPLATE_ARGUMENTS
from ...errors import ConfigError
from . import shapes
from .body import StrictRoute
from .connection import unless_disconnected
from .errors import ANSWERED, responses
from .events import Answer
from .openai_requests import ChatCompletion, Completion, Sampling, template_variables
from .state import Ask, Server
from .streams import collect, events, server_of, sse, stream
from .tool_choice import tools_of_openai

router = APIRouter(route_class=StrictRoute)


@router.get("/models", include_in_schema=False)  # mlx-lm and llama.cpp also serve this path
@router.get("/v1/models", tags=["models"], responses=responses(shapes.MODELS))
async def models(request: Request) -> Any:
    """List the base and each adapter by its name."""
    server = server_of(request)
    return {"object": "list", "data": [_model(server, None), *(_model(server, n) for n in server.engine.bank.names)]}


@router.get("/v1/models/{model:path}", tags=["models"], responses=responses(shapes.MODEL, 404))
async def model(request: Request, model: str) -> Any:
    """Return the base or one adapter."""
    server = server_of(request)
    return _model(server, server.adapter_of(model))


def _model(server: Server, adapter: str | None) -> dict[str, Any]:
    base = {"id": adapter or server.name, "object": "model", "created": int(server.started), "owned_by": "mlx-lora"}
    return {**base, "parent": server.name} if adapter else base


@router.post("/chat/completions", include_in_schema=False)
@router.post("/v1/chat/completions", tags=["completions"], responses=responses(shapes.CHAT, *ANSWERED, stream=True))
async def chat_completions(request: Request, body: ChatCompletion) -> Any:
    """Answer a conversation."""
    server = server_of(request)
    if body.top_logprobs and not body.logprobs:
        raise ConfigError("top_logprobs needs logprobs: true", "Set logprobs, or leave top_logprobs out.")
    tools = tools_of_openai(
        [tool.for_template() for tool in body.tools or ()], body.tool_choice, body.parallel_tool_calls
    )
    if taken := sorted((body.chat_template_kwargs or {}).keys() & TEMPLATE_ARGUMENTS):
        raise ConfigError(f"chat_template_kwargs cannot set {', '.join(taken)}", "Leave them out.")
    messages, begun = body.conversation()
    ask = Ask(
        _adapter(server, body),
        server.generation(
            **body.options(),
            max_tokens=body.most_tokens,
            chat_template_config=template_variables(body.reasoning_effort, body.chat_template_kwargs),
            prefill_response=begun,
        ),
        messages=messages,
        tools=tools,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
        response_format=body.response_format,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
    )
    about = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model or server.name,
        "object": "chat.completion",
    }
    answers = [Answer(server.engine.tokenizer, tools.shown, tools.one_call) for _ in range(ask.n)]
    if body.stream:
        chunks = _chat_chunks(server, ask, answers, about, body.usage_in_stream)
        return await stream(request, chunks)
    await unless_disconnected(request, collect(server, ask, answers))
    choices = await run_in_threadpool(  # decoding the tokens for logprobs can be slow
        lambda: [_chat_choice(server, number, answer, body.logprobs) for number, answer in enumerate(answers)]
    )
    return JSONResponse({**about, "choices": choices, "usage": usage(answers)})


@router.post("/v1/completions", tags=["completions"], responses=responses(shapes.COMPLETION, *ANSWERED, stream=True))
async def completions(request: Request, body: Completion) -> Any:
    """Continue one text or several."""
    server = server_of(request)
    config = server.generation(**body.options(), max_tokens=body.max_tokens or 16)
    if body.echo and body.logprobs is not None:
        raise ConfigError("logprobs: not available for the prompt that echo returns", "Leave out echo or logprobs.")
    common = dict(
        logprobs=body.logprobs, n=body.n or 1, min_tokens=body.min_tokens or 0, ignore_eos=bool(body.ignore_eos)
    )
    adapter = _adapter(server, body)
    asks = [Ask(adapter, config, text=prompt, **common) for prompt in body.prompts()]
    about = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.model or server.name,
        "object": "text_completion",
    }
    answers = [Answer() for ask in asks for _ in range(ask.n)]
    echoed = [_prompt_text(server, ask) if body.echo else "" for ask in asks for _ in range(ask.n)]
    if body.stream:
        return await stream(request, _text_chunks(server, asks, answers, about, body.usage_in_stream, echoed))
    await unless_disconnected(request, collect(server, asks, answers))
    choices = await run_in_threadpool(
        lambda: [
            _text_choice(server, number, answer, body.logprobs, echo)
            for number, (answer, echo) in enumerate(zip(answers, echoed, strict=True))
        ]
    )
    return JSONResponse({**about, "choices": choices, "usage": usage(answers)})


def _adapter(server: Server, body: Sampling) -> str | None:
    """Return the adapter that ``model`` or llama.cpp's ``lora`` names. Raises: ConfigError, UnknownModel."""
    chosen = server.adapter_of(body.model)
    worn = [each for each in body.lora or () if each.scale]
    if body.lora is None or (chosen and not worn):
        return chosen
    listed = server.engine.bank.listed()
    if unknown := [each.id for each in body.lora if each.id >= len(listed)]:
        raise ConfigError(f"lora: there is no adapter {unknown[0]}", "GET /lora-adapters lists them.")
    if len(worn) > 1 or any(each.scale != 1 for each in worn):
        raise ConfigError("lora: one adapter can be used, at scale 1", "Merge several into one: mlx-lora merge.")
    named = listed[worn[0].id].name if worn else None
    if chosen not in (None, named):
        raise ConfigError(
            f"lora names {named!r}, but model names {chosen!r}", "Name the adapter only in model or in lora."
        )
    return named


def _prompt_text(server: Server, ask: Ask) -> str:
    return ask.text if isinstance(ask.text, str) else server.engine.tokenizer.decode(ask.text)


def usage(answers: list[Answer]) -> dict[str, Any]:
    """Return OpenAI's ``usage`` object: counts of tokens."""
    last = [answer.last for answer in answers if answer.last is not None]
    prompt, made = sum(piece.prompt_tokens for piece in last), sum(piece.generation_tokens for piece in last)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(piece.cached_tokens for piece in last)},
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


async def _chat_chunks(
    server, ask: Ask, answers: list[Answer], about: dict, usage_in: str | None
) -> AsyncIterator[str]:
    about = {**about, "object": "chat.completion.chunk"}

    def chunk(number: int, delta: dict, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": number, "delta": delta, "finish_reason": reason}
        if ask.logprobs is not None:
            choice["logprobs"] = logprobs
        return sse({**about, "choices": [choice], **_usage_so_far(answers, usage_in)})

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
    if usage_in:
        yield sse({**about, "choices": [], "usage": usage(answers)})
    yield sse("[DONE]")


def _usage_so_far(answers: list[Answer], usage_in: str | None) -> dict[str, Any]:
    return {} if usage_in is None else {"usage": usage(answers) if usage_in == "all" else None}


async def _text_chunks(
    server, asks: list[Ask], answers: list[Answer], about: dict, usage_in: str | None, echoed: list[str]
) -> AsyncIterator[str]:
    def chunk(number: int, text: str, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": number, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return sse({**about, "choices": [choice], **_usage_so_far(answers, usage_in)})

    offsets = [0] * len(answers)  # characters already sent with logprobs
    for number, text in enumerate(echoed):
        if text:
            yield chunk(number, text)
    async for number, new in events(server, asks, answers):
        for event in new:
            logprobs = None
            if event.logprobs is not None:
                logprobs = _text_logprobs(server, [event.logprobs], offsets[number])
                offsets[number] += len(logprobs["tokens"][0])
            yield chunk(number, event.text, None, logprobs)
        if reason := answers[number].finish_reason:
            yield chunk(number, "", reason)
    if usage_in:
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


def _text_choice(server: Server, number: int, answer: Answer, logprobs: int | None, echo: str) -> dict[str, Any]:
    return {
        "index": number,
        "text": echo + answer.text,
        "finish_reason": answer.finish_reason,
        "logprobs": None if logprobs is None else _text_logprobs(server, answer.logprobs),
    }


def _tool_call(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token_logprobs(server: Server, each: Any) -> dict[str, Any]:
    def shown(token: int, logprob: float) -> dict[str, Any]:
        text = server.engine.tokenizer.decode([token])
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    return {**shown(each.token, each.logprob), "top_logprobs": [shown(*pair) for pair in each.top]}


def _finite(logprob: float) -> float:
    """Return OpenAI's value for a log-probability of minus infinity, because JSON has no infinity."""
    return logprob if logprob > -9999.0 else -9999.0


def _text_logprobs(server: Server, found: list, begin: int = 0) -> dict[str, Any]:
    """Return ``logprobs`` in the format of completions. The top tokens always include the chosen one."""
    decode = server.engine.tokenizer.decode
    texts = [decode([each.token]) for each in found]
    offsets = list(accumulate(map(len, texts[:-1]), initial=begin)) if texts else []
    top = [
        {decode([token]): _finite(logprob) for token, logprob in (*each.top, (each.token, each.logprob))}
        for each in found
    ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(each.logprob) for each in found],
        "top_logprobs": top,
        "text_offset": offsets,
    }
