"""Lanes compute rows: many rows in mlx-lm's continuous batching, or one row that cannot be batched.

All rows of a lane need the same adapters on the model. ``next`` computes one turn of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base import older_mlx_lm
from ..base.batching import why_not_batched
from .bank import AdapterBank
from .requests import Row
from .residents import Resident
from .rows import AdapterRows, RowModel
from .sampling import LogitsProcessor
from .schedule import Name

SHARED: Name = ("shared",)


@dataclass(frozen=True)
class Token:
    """One generated token of a row."""

    row: Row
    token: int
    logprobs: mx.array  # [vocab]
    finish_reason: str | None  # "stop" (an end-of-sequence token), "length" or None
    cache: list | None = None  # only of a finished row: keys and values of ``tokens``
    tokens: list[int] | None = None


@dataclass(frozen=True)
class PromptRead:
    """A row's prompt was read except its last token. Lanes report this only for caches that cannot be trimmed."""

    row: Row
    cache: list
    tokens: list[int]


def lane_of(row: Row, model: nn.Module) -> Name:
    """Return the name of the lane for a row."""
    config = row.request.config
    options = config.kv_bits or config.draft_model or config.max_kv_size
    if options or row.request.cache is not None or why_not_batched(model):
        return ("single", id(row))
    if row.resident is not None and row.resident.alone:
        return ("alone", row.key)
    return SHARED


