"""Generate answers for many concurrent requests with one base; each request has an adapter or none.

The engine queues requests (``schedule.py``), computes them in lanes (``lanes.py``) and delivers their text piece by
piece (``delivery.py``). All rows whose adapters can share a batch are in one lane. An adapter that cannot has its own
lane, and the lanes take turns. An error in one row does not end the others. ``step`` does one turn: a server calls it
in a thread, and ``stream`` calls it itself.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base import older_mlx_lm
from ..base.origin import base_of
from ..errors import ConfigError
from .bank import AdapterBank
from .delivery import deliver
from .kept import KeptPrompts
from .lanes import SHARED, BatchLane, PromptRead, SingleLane, Token, lane_of, make_lane
from .memory import KeysAndValues, can_always_trim, free_memory, new_cache
from .prompts import Prompts
from .requests import BusyError, Piece, Request, Row
from .sampling import check_sampling, extra_eos
from .schedule import Schedule


class Engine(Prompts):
    """One base model, its tokenizer and its adapters, answering requests.

    Args:
        bank: the adapters; an empty bank by default.
        batch_size: rows that are computed at the same time.
        prefill_batch_size: prompts that are prefilled at the same time, prefill_step_size tokens of each per step.
        queue_size: requests that may wait; None for any number.
        memory_limit: bytes for the KV caches of all rows; by default the memory that is free now.
        prompt_cache_size: entries of the prompt cache, which later requests with the same prefix reuse, in at most
            prompt_cache_bytes.
        draft_model: the draft model of requests that set ``draft_model``.
        turn_seconds: how long a lane computes while other lanes wait.
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
        older_mlx_lm.patch_mlx()
        mx.eval(model.parameters())  # evaluate in this thread, because another one cannot
        super().__init__(tokenizer)
        self.model = model
        self.bank = bank or AdapterBank(model)
        self.draft_model = draft_model
        self.queue_size, self.batch_size = queue_size, batch_size
        self._sizes = KeysAndValues(model)
        self.memory_limit = free_memory() if memory_limit is None else memory_limit
        self.prompt_cache = KeptPrompts(self.bank, prompt_cache_size, prompt_cache_bytes or self.memory_limit // 4)
        self._batching = {
            "batch_size": batch_size,
            "prefill_batch_size": prefill_batch_size,
            "prefill_step_size": prefill_step_size,
            "keep_prompts": not can_always_trim(new_cache(model)),
        }
        self._arrived: deque[Row] = deque()
        self._lock = threading.Lock()  # of _arrived
        self.schedule = Schedule(turn_seconds)
        self._lanes: dict[tuple, BatchLane | SingleLane] = {}
        self.counts: Counter[str] = Counter()  # requests by outcome, and tokens

    @property
    def vocab_size(self) -> int:
        return self._sizes.vocab_size

    @property
    def context_length(self) -> int | None:
        """The model's context length in tokens; None if its config does not give it."""
        base = base_of(self.model)
        config = base.config if base else {}
        return (config.get("text_config") or config).get("max_position_embeddings")

    # Requests.

    def submit(self, request: Request, deliver: Callable[[Piece | Exception], None]) -> Row:
        """Queue a request. ``deliver`` is called with its pieces, or with the exception that ends it.

        Raises: ConfigError: an unsupported option; AdapterError, FormatError: a problem with the adapter; BusyError;
            TooLongError.
        """
        config = request.config
        if not request.tokens:
            raise ConfigError("the prompt is empty", "Give some text with --prompt.")
        check_sampling(config, self._sizes.vocab_size)
        ends = extra_eos(config, self.tokenizer, self.vocab_size)
        if config.draft_model is not None and self.draft_model is None:
            raise ConfigError("no draft model is loaded", "Start with --draft-model.")
        self._sizes.check(len(request.tokens) + config.max_tokens, self.memory_limit)
        self._check_queue()
        resident = None if request.adapter is None else self.bank.acquire(request.adapter)
        row = Row(request, resident, deliver, ends)
        try:
            with self._lock:
                self._check_queue()  # again, because reading an adapter takes time
                self._arrived.append(row)
        except BusyError:
            if resident is not None:
                self.bank.release(resident)
            raise
        return row

    def _check_queue(self) -> None:
        if self.queue_size is not None and self.queued >= self.queue_size:
            raise BusyError(f"{self.queue_size} requests are already waiting", "Try again in a moment.")

    def cancel(self, row: Row) -> None:
        """End a row at the next step. Nothing more is delivered for it."""
        row.cancelled = True

    def stream(self, request: Request) -> Iterator[Piece]:
        """Answer one request and call ``step`` as needed. Do not use it while another thread calls ``step``."""
        for _, piece in self.stream_all([request]):
            yield piece

    def stream_all(
        self, requests: Sequence[Request], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Piece]]:
        """Like ``stream`` for several requests: yields pairs of a request's number and a piece of its answer.

        Args:
            stopped: called before each step. If it returns True, the answers end there without a finish_reason.
        """
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
                if stopped():
                    return
                self.step()
        finally:
            for row in rows:
                self.cancel(row)
            self._drop_cancelled()

    @property
    def queued(self) -> int:
        """The number of waiting requests."""
        return len(self._arrived) + len(self.schedule.waiting)

    @property
    def active(self) -> int:
        """The number of requests that are being computed."""
        return len(self.schedule.computed)

    # Steps.

    def step(self) -> bool:
        """Do one turn: accept requests, drop cancelled ones, compute one lane. Returns whether there is work left.

        An exception in a row or a batch ends rows, but not the engine.
        """
        self._take_in()
        self._drop_cancelled()
        with self.bank.lock:
            if self.bank.changed():  # by the caller: the prompt cache belongs to other weights
                self.prompt_cache.trim_to(n_sequences=0)
            self.prompt_cache.drop_stale()
            self._admit()
            name = self.schedule.next()
            if name is None:
                return bool(self.schedule.waiting)
            try:
                found = self._lanes[name].next()
            except Exception as error:
                self._recover(name, error)
                return True
        for event in found:
            try:
                self._handle(name, event)
            except Exception as error:  # raised by decoding the text, or by ``deliver``
                self._end(event.row, error)
        return True

    def close(self) -> None:
        """Cancel all requests, and remove all adapters from the model."""
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
        return self.schedule.rows

    def _take_in(self) -> None:
        with self._lock:
            while self._arrived:
                row = self._arrived.popleft()
                self.schedule.add(lane_of(row, self.model), row)

    def _drop_cancelled(self) -> None:
        for row in self._rows():
            if row.cancelled:
                self._end(row)

    def _admit(self) -> None:
        """Move rows from the queue into their lanes while there is room."""
        while self.active < self.batch_size and (first := self.schedule.first()) is not None:
            name, row = first
            if not self._fits(row):
                return
            self.schedule.admit(name, row)
            try:
                self._insert(name, row)
            except Exception as error:
                self._end(row, error)

    def _fits(self, row: Row) -> bool:
        """Whether the KV caches of all rows and of this one fit into memory."""
        needed = self._sizes.of_batch([each.length for each in (row, *self.schedule.computed)])
        if needed > self.memory_limit:
            return False
        self.prompt_cache.trim_to(n_bytes=self.memory_limit - needed)
        return True

    def _insert(self, name: tuple, row: Row) -> None:
        request, config = row.request, row.request.config
        row.begin(self.tokenizer)
        if name not in self._lanes:
            draft, eos = config.draft_model and self.draft_model, set(self.tokenizer.eos_token_ids)
            self._lanes[name] = make_lane(name, row.resident, self.model, self.bank, eos, draft, self._batching)
        cache, known = (request.cache, []) if request.cache is not None else self.prompt_cache.fetch(row)
        if cache is None:
            cache = new_cache(self.model, config.max_kv_size)
            if config.draft_model is not None:
                cache += new_cache(self.draft_model)
        row.cached = row.cached or len(known)
        self._lanes[name].insert(row, cache, known)

    def _recover(self, name: tuple, error: Exception) -> None:
        """Retry each row of a lane by itself after an exception. A row that fails again ends with its error."""
        rows = self.schedule.active.pop(name)
        lane = self._lanes.pop(name)
        lane.close()
        self.counts["failed_batches"] += 1
        for row in rows:
            if len(rows) == 1:
                self._end(row, error)
            else:
                row.tokens = [*row.request.tokens, *row.made]
                self.schedule.add(("retry", id(row)), row)

    def _handle(self, name: tuple, event: Token | PromptRead) -> None:
        row = event.row
        if row.ended or row.cancelled:
            return
        if isinstance(event, PromptRead):
            return self.prompt_cache.keep(row, event.tokens, event.cache, is_prompt=True)
        if row.guard.error is not None:
            return self._end(row, row.guard.error)
        reason, cache, tokens = event.finish_reason, event.cache, event.tokens
        if event.token in row.extra_eos:
            reason = "stop"
        ends = reason == "stop"  # an end-of-sequence token, which has no text
        row.made.append(event.token)
        segments = [] if ends else row.text.add(event.token)
        if row.text.stopped_at is not None or row.text.called:
            reason = "stop"
        elif reason is not None:
            segments += row.text.finish()
        if reason is not None and event.finish_reason is None:
            cache, tokens = self._lanes[name].remove(row)
        if reason is not None and cache is not None and row.request.cache is None:
            self.prompt_cache.keep(row, tokens, cache)
        deliver(row, event, segments, reason)
        if reason is not None:
            self._end(row)

    def _end(self, row: Row, error: Exception | None = None) -> None:
        """Remove a row from the engine, and deliver ``error`` if there is one."""
        if row.ended:
            return
        row.ended = True
        name = self.schedule.remove(row)
        with self.bank.lock:
            lane = self._lanes.get(name)
            if lane is not None and row in lane.rows.values():
                lane.remove(row)
            if lane is not None and name != SHARED and name not in self.schedule.active:
                self._lanes.pop(name).close()
        if row.resident is not None:
            self.bank.release(row.resident)
        self.counts["failed" if error else "cancelled" if row.cancelled else "completed"] += 1
        self.counts["prompt_tokens"] += len(row.request.tokens)
        self.counts["cached_tokens"] += row.cached
        self.counts["generation_tokens"] += len(row.made)
        if error is not None:
            with suppress(Exception):  # the receiver may have gone
                row.deliver(error)
