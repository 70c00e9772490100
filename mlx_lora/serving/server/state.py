"""State that all routes share (engine, worker thread, settings), and generating the pieces of an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from ...base.origin import base_of
from ...config import GenerateConfig, ServeConfig
from ...errors import AdapterError, ConfigError, MLXLoRAError
from ..engine import Engine
from ..requests import Piece, Request
from ..sampling import Withheld, extra_eos
from ..worker import Stopped, Worker
from .schema import processors_for
from .tool_choice import Tools


@dataclass
class Ask:
    """A request of any API, translated for the engine."""

    adapter: str | None
    config: GenerateConfig
    messages: list[dict] | None = None  # or
    text: str | list[int] | None = None  # a text or tokens to continue
    tools: Tools = Tools()
    logprobs: int | None = None
    n: int = 1
    response_format: dict[str, Any] | None = None  # OpenAI's field
    min_tokens: int = 0  # the answer cannot end before this many tokens
    ignore_eos: bool = False


@dataclass
class Server:
    """The state of one server."""

    engine: Engine
    worker: Worker
    config: ServeConfig
    name: str  # the model name of the base
    defaults: GenerateConfig = field(default_factory=lambda: GenerateConfig(temp=1.0))  # 1.0 as in OpenAI's API
    page_temp: float = 0.0  # default temperature of the chat page: the same answers each time
    started: float = field(default_factory=time.time)
    draining: bool = False

    def hide_folders(self, text: str) -> str:
        """Return ``text`` without the folders of the adapters and the base on this machine."""
        if "/" not in text:
            return text
        bank = self.engine.bank
        base = base_of(self.engine.model)
        paths = [*(each.path for each in bank.listed()), bank.folder and bank.folder / "x", base and base.folder]
        for folder in sorted({str(Path(path).parent) for path in paths if path}, key=len, reverse=True):
            text = text.replace(f"{folder}/", "")
        return text

    def adapter_of(self, model: str | None) -> str | None:
        """Return the adapter that a request's ``model`` names, or None for the base. Raises: UnknownModel."""
        if model is None:
            return None
        base, colon, adapter = model.partition(":")
        if model in (self.name, "base"):
            return None
        if model in self.engine.bank:
            return model
        if colon and base in (self.name, "base") and adapter in self.engine.bank:
            return adapter
        raise UnknownModel(model, [self.name, *self.engine.bank.names])

    def generation(self, **given: Any) -> GenerateConfig:
        """Return the server's defaults, overridden by the request's values that are not None. Raises: ConfigError."""
        from dataclasses import asdict

        values = {**asdict(self.defaults), **{name: value for name, value in given.items() if value is not None}}
        if self.defaults.chat_template_config and given.get("chat_template_config"):
            values["chat_template_config"] = {**self.defaults.chat_template_config, **given["chat_template_config"]}
        if stops := given.get("extra_eos_token"):  # a request's stop_token_ids
            if unknown := [token for token in stops if int(token) >= self.engine.vocab_size]:
                raise ConfigError(
                    f"stop_token_ids: token {unknown[0]} is outside the vocabulary of {self.engine.vocab_size} tokens",
                    "Send tokens of this model.",
                )
            values["extra_eos_token"] = (*self.defaults.extra_eos_token, *stops)
        if values["temp"] == 0:  # clients send these even with temperature 0, where they have no effect
            for name in ("top_p", "min_p", "top_k", "xtc_probability", "seed", "min_tokens_to_keep", "xtc_threshold"):
                values[name] = GenerateConfig.__dataclass_fields__[name].default
        if values["top_k"] >= self.engine.vocab_size:  # the same as no limit
            values["top_k"] = 0
        limit = self.config.max_tokens_limit
        return GenerateConfig(**{**values, "max_tokens": min(values["max_tokens"], limit)})

    async def requests(self, ask: Ask) -> list[Request]:
        """Create the engine's requests for ``ask``. Tokenizing can be slow, so it runs in a thread."""
        return await run_in_threadpool(self._requests, ask)

    async def count(self, ask: Ask) -> int:
        """Count the tokens of a conversation, which may be longer than the model's context."""
        return len(await run_in_threadpool(self.engine.prompt, ask.messages, ask.tools.shown, ask.config))

    def _requests(self, ask: Ask) -> list[Request]:
        engine = self.engine
        if ask.messages is not None:
            tokens = engine.prompt(ask.messages, ask.tools.shown, ask.config)
            state = engine.state_after(tokens)
        else:
            tokens = list(ask.text) if isinstance(ask.text, list) else engine.plain_prompt(ask.text)
            if outside := [token for token in tokens if token >= engine.vocab_size]:
                raise ConfigError(
                    f"prompt: token {outside[0]} is outside the vocabulary of {engine.vocab_size} tokens",
                    "Send tokens of this model.",
                )
            state = "normal"
        most = engine.context_length if ask.config.max_kv_size is None else None
        if most is not None and len(tokens) >= most:
            raise PromptTooLong(len(tokens), most)
        configs = [ask.config]
        if ask.n > 1:  # each answer needs its own seed
            seed = ask.config.seed
            configs = [_seeded(ask.config, None if seed is None else seed + number) for number in range(ask.n)]
        rules = (engine.tokenizer, engine.vocab_size, ask.response_format, ask.tools, state == "reasoning")
        return [
            Request(
                *(tokens, config, ask.adapter, ask.logprobs),
                parts=ask.messages is not None,
                state=state,
                one_call=ask.tools.one_call,
                processors=(*processors_for(*rules), *self._withheld(ask, len(tokens))),
            )
            for config in configs
        ]

    def _withheld(self, ask: Ask, prompt: int) -> list[Withheld]:
        """Create logits processors for ``min_tokens`` and ``ignore_eos``. Raises: ConfigError: there is a grammar."""
        if not (ask.min_tokens or ask.ignore_eos):
            return []
        if ask.response_format or ask.tools.forced:
            raise ConfigError(
                "min_tokens and ignore_eos cannot be used with response_format or a required tool call",
                "Leave them out.",
            )
        engine = self.engine
        ends = set(engine.tokenizer.eos_token_ids)
        if ask.ignore_eos:
            return [Withheld(ends, prompt)]
        return [Withheld(ends | extra_eos(ask.config, engine.tokenizer, engine.vocab_size), prompt, ask.min_tokens)]

    async def pieces(
        self, requests: Sequence[Request], apart: bool = False
    ) -> AsyncIterator[tuple[int, Piece | Exception]]:
        """Yield (number of the request, piece) for all answers. Closing this iterator cancels the rest.

        Args:
            apart: an exception ends only its own answer, and is yielded as that answer's last piece.

        Raises: errors of ``Engine.submit``, before the first piece; errors that end a row. With ``apart``: only errors
            of ``Engine.submit`` that all requests share.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(number: int):
            return lambda piece: loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        rows, left, gone = [], len(requests), False

        def submit(number: int, request: Request) -> None:
            rows.append(self.engine.submit(request, deliver(number)))
            if gone:  # the client disconnected while this thread waited for the engine
                self.engine.cancel(rows[-1])

        self._check_taken()
        try:
            for number, request in enumerate(requests):
                try:
                    await run_in_threadpool(submit, number, request)
                except Exception as error:
                    if not apart or (not rows and number == len(requests) - 1):
                        raise
                    queue.put_nowait((number, error))
            self.worker.wake()
            deadline = loop.time() + self.config.request_timeout
            while left:
                if loop.time() >= deadline:
                    raise OutOfTime(self.config.request_timeout)
                try:
                    number, piece = await asyncio.wait_for(queue.get(), 1.0)
                except asyncio.TimeoutError:
                    self._check_alive()
                    continue
                failed = isinstance(piece, Exception)
                if failed and not apart:
                    raise piece
                left -= failed or piece.finish_reason is not None
                yield number, piece
        finally:
            gone = True
            for row in rows:
                self.engine.cancel(row)
            self.worker.wake()

    def _check_taken(self) -> None:
        """Raise ``Stopped`` if the server would not answer a new request."""
        if self.draining:
            raise Stopped("the server is shutting down", "Send the request again later.")
        self._check_alive()

    def _check_alive(self) -> None:
        if not self.worker.alive:
            raise Stopped("the generating thread has stopped", "Restart the server.")


class UnknownModel(AdapterError):
    """A request names a model that is neither the base nor an adapter."""

    def __init__(self, model: str, known: list[str], kind: str = "model"):
        super().__init__(f"the {kind} {model[:200]!r} does not exist", f"Known: {', '.join(known) or 'none'}.")


class PromptTooLong(MLXLoRAError):
    """A prompt leaves no room for an answer in the model's context. Clients look for these words in the message."""

    def __init__(self, tokens: int, most: int):
        super().__init__(
            f"the prompt is too long: it has {tokens} tokens, and the model's maximum context length is {most}, with "
            "the answer",
            "Shorten the prompt or the conversation.",
        )


class OutOfTime(Exception):
    """An answer took longer than the time limit."""

    def __init__(self, seconds: float):
        super().__init__(f"the answer took longer than {seconds:.0f} seconds")


def _seeded(config: GenerateConfig, seed: int | None) -> GenerateConfig:
    from dataclasses import replace

    return replace(config, seed=seed) if config.temp > 0 else config
