"""What the routes share: the engine, its thread, the settings, and the way from a request to pieces of its answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.concurrency import run_in_threadpool

from ...config import GenerateConfig, ServeConfig
from ...errors import AdapterError
from ..engine import Engine
from ..requests import Piece, Request
from ..worker import Stopped, Worker
from .schema import response_processors


@dataclass
class Ask:
    """A request of any interface, in the engine's terms."""

    adapter: str | None
    config: GenerateConfig
    messages: list[dict] | None = None  # or
    text: str | list[int] | None = None  # to continue
    tools: list[dict] | None = None
    logprobs: int | None = None
    n: int = 1
    response_format: dict[str, Any] | None = None  # OpenAI's


@dataclass
class Server:
    """The state of one server."""

    engine: Engine
    worker: Worker
    config: ServeConfig
    name: str  # of the base
    defaults: GenerateConfig = field(default_factory=GenerateConfig)
    started: float = field(default_factory=time.time)
    draining: bool = False

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's ``model`` names, None for the base. Raises: UnknownModel."""
        base, colon, adapter = model.partition(":")
        if model in (self.name, "base"):
            return None
        if model in self.engine.bank:
            return model
        if colon and base in (self.name, "base") and adapter in self.engine.bank:
            return adapter
        raise UnknownModel(model, [self.name, *self.engine.bank.names])

    def generation(self, **given: Any) -> GenerateConfig:
        """The server's defaults with what a request gives; None is not given. Raises: ConfigError."""
        from dataclasses import asdict

        values = {**asdict(self.defaults), **{name: value for name, value in given.items() if value is not None}}
        if values["temp"] == 0:  # clients send these beside temperature 0, where they say nothing
            for name in ("top_p", "min_p", "top_k", "xtc_probability", "seed", "min_tokens_to_keep", "xtc_threshold"):
                values[name] = GenerateConfig.__dataclass_fields__[name].default
        limit = self.config.max_tokens_limit
        return GenerateConfig(**{**values, "max_tokens": min(values["max_tokens"], limit)})

    async def requests(self, ask: Ask) -> list[Request]:
        """The engine's requests for ``ask``. Tokenizing may take long, so it is done in a thread."""
        return await run_in_threadpool(self._requests, ask)

    def _requests(self, ask: Ask) -> list[Request]:
        engine = self.engine
        if ask.messages is not None:
            tokens = engine.prompt(ask.messages, ask.tools, ask.config)
            state = engine.state_after(tokens)
        else:
            tokens = list(ask.text) if isinstance(ask.text, list) else engine.plain_prompt(ask.text)
            state = "normal"
        configs = [ask.config]
        if ask.n > 1:  # each with numbers of its own
            seed = ask.config.seed
            configs = [_seeded(ask.config, None if seed is None else seed + number) for number in range(ask.n)]
        chat, rules = ask.messages is not None, (engine.tokenizer, engine.vocab_size, ask.response_format)
        return [
            Request(tokens, config, ask.adapter, ask.logprobs, chat, state, response_processors(*rules))
            for config in configs
        ]

    async def pieces(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers as they come: (number of the request, piece). Leaving cancels the rest.

        Raises: what ``Engine.submit`` raises, before the first piece; what ends a row.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(number: int):
            return lambda piece: loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        rows, left, gone = [], len(requests), threading.Event()

        def submit(number: int, request: Request) -> None:
            rows.append(self.engine.submit(request, deliver(number)))
            if gone.is_set():  # the client left meanwhile, and the loop below ended without this row
                self.engine.cancel(rows[-1])

        self._check_alive()
        try:
            for number, request in enumerate(requests):
                await run_in_threadpool(submit, number, request)
            self.worker.wake()
            deadline = loop.time() + self.config.request_timeout
            while left:
                try:
                    number, piece = await asyncio.wait_for(queue.get(), min(1.0, max(0.001, deadline - loop.time())))
                except asyncio.TimeoutError:
                    if loop.time() >= deadline:
                        raise OutOfTime(self.config.request_timeout) from None
                    self._check_alive()
                    continue
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish_reason is not None
                yield number, piece
        finally:
            gone.set()
            for row in rows:
                self.engine.cancel(row)
            self.worker.wake()

    def _check_alive(self) -> None:
        """Raise ``Stopped`` where nobody would answer."""
        if self.draining or not self.worker.alive:
            raise Stopped("the server is shutting down", "Send the request again later.")


class UnknownModel(AdapterError):
    """A request names a model that is neither the base nor an adapter."""

    def __init__(self, model: str, known: list[str]):
        super().__init__(f"the model {model[:200]!r} does not exist", f"Known: {', '.join(known)}.")


class OutOfTime(Exception):
    """An answer took longer than the limit."""

    def __init__(self, seconds: float):
        super().__init__(f"the answer took longer than {seconds:.0f} seconds")


def _seeded(config: GenerateConfig, seed: int | None) -> GenerateConfig:
    from dataclasses import replace

    return replace(config, seed=seed) if config.temp > 0 else config
