"""Convert a row's tokens to the pieces that its request receives."""

from __future__ import annotations

import time

import mlx.core as mx

from .lanes import Token
from .requests import Piece, Row, TokenLogprobs
from .text import Segment


def deliver(row: Row, event: Token, segments: list[Segment], reason: str | None) -> None:
    """Deliver ``segments``, which ``event`` completed. The last piece has the token and the finish ``reason``."""
    now, count, read = time.perf_counter(), len(row.made), len(row.request.tokens)
    row.first = row.first or now
    *earlier, last = segments or [Segment(row.text.kind, "")]
    facts = dict(
        prompt_tokens=read,
        cached_tokens=row.cached,
        prompt_tps=(read - row.cached) / max(row.first - row.admitted, 1e-9),
        generation_tokens=count,
        generation_tps=(count - 1) / max(now - row.first, 1e-9) if count > 1 else 0.0,
        peak_memory=mx.get_peak_memory() / 1e9,
    )
    for segment in earlier:
        row.deliver(Piece(segment.text, segment.kind, None, None, None, None, **facts))
    logprobs = None if row.request.logprobs is None else _logprobs(event, row.request.logprobs)
    row.deliver(Piece(last.text, last.kind, event.token, reason, row.text.stopped_at, logprobs, **facts))


def _logprobs(event: Token, top: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the ``top`` likeliest tokens."""
    chosen = event.logprobs[event.token].item()
    if top < 1:
        return TokenLogprobs(event.token, chosen, ())
    order = mx.argpartition(-event.logprobs, kth=top - 1)[:top]
    pairs = zip(order.tolist(), event.logprobs[order].tolist(), strict=True)
    return TokenLogprobs(event.token, chosen, tuple(sorted(pairs, key=lambda pair: -pair[1])))
