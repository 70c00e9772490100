"""How long each case takes on each path: time, launches, bytes a second, memory."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .. import device
from ..kernels.counting import launches
from .cases import Sizes, cases
from .chips import bandwidth


@dataclass(frozen=True)
class KernelTime:
    """One part of a model on one path."""

    part: str  # "q, k, v", "MLP", "norms, DoRA", ...; "layer": the seven linears together
    path: str  # "base" (no adapter), "kernels", "plain" (our layers without kernels) or "mlx-lm"
    launches: int | None  # counted; None where autograd is part of it
    microseconds: float  # median
    gigabytes_per_second: float  # of weights and adapters, each byte once
    share: float | None  # of the chip's bandwidth, where it is known
    over_base: float | None  # times the base's, None where there is none
    peak_megabytes: float  # of what is made on the way, the result included
    backend: str  # Metal, CUDA or CPU
    chip: str


def measure_kernels(
    hidden: int, keys: int, intermediate: int, vocabulary: int, rank: int, bits: int, rows: int, iters: int
) -> Iterator[KernelTime]:
    """Measure every kernel beside what else does its work.

    Args:
        hidden, keys, intermediate, vocabulary: sizes of a layer and a head. bits: of the base, 16 for a dense one.
        rows: tokens at once. iters: measurements, of which the median is taken.

    Yields: a ``KernelTime`` for each part and path; after the linears of a layer their sums.
    """
    backend = "CPU" if device.is_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    cpu = backend == "CPU"
    chip = device.describe().chip
    peak = bandwidth(chip)
    sizes = Sizes(
        hidden,
        keys,
        intermediate,
        min(vocabulary, 1024) if cpu else vocabulary,  # a CPU's figure says nothing of a GPU's
        rank,
        bits,
        rows,
        mx.float32 if cpu else mx.float16,
        cpu,
    )

    def result(part, path, count, seconds, size, base, megabytes) -> KernelTime:
        speed = size / seconds / 1e9
        share, over = speed / peak if peak else None, seconds / base if base else None
        return KernelTime(part, path, count, seconds * 1e6, speed, share, over, megabytes, backend, chip)

    chosen = os.environ.get("MLX_LORA_KERNELS") or "auto"
    sums: dict[str, list[float]] = {}
    for case in cases(sizes):
        if sums and not case.of_layer:
            yield from (result("layer", path, *total[:3], sums["base"][1], total[3]) for path, total in sums.items())
            sums = {}
        base = None
        for name, path in case.paths.items():
            with _kernels(chosen if path.kernels else "off"):
                seconds, megabytes = _time(path.calls, case.x, iters)
            count = None
            if case.counted:
                with _kernels("on" if path.kernels else "off"):  # counting needs no GPU
                    found = launches(lambda x, path=path: [call(x) for call in path.calls[0]], case.x)
                    count = found.total() - path.inlined
            base = seconds if name == "base" else base
            if case.of_layer:
                total = sums.setdefault(name, [0, 0.0, 0, 0.0])
                total[:] = total[0] + count, total[1] + seconds, total[2] + path.size, max(total[3], megabytes)
            yield result(case.part, name, count, seconds, path.size, base, megabytes)


def _time(groups: list[list[Callable]], x: mx.array, iters: int) -> tuple[float, float]:
    """(seconds a group takes, one after the other as layers of a model do; MB that are made on the way)."""

    def once() -> None:
        y = x
        for group in groups:
            inputs = mx.depends([x], [y])[0]
            outputs = [call(inputs) for call in group]
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
    return statistics.median(times) / len(groups), max(0, mx.get_peak_memory() - before) / 1e6


@contextlib.contextmanager
def _kernels(mode: str) -> Iterator[None]:
    before = os.environ.get("MLX_LORA_KERNELS")
    os.environ["MLX_LORA_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLX_LORA_KERNELS"]
        else:
            os.environ["MLX_LORA_KERNELS"] = before
