"""From messages to tokens: prompts, and streaming with a prompt cache.

mlx-lm samples and decodes. The engine adds what mlx-lm leaves to its callers: it reuses the prompt cache while a
conversation grows, and drops it when another adapter is mounted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import GenerateConfig
from ..data.template import Template, encode_prompt, said_by
from ..errors import ConfigError
from ..model.state import identity
from .bank import AdapterBank


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one has a ``finish_reason``."""

    text: str
    finish_reason: str | None  # "stop", "length" or None
    prompt_tokens: int
    prompt_tps: float  # prompt tokens per second
    generation_tokens: int
    generation_tps: float  # tokens per second
    peak_memory: float  # GB


class Engine:
    """One model, its tokenizer and its adapters, answering one request at a time."""

    def __init__(self, model: nn.Module, tokenizer: Any, bank: AdapterBank | None = None):
        self.model, self.tokenizer, self.template = model, tokenizer, Template(tokenizer)
        self.bank = bank or AdapterBank(model)
        # What was on the model, the tokens it has read, and its prompt cache.
        self._kept: tuple[tuple, list[int], list] | None = None

    def prompt(self, messages: list[dict], tools: list | None = None) -> list[int]:
        """The tokens of a conversation, up to the assistant's next answer."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template", "Use generate --ignore-chat-template with plain text."
            )
        try:
            return self.template.prompt(messages, tools)
        except Exception as error:  # jinja's errors, among others
            raise ConfigError(
                f"the chat template refuses these messages: {said_by(error)}",
                "Change the messages as the template says, or use generate --ignore-chat-template with plain text.",
            ) from None

    def plain_prompt(self, text: str) -> list[int]:
        """The tokens of a text to continue, without a chat template."""
        return encode_prompt(self.tokenizer, text)

    def stream(self, tokens: list[int], config: GenerateConfig) -> Iterator[Piece]:
        """Generate the answer to ``tokens`` with the mounted adapter."""
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        if not tokens:
            raise ConfigError("the prompt is empty", "Give some text with --prompt.")
        if config.seed is not None:
            mx.random.seed(config.seed)
        cache, known = self._cache_for(tokens)
        sampler = make_sampler(config.temp, top_p=config.top_p, min_p=config.min_p, top_k=config.top_k)
        made: list[int] = []
        before, self._kept = identity(self.model), None  # an interrupted answer leaves no cache
        for r in stream_generate(
            self.model,
            self.tokenizer,
            mx.array(tokens[known:]),
            max_tokens=config.max_tokens,
            sampler=sampler,
            prompt_cache=cache,
        ):
            made.append(int(r.token))
            yield Piece(
                r.text,
                r.finish_reason,
                len(tokens),
                r.prompt_tps,
                r.generation_tokens,
                r.generation_tps,
                r.peak_memory,
            )
        if identity(self.model) == before:  # mount() may have been called between two pieces
            self._kept = (before, tokens + made, cache)

    def _cache_for(self, tokens: list[int]) -> tuple[list, int]:
        """A prompt cache, and how many of ``tokens`` it already contains."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        if self._kept is not None and self._kept[0] == identity(self.model):
            _, known, cache = self._kept
            offset = getattr(cache[0], "offset", None)
            if isinstance(offset, int) and can_trim_prompt_cache(cache):
                known = known[:offset]
                shared = next((i for i, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), len(known))
                shared = min(shared, len(tokens) - 1)  # the model must compute at least one token
                if shared > 0 and trim_prompt_cache(cache, len(known) - shared) == len(known) - shared:
                    return cache, shared
        return make_prompt_cache(self.model), 0
