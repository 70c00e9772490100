"""Timing: the ways take turns after a warm-up until the time is up, with the wanted MLX_LORA_KERNELS."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import mlx.core as mx


class OutOfTime(Exception):
    """The time was up before everything was measured."""


class Clock:
    """The time that a part of the check has."""

    def __init__(self, seconds: float):
        self.seconds, self._begin = seconds, time.monotonic()

    def left(self) -> float:
        """Seconds; negative when the time is up."""
        return self.seconds - (time.monotonic() - self._begin)

    def share(self, part: float) -> Clock:
        """A clock with this share of the time left."""
        return Clock(part * self.left())


def in_turn(ways: dict[str, Callable[[], float]], clock: Clock, most: int, warm: int = 1) -> Iterator[dict]:
    """Measure several ways to do the same work, one after the other in every round.

    So changes during the run, above all of the temperature, affect all of them equally. Every other round runs
    backwards.

    Args:
        ways: functions that do the work and return a measurement. clock: ends the rounds.
        most: rounds. warm: rounds before them that do not count.

    Yields: after each round, {way: measurements so far}. Raises: OutOfTime, before the first round.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm):
        for way in ways.values():
            way()
        if clock.left() < 0:
            raise OutOfTime(f"the time was up before {', '.join(ways)} had run often enough to be measured")
    longest = 0.0
    for number in range(most):
        if number and clock.left() < longest:
            return
        tic = time.monotonic()
        for name in list(ways)[:: -1 if number % 2 else 1]:
            samples[name].append(ways[name]())
        longest = max(longest, time.monotonic() - tic)
        yield samples


@contextlib.contextmanager
def kernels_set(to: str) -> Iterator[None]:
    """A context with MLX_LORA_KERNELS=``to``."""
    before = os.environ.get("MLX_LORA_KERNELS")
    os.environ["MLX_LORA_KERNELS"] = to
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLX_LORA_KERNELS"]
        else:
            os.environ["MLX_LORA_KERNELS"] = before


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes. It must wait for what it starts; earlier work ends before it."""
    mx.synchronize()
    tic = time.perf_counter()
    work()
    return time.perf_counter() - tic


def seconds_and_peak(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB of arrays that ``work`` holds at its peak, in addition to earlier ones)."""
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    seconds = seconds_of(work)
    return seconds, max(0, mx.get_peak_memory() - before) / 1e6


def memory_of_gpu() -> float | None:
    """Bytes that MLX may use on this GPU; None if it does not report them."""
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("total_memory") or info.get("memory_size")
    return float(size) if size else None
