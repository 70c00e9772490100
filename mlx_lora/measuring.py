"""How long a decoding layer's linear layers take: base, mlx-lora's kernels, its plain operations, mlx-lm's layers."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import device
from .kernels.counting import launches
from .layers import METHODS, introduce

# Weights are read from memory in a decoding model: enough copies that no cache holds them.
_BEYOND_CACHE = 256e6  # bytes
# GB/s by Apple's data sheets; the first name that a chip's begins with counts.
BANDWIDTH = {
    "Apple M1 Ultra": 800,
    "Apple M1 Max": 400,
    "Apple M1 Pro": 200,
    "Apple M1": 68,
    "Apple M2 Ultra": 800,
    "Apple M2 Max": 400,
    "Apple M2 Pro": 200,
    "Apple M2": 100,
    "Apple M3 Ultra": 819,
    "Apple M3 Max": 400,
    "Apple M3 Pro": 150,
    "Apple M3": 100,
    "Apple M4 Max": 546,
    "Apple M4 Pro": 273,
    "Apple M4": 120,
    "Apple M5 Max": 614,
    "Apple M5 Pro": 307,
    "Apple M5": 153,
}


@dataclass(frozen=True)
class KernelTime:
    """One group of linears on one path."""

    part: str  # "q, k, v", "o", "gate, up", "down" or "layer"
    path: str  # "base", "kernels", "plain" or "mlx-lm"
    launches: int  # counted
    microseconds: float  # median
    gigabytes_per_second: float  # of weights and adapters, each byte once
    share: float | None  # of the chip's bandwidth, where it is known
    over_base: float  # times the base's
    backend: str  # Metal, CUDA or CPU
    chip: str


def measure_kernels(
    hidden: int, keys: int, intermediate: int, rank: int, bits: int, rows: int, iters: int
) -> Iterator[KernelTime]:
    """Measure one layer's seven linears.

    Args:
        hidden, keys, intermediate: sizes of the layer. bits: of the base, 16 for a dense one. rows: tokens at once.
        iters: measurements, of which the median is taken.

    Yields: a ``KernelTime`` for each group and path, the whole layer last.
    """
    backend = "CPU" if device.is_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    dtype = mx.float32 if backend == "CPU" else mx.float16
    shapes = {
        "q, k, v": (hidden, [hidden, keys, keys]),
        "o": (hidden, [hidden]),
        "gate, up": (hidden, [intermediate, intermediate]),
        "down": (intermediate, [hidden]),
    }
    chip = device.describe().chip
    peak = next((gbs for name, gbs in BANDWIDTH.items() if chip.startswith(name)), None)
    sums: dict[str, list[float]] = {}
    for part, (inputs, outputs) in shapes.items():
        bases = _bases(inputs, outputs, bits, dtype, backend != "CPU")
        x, plain = mx.random.normal((1, rows, inputs)).astype(dtype), None
        for path, (layers, mode) in _paths(bases, rank).items():
            with _kernels(mode):
                seconds = _time(layers, x, iters)
            with _kernels("on" if path == "kernels" else "off"):  # counting needs no Metal
                count = launches(lambda x, layers=layers: [layer(x) for layer in layers[0]], x).total()
            size = sum(a.nbytes for layer in layers[0] for _, a in tree_flatten(layer.parameters()))
            plain = plain or seconds
            total = sums.setdefault(path, [0.0, 0, 0])
            total[:] = total[0] + seconds, total[1] + count, total[2] + size
            yield _result(part, path, count, seconds, size, plain, backend, chip, peak)
    for path, (seconds, count, size) in sums.items():
        yield _result("layer", path, count, seconds, size, sums["base"][0], backend, chip, peak)


def _result(part, path, count, seconds, size, plain, backend, chip, peak) -> KernelTime:
    speed = size / seconds / 1e9
    share = speed / peak if peak else None
    return KernelTime(part, path, count, seconds * 1e6, speed, share, seconds / plain, backend, chip)


def _bases(inputs: int, outputs: list[int], bits: int, dtype: mx.Dtype, many: bool) -> list[list[nn.Module]]:
    """Copies of a group of layers that read the same input."""
    size = inputs * sum(outputs) * bits / 8
    copies = min(64, math.ceil(_BEYOND_CACHE / size)) if many else 1
    found = []
    for _ in range(copies):
        group = [nn.Linear(inputs, n, bias=False) for n in outputs]
        for layer in group:
            layer.set_dtype(dtype)
        group = [layer.to_quantized(64, bits) if bits < 16 else layer for layer in group]
        mx.eval([layer.parameters() for layer in group])
        found.append(group)
    return found


def _paths(bases: list[list[nn.Module]], rank: int) -> dict[str, tuple[list[list[nn.Module]], str]]:
    """(layers, MLX_LORA_KERNELS) by path."""
    from mlx_lm.tuner.lora import LoRALinear

    ours, theirs = [], []
    for group in bases:
        adapted = [METHODS["lora"]["linear"](base, rank, 2.0).eval() for base in group]
        introduce({f"layer.{n}": layer for n, layer in zip(("gate_proj", "up_proj"), adapted, strict=False)})
        if len(group) == 3:
            introduce({f"layer.{n}": m for n, m in zip(("q_proj", "k_proj", "v_proj"), adapted, strict=True)})
        ours.append(adapted)
        theirs.append([LoRALinear.from_base(base, rank, scale=2.0) for base in group])
    mx.eval([layer.parameters() for group in ours + theirs for layer in group])
    ours_by = os.environ.get("MLX_LORA_KERNELS") or "auto"
    return {"base": (bases, "off"), "kernels": (ours, ours_by), "plain": (ours, "off"), "mlx-lm": (theirs, "off")}


def _time(groups: list[list[nn.Module]], x: mx.array, iters: int) -> float:
    """Seconds a group takes, one after the other as layers of a model do."""

    def once() -> None:
        y = x
        for group in groups:
            inputs = mx.depends([x], [y])[0]
            outputs = [layer(inputs) for layer in group]
            y = mx.depends(outputs[:1], outputs[1:])[0] if len(outputs) > 1 else outputs[0]
        mx.eval(y)

    once()
    times = []
    for _ in range(iters):
        tic = time.perf_counter()
        once()
        times.append(time.perf_counter() - tic)
    return statistics.median(times) / len(groups)


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
