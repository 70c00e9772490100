"""Measures each case on each path: time, host time, launches, bytes per second, memory."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..fast import accelerate, undo
from ..fast.dora import KeptNorms
from ..kernels import exportable
from ..kernels.counting import launches
from .cases import Sizes, Way, cases
from .chips import bandwidth


@dataclass(frozen=True)
class KernelTime:
    """One part of a model, computed on one path."""

    part: str  # "q, k, v", "MLP", "norms, DoRA", ...; "layer": q, k, v, o and MLP together
    path: str  # "base" (no adapter), "kernels", "plain" (our layers without kernels) or "mlx-lm"
    launches: int | None  # counted; None where autograd is part of it
    microseconds: float  # median
    host_microseconds: float | None  # to build the graph, before anything runs; None where autograd is part of it
    gigabytes_per_second: float  # weights and adapters, each byte counted once
    share: float | None  # of the chip's bandwidth, where it is known
    over_base: float | None  # relative to the base's time; None where there is no base
    peak_megabytes: float  # of temporary arrays, the result included
    backend: str  # Metal, CUDA or CPU
    chip: str


def measure_kernels(
    hidden: int, keys: int, intermediate: int, vocabulary: int, rank: int, bits: int, rows: int, iters: int
) -> Iterator[KernelTime]:
    """Measure every kernel beside the alternatives.

    Args:
        hidden, keys, intermediate, vocabulary: sizes of a layer and a head. bits: of the base, 16 for a dense one.
        rows: tokens at once. iters: measurements; the median is reported.

    Yields: a ``KernelTime`` for each part and path, and the sums over a layer after its parts.
    """
    backend = "CPU" if device.is_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    cpu = backend == "CPU"
    chip = device.describe().chip
    peak = bandwidth(chip)
    sizes = Sizes(
        hidden,
        keys,
        intermediate,
        min(vocabulary, 1024) if cpu else vocabulary,  # a CPU's figure says nothing about a GPU's
        rank,
        bits,
        rows,
        mx.float32 if cpu else mx.float16,
        cpu,
    )

    def result(part, path, count, seconds, host, size, megabytes, base) -> KernelTime:
        speed = size / seconds / 1e9
        share, over = speed / peak if peak else None, seconds / base if base else None
        host = None if host is None else host * 1e6
        return KernelTime(part, path, count, seconds * 1e6, host, speed, share, over, megabytes, backend, chip)

    chosen = os.environ.get("MLX_LORA_KERNELS") or "auto"
    sums: dict[str, list[float]] = {}
    for case in cases(sizes):
        if sums and not case.of_layer:
            yield from (result("layer", name, *total, sums["base"][1]) for name, total in sums.items())
            sums = {}
        base = None
        for name, way in case.ways.items():
            count, host = None, None
            if case.counted:
                with _accelerated(way, "on" if way.kernels else "off"):  # counting needs no GPU
                    count = launches(way.calls[0], case.x).total() - way.inlined
                    host = _host_time(way.calls[0], case.x)
            with _accelerated(way, chosen if way.kernels else "off"):
                seconds, megabytes = _time(way.calls, case.x, iters)
            base = seconds if name == "base" else base
            if case.of_layer:
                total = sums.setdefault(name, [0, 0.0, 0.0, 0, 0.0])
                more = total[0] + count, total[1] + seconds, total[2] + host, total[3] + way.size
                total[:] = *more, max(total[4], megabytes)
            yield result(case.part, name, count, seconds, host, way.size, megabytes, base)


def _time(calls: list[Callable], x: mx.array, iters: int) -> tuple[float, float]:
    """(seconds per call when calls run one after the other, like a model's layers; MB of temporary arrays)."""

    def once() -> None:
        y = x
        for call in calls:
            outputs = call(mx.depends([x], [y])[0])
            outputs = outputs if isinstance(outputs, list) else [outputs]
            y = mx.depends(outputs[:1], outputs[1:])[0] if len(outputs) > 1 else outputs[0]
        mx.eval(y)

    once()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    times = []
    for _ in range(iters):
        tic = time.perf_counter()
        once()
        times.append(time.perf_counter() - tic)
    return statistics.median(times) / len(calls), max(0, mx.get_peak_memory() - before) / 1e6


def _host_time(call: Callable, x: mx.array, repeats: int = 7, number: int = 50) -> float:
    """Seconds that Python and MLX take to build the graph of a call. Nothing is evaluated, so no GPU is needed.

    The minimum of several repeats: everything above it is the machine's other work.
    """
    times: list[float] = []

    def build(x: mx.array) -> mx.array:
        for _ in range(repeats):
            tic = time.perf_counter()
            for _ in range(number):
                y = call(x)
            times.append((time.perf_counter() - tic) / number)
        return y

    with exportable():
        mx.export_function(lambda _: None, build, x)
    return min(times)


@contextlib.contextmanager
def _accelerated(way: Way, kernels: str) -> Iterator[None]:
    """A context with MLX_LORA_KERNELS=``kernels``, in which modules that may use kernels are accelerated."""
    before = os.environ.get("MLX_LORA_KERNELS")
    os.environ["MLX_LORA_KERNELS"] = kernels
    changed = [m for call in way.calls if isinstance(call, nn.Module) and way.kernels for m in accelerate(call)]
    os.environ["MLX_LORA_KERNELS"] = "off"
    for layer in changed:
        if isinstance(layer, KeptNorms):
            layer.gain()  # once for all tokens, and by plain operations where there is no GPU
    os.environ["MLX_LORA_KERNELS"] = kernels
    try:
        yield
    finally:
        undo(changed)
        if before is None:
            del os.environ["MLX_LORA_KERNELS"]
        else:
            os.environ["MLX_LORA_KERNELS"] = before
