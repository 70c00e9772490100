"""Create mlx-lm's samplers and logits processors for a ``GenerateConfig``.

An error in a row's sampler does not end the other rows of the batch. A row with a seed draws the same random numbers
in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..config import GenerateConfig
from ..errors import ConfigError

Sampler = Callable[[mx.array], mx.array]  # log-probabilities [1, vocab] -> tokens [1]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # (tokens so far [L], logits [1, vocab]) -> logits


def make_sampler(config: GenerateConfig, tokenizer: Any) -> Sampler:
    """mlx-lm's sampler for ``config``. Rows with greedy samplers share one, so that a batch is sampled at once."""
    from mlx_lm import sample_utils

    if config.temp == 0:
        return greedy
    sampler = sample_utils.make_sampler(
        config.temp,
        top_p=config.top_p if config.top_p < 1 else 0.0,
        min_p=config.min_p,
        min_tokens_to_keep=config.min_tokens_to_keep,
        top_k=config.top_k,
        xtc_probability=config.xtc_probability,
        xtc_threshold=config.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids] if config.xtc_probability else None,
    )
    return sampler if config.seed is None else Seeded(sampler, config.seed)


def greedy(logprobs: mx.array) -> mx.array:
    """The most likely token of each row. logprobs: [B, vocab] -> [B]."""
    return mx.argmax(logprobs, axis=-1)


class Seeded:
    """A sampler with its own random state: it draws the same numbers as after ``mx.random.seed(seed)``."""

    def __init__(self, sampler: Sampler, seed: int):
        self._sampler, self._state = sampler, seed

    def __call__(self, logprobs: mx.array) -> mx.array:
        shared = _random_state()
        mx.random.seed(self._state)
        try:
            return self._sampler(logprobs)
        finally:
            self._state = _random_state()
            mx.random.seed(shared)


def _random_state() -> int:
    """Return the seed that reproduces MLX's current random state."""
    high, low = mx.random.state[0].tolist()
    return (high << 32) | low


def make_processors(config: GenerateConfig) -> list[LogitsProcessor]:
    """mlx-lm's logits processors for the biases and penalties of ``config``."""
    from mlx_lm.sample_utils import make_logits_processors

    return make_logits_processors(
        config.logit_bias,
        config.repetition_penalty,
        config.repetition_context_size,
        config.presence_penalty,
        config.presence_context_size,
        config.frequency_penalty,
        config.frequency_context_size,
    )


def check_sampling(config: GenerateConfig, vocab_size: int) -> None:
    """Refuse what the size of the vocabulary rules out. Raises: ConfigError."""
    faults = []
    if config.top_k >= vocab_size:
        faults.append(f"top_k must be below {vocab_size}, the size of the vocabulary, not {config.top_k}")
    if outside := [token for token in config.logit_bias or () if token >= vocab_size]:
        faults.append(f"logit_bias: not in the vocabulary of {vocab_size} tokens: {', '.join(map(str, outside[:5]))}")
    if faults:
        raise ConfigError("\n".join(faults), "Correct these options, or leave them out.")


def extra_eos(config: GenerateConfig, tokenizer: Any, vocab_size: int) -> set[int]:
    """Return the ids of ``config.extra_eos_token``. Raises: ConfigError: the tokenizer does not have a token."""
    found = set()
    for name in config.extra_eos_token:
        if name.isdecimal():
            token = int(name)
        elif (token := tokenizer.convert_tokens_to_ids(name)) == getattr(tokenizer, "unk_token_id", None):
            token = None
        if token is None or not 0 <= token < vocab_size:
            raise ConfigError(f"extra_eos_token: this tokenizer has no token {name!r}", "Name one of its tokens.")
        found.add(token)
    return found


class Withheld:
    """A logits processor that forbids tokens for the first ``count`` tokens of an answer, or for the whole answer.

    Args:
        prompt: length of the prompt.
    """

    def __init__(self, tokens: set[int], prompt: int, count: int | None = None):
        self._tokens, self._end = mx.array(sorted(tokens)), None if count is None else prompt + count

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._end is not None and len(tokens) >= self._end:
            return logits
        return mx.put_along_axis(logits, self._tokens[None], mx.array(-mx.inf, logits.dtype), axis=-1)


class Guarded:
    """Calls a row's sampler and processors. It stores their exception in ``error``, which ends only that row."""

    def __init__(self, sampler: Sampler, processors: Sequence[LogitsProcessor]):
        self.error: Exception | None = None
        self.sampler = sampler if sampler is greedy else self._guard_sampler(sampler)
        self.processors = [self._guard_processor(processor) for processor in processors]

    def _guard_sampler(self, sampler: Sampler) -> Sampler:
        def call(logprobs: mx.array) -> mx.array:
            try:
                return sampler(logprobs)
            except Exception as error:
                self.error = self.error or error
                return greedy(logprobs)

        return call

    def _guard_processor(self, processor: LogitsProcessor) -> LogitsProcessor:
        def call(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return processor(tokens, logits)
            except Exception as error:
                self.error = self.error or error
                return logits

        return call
