"""The engine's input and output: a request, and the pieces of its answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import GenerateConfig
from ..errors import MLXLoRAError
from .residents import Resident
from .sampling import Guarded, LogitsProcessor, make_processors, make_sampler
from .text import AnswerText


class BusyError(MLXLoRAError):
    """The queue is full."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer."""

    tokens: Sequence[int]  # of the prompt
    config: GenerateConfig = field(default_factory=GenerateConfig)
    adapter: str | None = None  # a name in the bank; None for the base
    logprobs: int | None = None  # also return each token's log-probability, and this many of the likeliest
    parts: bool = False  # separate reasoning and tool calls from the answer
    state: str = "normal"  # with parts: the kind that the prompt ends in, such as "reasoning"
    one_call: bool = False  # with parts: end the answer after the first tool call
    processors: Sequence[LogitsProcessor] = ()  # run after those of ``config``, such as a grammar's
    cache: list | None = None  # a prompt cache to continue and modify; ``tokens`` follow it


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, and of the likeliest tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. The last one has a ``finish_reason``."""

    text: str
    kind: str  # "normal", "reasoning", "tool"
    token: int | None  # the token that completed the text; None for text held back until the end
    finish_reason: str | None  # "stop", "length" or None
    stop_word: str | None  # that ended the answer
    logprobs: TokenLogprobs | None
    prompt_tokens: int
    cached_tokens: int  # prompt tokens taken from the prompt cache
    prompt_tps: float  # prompt tokens per second
    generation_tokens: int
    generation_tps: float  # tokens per second
    peak_memory: float  # GB


class Row:
    """A request while the engine processes it.

    Args:
        deliver: called with each ``Piece``, and with the exception that ended the row, by the thread that generates.
    """

    def __init__(
        self, request: Request, resident: Resident | None, deliver: Callable[[Any], None], extra_eos: set[int]
    ):
        self.request, self.resident, self.deliver = request, resident, deliver
        self.extra_eos = extra_eos
        self.tokens = list(request.tokens)
        self.made: list[int] = []  # generated tokens
        self.cached = 0
        self.cancelled = self.ended = False
        self.arrived = time.perf_counter()
        self.round: int | None = None  # its place among the requests for all adapters; see schedule.py
        self.admitted: float | None = None
        self.first: float | None = None  # time of the first token
        self.text: AnswerText | None = None
        self.guard: Guarded | None = None
        self.state: Any = None  # belongs to the lane that computes the row

    def begin(self, tokenizer: Any) -> None:
        """Create the sampler, processors and text decoder. Does nothing if generation has already begun."""
        if self.guard is None:
            config = self.request.config
            processors = [*make_processors(config), *self.request.processors]
            self.guard = Guarded(make_sampler(config, tokenizer), processors)
            self.text = AnswerText(
                tokenizer, config.stop, self.request.parts, self.request.state, self.request.one_call
            )
            self.admitted = time.perf_counter()

    @property
    def length(self) -> int:
        """Tokens of the prompt plus max_tokens."""
        return len(self.request.tokens) + self.request.config.max_tokens

    @property
    def key(self) -> Any:
        return self.resident.key if self.resident else None

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.config.max_tokens - len(self.made)
