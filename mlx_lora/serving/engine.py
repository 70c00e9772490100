"""From messages to tokens: many requests at once over one base, each with its adapter or none.

The engine queues requests, computes them in lanes (see ``lanes.py``) and delivers their text piece by piece. All rows
whose adapters can share a batch are in one lane. An adapter that cannot has a lane of its own, and the lanes take
turns. A row that fails ends alone. ``step`` does one turn: a server calls it in a thread; ``stream`` calls it by
itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.batching import why_not_batched
from ..errors import ConfigError, MLXLoRAError
from .bank import AdapterBank
from .lanes import BatchLane, PromptRead, SingleLane, Token
from .memory import KeysAndValues, can_always_trim, free_memory, new_cache
from .prompts import Prompts
from .requests import Piece, Request, Row, TokenLogprobs
from .sampling import Guarded, check_sampling, make_processors, make_sampler
from .text import AnswerText, Segment

_SHARED = ("shared",)


class BusyError(MLXLoRAError):
    """The queue is full."""


class TooLongError(MLXLoRAError):
    """The request would not fit into memory even alone."""


class Engine(Prompts):
    """One base model, its tokenizer and its adapters, answering requests.

    Args:
        bank: the adapters; an empty bank by default.
        batch_size: rows that are computed at a time.
        prefill_batch_size: prompts that are read at a time, so many tokens of each in a step: prefill_step_size.
        queue_size: requests that may wait; None for any number.
        memory_limit: bytes for the keys and values of all rows; by default what is free now.
        prompt_cache_size: prompts and answers whose keys and values are kept for requests that begin alike, in at most
            prompt_cache_bytes.
        draft_model: for requests with ``draft_model``.
        turn_seconds: how long a lane computes while others wait.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: AdapterBank | None = None,
        *,
        batch_size: int = 16,
        prefill_batch_size: int = 4,
        prefill_step_size: int = 2048,
        queue_size: int | None = None,
        memory_limit: int | None = None,
        prompt_cache_size: int = 8,
        prompt_cache_bytes: int | None = None,
        draft_model: nn.Module | None = None,
        turn_seconds: float = 0.25,
    ):
        from mlx_lm.models.cache import LRUPromptCache

        mx.eval(model.parameters())  # by this thread: another one cannot
        super().__init__(tokenizer)
        self.model = model
        self.bank = bank or AdapterBank(model)
        self.draft_model, self.turn_seconds = draft_model, turn_seconds
        self.queue_size, self.batch_size = queue_size, batch_size
        self._sizes = KeysAndValues(model)
        self.memory_limit = free_memory() if memory_limit is None else memory_limit
        self.prompt_cache = LRUPromptCache(prompt_cache_size, prompt_cache_bytes or self.memory_limit // 4)
        self._batching = {
            "batch_size": batch_size,
            "prefill_batch_size": prefill_batch_size,
            "prefill_step_size": prefill_step_size,
            "keep_prompts": not can_always_trim(new_cache(model)),
        }
        self._arrived: deque[Row] = deque()
        self._lock = threading.Lock()  # of _arrived
        self._waiting: dict[tuple, list[Row]] = {}  # by lane
        self._lanes: dict[tuple, BatchLane | SingleLane] = {}
        self._active: dict[tuple, list[Row]] = {}
        self._turn: tuple[tuple, float] | None = None  # the lane whose turn it is, and since when
        self._served: dict[tuple, float] = {}  # when a lane's last turn ended
        self.counts: Counter[str] = Counter()  # of requests by outcome, and of tokens

    @property
    def vocab_size(self) -> int:
        return self._sizes.vocab_size

    # Requests.

    def submit(self, request: Request, deliver: Callable[[Piece | Exception], None]) -> Row:
        """Queue a request. ``deliver`` is called with its pieces, or with the exception that ends it.

        Raises: ConfigError: an option that cannot be honoured; AdapterError, FormatError: of the adapter; BusyError;
            TooLongError.
        """
        config = request.config
        if not request.tokens:
            raise ConfigError("the prompt is empty", "Give some text with --prompt.")
        check_sampling(config, self._sizes.vocab_size)
        extra_eos = {self._token(name) for name in config.extra_eos_token}
        if config.draft_model is not None and self.draft_model is None:
            raise ConfigError("the draft model is not loaded", "Name it when the engine starts: --draft-model.")
        length = len(request.tokens) + config.max_tokens
        if (needed := self._sizes.nbytes(length)) > self.memory_limit:
            sizes = f"{needed / 1e9:.2f} GB, and there are {self.memory_limit / 1e9:.2f} GB"
            raise TooLongError(
                f"the keys and values of {length} tokens need {sizes}", "Shorten the prompt, or lower max_tokens."
            )
        if self.queue_size is not None and self.queued >= self.queue_size:
            raise BusyError(f"{self.queue_size} requests are waiting already", "Try again in a moment.")
        resident = None if request.adapter is None else self.bank.acquire(request.adapter)
        row = Row(request, resident, deliver, extra_eos)
        with self._lock:
            self._arrived.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """End a row at the next step. Nothing more is delivered for it."""
        row.cancelled = True

    def stream(self, request: Request) -> Iterator[Piece]:
        """Answer one request, doing the steps. Not for use while another thread calls ``step``."""
        for _, piece in self.stream_all([request]):
            yield piece

    def stream_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        """Answer several requests at once, as ``stream``: pairs of a request's number and a piece of its answer."""
        got: deque[tuple[int, Piece | Exception]] = deque()
        rows: list[Row] = []
        try:
            for number, request in enumerate(requests):
                rows.append(self.submit(request, lambda piece, number=number: got.append((number, piece))))
            while got or not all(row.ended for row in rows):
                while got:
                    number, piece = got.popleft()
                    if isinstance(piece, Exception):
                        raise piece
                    yield number, piece
                self.step()
        finally:
            for row in rows:
                self.cancel(row)
            self._drop_cancelled()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._arrived) + sum(len(rows) for rows in list(self._waiting.values()))

    @property
    def active(self) -> int:
        """Requests that are being computed."""
        return sum(len(rows) for rows in list(self._active.values()))

    # Steps.

    def step(self) -> bool:
        """One turn: take in requests, drop cancelled ones, compute one lane. Returns whether there is work left.

        An exception of one row, or of a batch, ends rows and not the engine.
        """
        self._take_in()
        self._drop_cancelled()
        name = self._next_lane()
        if name is None:
            return False
        with self.bank.lock:
            if self.bank.changed():  # by the caller: what was kept belongs to other weights
                self.prompt_cache.trim_to(n_sequences=0)
            self._admit(name)
            lane = self._lanes.get(name)
            if lane is None or not len(lane):
                return True
            try:
                found = lane.next()
            except Exception as error:
                self._recover(name, error)
                return True
        for event in found:
            self._handle(name, event)
        return True

    def close(self) -> None:
        """Cancel everything, and leave the model as the base."""
        for row in self._rows():
            self.cancel(row)
        self._drop_cancelled()
        with self.bank.lock:
            for lane in self._lanes.values():
                lane.close()
            self._lanes.clear()
            self.bank.clear()

    def fail_all(self, error: Exception) -> None:
        """End every row with ``error``."""
        for row in self._rows():
            self._end(row, error)

    def _rows(self) -> list[Row]:
        self._take_in()
        return [row for rows in (*self._waiting.values(), *self._active.values()) for row in rows]

    def _take_in(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        for row in arrived:
            self._waiting.setdefault(self._lane_of(row), []).append(row)

    def _lane_of(self, row: Row) -> tuple:
        config = row.request.config
        options = config.kv_bits or config.draft_model or config.max_kv_size
        if options or row.request.cache is not None or why_not_batched(self.model):
            return ("single", id(row))
        if row.resident is not None and row.resident.alone:
            return ("alone", row.key)
        return _SHARED

    def _drop_cancelled(self) -> None:
        for row in self._rows():
            if row.cancelled:
                self._end(row)

    def _next_lane(self) -> tuple | None:
        """The lane whose turn it is: the present one, unless its time is over and another one has work."""
        busy = [name for name in dict.fromkeys((*self._active, *self._waiting)) if self._has_work(name)]
        if not busy:
            return None
        now = time.perf_counter()
        if self._turn is not None and self._turn[0] in busy:
            name, since = self._turn
            if len(busy) == 1 or now - since < self.turn_seconds:
                return name
            busy = [other for other in busy if other != name]
            self._served[name] = now
        name = min(busy, key=lambda each: self._served.get(each, 0.0))
        self._turn = (name, now)
        return name

    def _has_work(self, name: tuple) -> bool:
        return bool(self._active.get(name) or self._waiting.get(name))

    def _admit(self, name: tuple) -> None:
        """Move rows from the queue of a lane into it, as far as there is room: first those whose adapter has fewest."""
        waiting, active = self._waiting.get(name, []), self._active.setdefault(name, [])
        while waiting and self.active < self.batch_size and (name == _SHARED or name[0] == "alone" or not active):
            beside = Counter(row.key for row in active)
            row = min(waiting, key=lambda each: (beside[each.key], each.arrived))
            if not self._fits(row):
                break
            waiting.remove(row)
            try:
                self._insert(name, row)
            except Exception as error:
                self._end(row, error)
        if not waiting:
            self._waiting.pop(name, None)

    def _fits(self, row: Row) -> bool:
        """Whether the keys and values of all rows fit with this one. A batch takes for each what the longest takes."""
        rows = [row, *(other for rows in self._active.values() for other in rows)]
        most = max(self._sizes.nbytes(len(each.request.tokens) + each.request.config.max_tokens) for each in rows)
        if len(rows) * most > self.memory_limit:
            return False
        self.prompt_cache.trim_to(n_bytes=self.memory_limit - len(rows) * most)
        return True

    def _insert(self, name: tuple, row: Row) -> None:
        request, config = row.request, row.request.config
        if row.guard is None:
            sampler, processors = make_sampler(config, self.tokenizer), make_processors(config)
            row.guard = Guarded(sampler, [*processors, *request.processors])
            row.text = AnswerText(self.tokenizer, config.stop, request.parts, request.state)
            row.admitted = time.perf_counter()
        if name not in self._lanes:
            self._lanes[name] = self._make_lane(name, row)
        cache, known = request.cache, []
        if cache is None:
            before = row.tokens[:-1]  # the model must read one token at least
            cache, rest = self.prompt_cache.fetch_nearest_cache(self._cache_key(row), before) if before else (None, [])
            known = before[: len(before) - len(rest)]
        if cache is None:
            cache, known = new_cache(self.model, config.max_kv_size), []
            if config.draft_model is not None:
                cache += new_cache(self.draft_model)
        row.cached = row.cached or len(known)
        self._lanes[name].insert(row, cache, known)
        self._active[name].append(row)

    def _make_lane(self, name: tuple, row: Row) -> BatchLane | SingleLane:
        resident, eos = row.resident, set(self.tokenizer.eos_token_ids)
        alone = resident is not None and bool(resident.alone)
        choose = (lambda keys: self.bank.mount_alone(resident)) if alone else self.bank.choose
        if name[0] == "single":
            return SingleLane(self.model, choose, eos, self.draft_model if row.request.config.draft_model else None)
        return BatchLane(self.model, choose, eos, **self._batching)

    def _cache_key(self, row: Row) -> tuple:
        config = row.request.config
        return (
            row.key,
            config.kv_bits,
            config.kv_bits and config.kv_group_size,
            config.max_kv_size,
            config.draft_model,
        )

    def _recover(self, name: tuple, error: Exception) -> None:
        """After an exception in a lane: its rows are computed again, each by itself, and one that fails then ends."""
        rows = self._active.pop(name, [])
        lane = self._lanes.pop(name)
        lane.close()
        self.counts["failed_batches"] += 1
        for row in rows:
            if len(rows) == 1:
                self._end(row, error)
            else:
                row.tokens = [*row.request.tokens, *row.made]
                self._waiting[("retry", id(row))] = [row]

    def _handle(self, name: tuple, event: Token | PromptRead) -> None:
        row = event.row
        if row.ended or row.cancelled:
            return
        if isinstance(event, PromptRead):
            self.prompt_cache.insert_cache(self._cache_key(row), event.tokens, event.cache, cache_type="user")
            return
        if row.guard.error is not None:
            return self._end(row, row.guard.error)
        now = time.perf_counter()
        row.first = row.first or now
        reason, cache, tokens = event.finish_reason, event.cache, event.tokens
        if event.token in row.extra_eos:
            reason = "stop"
        ends = reason == "stop"  # at a token that is no text
        row.made.append(event.token)
        segments = [] if ends else row.text.add(event.token)
        if row.text.stopped_at is not None:
            reason = "stop"
        elif reason is not None:
            segments += row.text.finish()
        if reason is not None and event.finish_reason is None:
            cache, tokens = self._lanes[name].remove(row)
        if reason is not None and cache is not None and row.request.cache is None:
            self.prompt_cache.insert_cache(self._cache_key(row), tokens, cache)
        self._deliver(row, event, segments, reason, now)
        if reason is not None:
            self._end(row)

    def _deliver(self, row: Row, event: Token, segments: list[Segment], reason: str | None, now: float) -> None:
        *earlier, last = segments or [Segment(row.text.kind, "")]
        count = len(row.made)
        facts = dict(
            prompt_tokens=len(row.request.tokens),
            cached_tokens=row.cached,
            prompt_tps=(len(row.request.tokens) - row.cached) / max(row.first - row.admitted, 1e-9),
            generation_tokens=count,
            generation_tps=(count - 1) / max(now - row.first, 1e-9) if count > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
        for segment in earlier:
            row.deliver(Piece(segment.text, segment.kind, None, None, None, None, **facts))
        logprobs = None if row.request.logprobs is None else _logprobs(event, row.request.logprobs)
        row.deliver(Piece(last.text, last.kind, event.token, reason, row.text.stopped_at, logprobs, **facts))

    def _end(self, row: Row, error: Exception | None = None) -> None:
        """Take a row out of everything; deliver ``error`` where there is one."""
        if row.ended:
            return
        row.ended = True
        for name, rows in list(self._active.items()):
            if row in rows:
                rows.remove(row)
                with self.bank.lock:
                    if row in self._lanes[name].rows.values():
                        self._lanes[name].remove(row)
                    if not rows and name != _SHARED:
                        self._lanes.pop(name).close()
            if not rows:
                self._active.pop(name)
        for name, rows in list(self._waiting.items()):
            if row in rows:
                rows.remove(row)
            if not rows:
                self._waiting.pop(name)
        if row.resident is not None:
            self.bank.release(row.resident)
        self.counts["failed" if error else "cancelled" if row.cancelled else "completed"] += 1
        self.counts["prompt_tokens"] += len(row.request.tokens)
        self.counts["cached_tokens"] += row.cached
        self.counts["generation_tokens"] += len(row.made)
        if error is not None:
            row.deliver(error)

    def _token(self, name: str) -> int:
        token = int(name) if name.isdecimal() else self.tokenizer.convert_tokens_to_ids(name)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if token is None or token == unknown or not 0 <= token < self._sizes.vocab_size:
            raise ConfigError(f"extra_eos_token: this tokenizer has no token {name!r}", "Name one of its tokens.")
        return token


def _logprobs(event: Token, top: int) -> TokenLogprobs:
    """The log-probabilities of a token and of the ``top`` likeliest ones."""
    chosen = event.logprobs[event.token].item()
    if top < 1:
        return TokenLogprobs(event.token, chosen, ())
    order = mx.argpartition(-event.logprobs, kth=top - 1)[:top]
    pairs = zip(order.tolist(), event.logprobs[order].tolist(), strict=True)
    return TokenLogprobs(event.token, chosen, tuple(sorted(pairs, key=lambda pair: -pair[1])))
