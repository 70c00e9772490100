"""Measures each case on each path: time, host time, launches, bytes per second, memory."""

from __future__ import annotations

import contextlib
import os
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
from .cases import Case, Sizes, Way, cases
from .chips import bandwidth
from .models import widths
from .report import figure
from .timing import kernels_set, seconds_and_peak, seconds_of


@dataclass(frozen=True)
class KernelTime:
    """One part of a model, computed on one path."""

    part: str  # "q, k, v", "MLP", "norms, DoRA", ...; "layer": q, k, v, o and MLP together
    path: str  # "base" (no adapter), "kernels", "plain" (mlx-lora without kernels) or "mlx-lm"
    launches: int | None  # counted; None if autograd is part of it
    microseconds: float  # median; "layer": the sum of its parts' medians
    low_microseconds: float  # first quartile
    high_microseconds: float  # third quartile
    samples: int
    host_microseconds: float | None  # to build the graph, before anything runs; None if autograd is part of it
    gigabytes_per_second: float  # weights and adapters, each byte counted once
    share: float | None  # share of the chip's bandwidth, if known
    over_base: float | None  # relative to the base's time; None if there is no base
    peak_megabytes: float  # of temporary arrays, including the result
    backend: str  # Metal, CUDA or CPU
    chip: str


_SLOW = 0.2  # seconds for one pass of every path
_FIELDS = ("microseconds", "low_microseconds", "high_microseconds", "host_microseconds", "bytes", "launches")


def measure_kernels(
    model: str, rank: int, bits: int, rows: int, iters: int, seconds: float | None = None
) -> Iterator[KernelTime]:
    """Measure every kernel next to the alternatives, taking turns.

    Args:
        model: of ``models.MODELS``, whose widths a layer and a head have. bits: of the base, 16 for a dense one.
        rows: tokens at once. iters: measurements; the median is reported.
        seconds: for a part; a part that would take longer is measured less often, but at least three times.

    Yields: a ``KernelTime`` for each part and path, and the sums over a layer after its parts.
    """
    backend = "CPU" if device.is_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    cpu = backend == "CPU"
    chip = device.describe().chip
    peak = bandwidth(chip)
    hidden, keys, intermediate, vocabulary = widths(model)
    sizes = Sizes(
        hidden,
        keys,
        intermediate,
        min(vocabulary, 1024) if cpu else vocabulary,  # a CPU's figure is meaningless for a GPU
        rank,
        bits,
        rows,
        mx.float32 if cpu else mx.float16,
        cpu,
    )

    def result(part: str, path: str, found: dict, base: float | None) -> KernelTime:
        found = dict(found)
        size, microseconds = found.pop("bytes"), found["microseconds"]
        speed = size / microseconds / 1e3
        share, over = speed / peak if peak else None, microseconds / base if base else None
        return KernelTime(
            part, path, **found, gigabytes_per_second=speed, share=share, over_base=over, backend=backend, chip=chip
        )

    chosen = os.environ.get("MLX_LORA_KERNELS") or "auto"
    layer: dict[str, list[dict]] = {}
    for case in cases(sizes):
        if layer and not case.of_layer:
            sums = {path: _sum(parts) for path, parts in layer.items()}
            yield from (result("layer", path, found, sums["base"]["microseconds"]) for path, found in sums.items())
            layer = {}
        found = _measure(case, chosen, iters, seconds)
        for path, one in found.items():
            if case.of_layer:
                layer.setdefault(path, []).append(one)
            yield result(case.part, path, one, found["base"]["microseconds"] if "base" in found else None)


def _sum(parts: list[dict]) -> dict:
    """One layer of these parts, which run one after the other."""
    total = {name: sum(part[name] for part in parts) for name in _FIELDS}
    return {
        **total,
        "samples": min(part["samples"] for part in parts),
        "peak_megabytes": max(part["peak_megabytes"] for part in parts),
    }


def _measure(case: Case, chosen: str, iters: int, seconds: float | None, blocks: int = 5) -> dict[str, dict]:
    """The figures of each way. The ways take turns, in blocks of iterations: accelerating a module takes time too."""
    found: dict[str, dict] = {}
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    once = 0.0
    for name, way in case.ways.items():
        found[name] = {"launches": None, "host_microseconds": None, "bytes": way.size}
        if case.counted:
            with _accelerated(way, "on" if way.kernels else "off"):  # counting needs no GPU
                found[name]["launches"] = launches(way.calls[0], case.x).total() - way.inlined
                found[name]["host_microseconds"] = 1e6 * _host_time(way.calls[0], case.x)
        with _accelerated(way, chosen if way.kernels else "off"):
            mx.eval(_started(way.calls, case.x))  # compiles, and fills the caches
            passed, found[name]["peak_megabytes"] = seconds_and_peak(lambda: mx.eval(_started(way.calls, case.x)))  # noqa: B023
            once += passed
    if seconds is not None:
        iters = min(iters, max(3, int(seconds / once)))
    blocks = min(blocks, iters)
    for block in range(blocks):
        for name, way in case.ways.items():
            with _accelerated(way, chosen if way.kernels else "off"):
                times[name] += _times(way.calls, case.x, len(range(block, iters, blocks)), once > _SLOW)
    for name, samples in times.items():
        all_of = figure([1e6 * sample for sample in samples], "kernels", "", case.part, name, "us")
        found[name] |= {
            "microseconds": all_of.median,
            "low_microseconds": all_of.low,
            "high_microseconds": all_of.high,
            "samples": all_of.samples,
        }
    return found


def _started(calls: list[Callable], x: mx.array) -> mx.array:
    """Start the calls one after the other, like a model's layers, without waiting for the GPU."""
    y = x
    for call in calls:
        outputs = call(mx.depends([x], [y])[0])
        outputs = outputs if isinstance(outputs, list) else [outputs]
        y = mx.depends(outputs[:1], outputs[1:])[0] if len(outputs) > 1 else outputs[0]
    mx.async_eval(y)
    return y


def _times(calls: list[Callable], x: mx.array, count: int, slow: bool) -> list[float]:
    """Seconds per call, ``count`` times. The next pass starts before the previous one is waited for, as in decoding.

    So the time is the GPU's, unless the host takes longer to build the graph. If a call is ``slow``, the host's time
    does not matter, and the passes before and after the measured ones would cost too much.
    """
    if slow:
        return [seconds_of(lambda: mx.eval(_started(calls, x))) / len(calls) for _ in range(count)]
    mx.eval(_started(calls, x))
    times, running, tic = [], _started(calls, x), time.perf_counter()
    for _ in range(count):
        following = _started(calls, x)
        mx.eval(running)
        toc = time.perf_counter()
        times.append((toc - tic) / len(calls))
        running, tic = following, toc
    mx.eval(running)
    return times


def _host_time(call: Callable, x: mx.array, repeats: int = 7, number: int = 50) -> float:
    """Seconds that Python and MLX take to build the graph of a call. Nothing is evaluated, so no GPU is needed.

    The minimum of several repeats: longer times come from the machine's other work.
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
    with kernels_set(kernels):
        changed = [m for call in way.calls if isinstance(call, nn.Module) and way.kernels for m in accelerate(call)]
        with kernels_set("off"):
            for layer in changed:
                if isinstance(layer, KeptNorms):
                    layer.gain()  # once for all tokens, and with plain operations if there is no GPU
        try:
            yield
        finally:
            undo(changed)