class BatchLane:
    """Rows in one batch of ``mlx_lm.generate.BatchGenerator``."""

    def __init__(
        self,
        model: nn.Module,
        choose: Callable[[list], None],
        eos: set[int],
        *,
        batch_size: int,
        prefill_batch_size: int,
        prefill_step_size: int,
        keep_prompts: bool = False,
    ):
        from mlx_lm.generate import BatchGenerator

        self.rows: dict[int, Row] = {}
        self._keep_prompts = keep_prompts
        self._generator = BatchGenerator(
            RowModel(model, choose),
            stop_tokens=[[token] for token in sorted(eos)],
            completion_batch_size=batch_size,
            prefill_batch_size=prefill_batch_size,
            prefill_step_size=prefill_step_size,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def insert(self, row: Row, cache: list, known: list[int]) -> None:
        """Add a row. ``cache`` holds keys and values of ``known``, the row's first tokens."""
        rest = row.tokens[len(known) :]
        segments = [rest[:-1], rest[-1:]] if self._keep_prompts else [rest]
        (uid,) = self._generator.insert_segments(
            [segments],
            max_tokens=[row.left],
            caches=[[*cache, AdapterRows([row.key])]],
            all_tokens=[list(known)],
            samplers=[row.guard.sampler],
            logits_processors=[older_mlx_lm.never_empty(row.guard.processors)],
        )
        self.rows[uid], row.state = row, uid

    def remove(self, row: Row) -> tuple[list | None, list[int] | None]:
        """Remove an unfinished row. Returns its cache and the tokens that the cache holds."""
        if self.rows.pop(row.state, None) is None:
            return None, None
        cache, tokens = self._generator.remove([row.state], return_prompt_caches=True)[row.state]
        return cache[:-1], list(tokens)

    def next(self) -> list[Token | PromptRead]:
        """Prefill a chunk of the prompts, or generate a token for each row."""
        prompts, responses = self._generator.next()
        found: list[Token | PromptRead] = []
        read = [r.uid for r in prompts if r.end_of_segment and not r.end_of_prompt] if self._keep_prompts else []
        for uid, (cache, tokens) in self._generator.extract_cache(read).items() if read else ():
            found.append(PromptRead(self.rows[uid], cache[:-1], list(tokens)))
        for r in responses:
            row, ended = self.rows[r.uid], r.finish_reason is not None
            cache, tokens = (r.prompt_cache[:-1], list(r.all_tokens)) if ended else (None, None)
            found.append(Token(row, r.token, r.logprobs, r.finish_reason, cache, tokens))
            if ended:
                del self.rows[r.uid]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._generator.prompt_cache_nbytes

    def close(self) -> None:
        self._generator.close()


class SingleLane:
    """One row, through mlx-lm's ``generate_step`` or its speculative decoding, for options that batches lack."""

    def __init__(self, model: nn.Module, choose: Callable[[list], None], eos: set[int], draft: nn.Module | None = None):
        self._model, self._choose, self._eos, self._draft = model, choose, eos, draft
        self.rows: dict[int, Row] = {}
        self._steps: Any = None
        self._cache: list = []

    def __len__(self) -> int:
        return len(self.rows)

    def insert(self, row: Row, cache: list, known: list[int]) -> None:
        """See ``BatchLane.insert``. This lane holds one row."""
        from mlx_lm.generate import generate_step, speculative_generate_step

        config, prompt = row.request.config, mx.array(row.tokens[len(known) :])
        options: dict[str, Any] = dict(
            max_tokens=row.left,
            sampler=row.guard.sampler,
            logits_processors=[_of_whole_row(processor, row.tokens) for processor in row.guard.processors] or None,
            prompt_cache=cache,
            prefill_step_size=config.prefill_step_size,
        )
        if config.draft_model is not None:
            steps = speculative_generate_step(
                prompt, self._model, self._draft, num_draft_tokens=config.num_draft_tokens, **options
            )
            self._steps = ((token, logprobs) for token, logprobs, _ in steps)
        else:
            self._steps = generate_step(
                prompt,
                self._model,
                kv_bits=config.kv_bits,
                kv_group_size=config.kv_group_size,
                quantized_kv_start=config.quantized_kv_start,
                **options,
            )
        self.rows[0], row.state, self._cache = row, 0, cache

    def remove(self, row: Row) -> tuple[list | None, list[int] | None]:
        """See ``BatchLane.remove``."""
        self.rows.clear()
        self.close()
        return None, None

    def next(self) -> list[Token | PromptRead]:
        """Generate a token."""
        (row,) = self.rows.values()
        self._choose([row.key])
        token, logprobs = next(self._steps)
        token = int(token)
        reason = (
            "stop" if token in self._eos else "length" if len(row.made) + 1 >= row.request.config.max_tokens else None
        )
        if reason is None:
            return [Token(row, token, logprobs, None)]
        self.remove(row)
        tokens = [*row.tokens, *row.made, token]
        return [Token(row, token, logprobs, reason, *self._kept(tokens))]

    def _kept(self, tokens: list[int]) -> tuple[list | None, list[int] | None]:
        """Return the row's cache and the tokens that it holds; None if those are not known."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        offset = getattr(self._cache[0], "offset", None)
        if self._draft is not None or not isinstance(offset, int) or not can_trim_prompt_cache(self._cache):
            return None, None
        trim_prompt_cache(self._cache, max(0, offset - len(tokens)))  # one token may have been read ahead
        return self._cache, tokens[:offset]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._cache)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def _of_whole_row(processor: LogitsProcessor, prompt: list[int]) -> LogitsProcessor:
    """Wrap ``processor`` so that it is called with all tokens of the row, as in a batch.

    ``generate_step`` omits cached tokens. Speculative decoding, and in mlx-lm 0.31 both functions, pass only the last
    token of the prompt.
    """
    before: mx.array | None = None

    def call(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal before
        if before is None:
            before = mx.array(prompt[: len(prompt) - tokens.size], mx.int32)
        return processor(mx.concatenate([before, tokens.astype(mx.int32)]), logits)

    return call


def make_lane(
    name: Name,
    resident: Resident | None,
    model: nn.Module,
    bank: AdapterBank,
    eos: set[int],
    draft: nn.Module | None,
    batching: dict[str, Any],
) -> BatchLane | SingleLane:
    """Create lane ``name`` for rows with the adapter ``resident``. batching: options of ``BatchLane``."""
    alone = resident is not None and bool(resident.alone)
    choose = (lambda keys: bank.mount_alone(resident)) if alone else bank.choose
    return SingleLane(model, choose, eos, draft) if name[0] == "single" else BatchLane(model, choose, eos, **batching)
