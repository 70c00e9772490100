"""Macs by memory: how much MLX can use, and the settings with which a run fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config import LABELS, AdapterConfig, TrainConfig, preference_of

MARGIN = 0.15  # the largest deviation of a measured from a predicted peak in tests/planning, as a share
_SHORTEST = 256  # tokens to which rows are cut
MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a Mac, and if not, the options with which it does. Estimated, not measured on a Mac."""

    machine: int  # GB of memory
    working_set: int  # bytes that the GPU may use
    fits: bool  # whether the planned run fits, with ``MARGIN`` to spare
    peak: int  # bytes with `flags`, or of the smallest run tried if none fits
    flags: tuple[str, ...] | None  # None if no tried options make it fit


@dataclass(frozen=True)
class Variant:
    """The settings of a run that affect its memory."""

    adapter: AdapterConfig
    train: TrainConfig
    quantize: bool = False  # the base, to 4 bits
    length: int = 0  # tokens of the longest row
    flags: tuple[str, ...] = ()  # the options in which it differs from the requested run


def working_set(gigabytes: int) -> int:
    """Bytes that the GPU of a Mac may keep resident: two thirds up to 32 GB, three quarters above.

    macOS's default, `recommendedMaxWorkingSetSize`, which `sudo sysctl iogpu.wired_limit_mb` raises.
    """
    size = gigabytes * 2**30
    return size * 2 // 3 if gigabytes <= 32 else size * 3 // 4


def fits(peak: float, size: int) -> bool:
    """Whether a run with this predicted peak fits into ``size`` bytes with ``MARGIN`` to spare."""
    return peak * (1 + MARGIN) <= size


def variants(asked: Variant, quantized: bool, layers: int, processes: int = 1) -> list[Variant]:
    """``asked``, then smaller and smaller runs. Each adds a change to the previous one, the least harmful first.

    Args:
        quantized: the base is. layers: of the model.
    """
    found = [asked]

    def add(*flags: str, **changes: Any) -> None:
        names = {flag.split()[0] for flag in flags}
        before = tuple(flag for flag in found[-1].flags if flag.split()[0] not in names)
        found.append(replace(found[-1], flags=before + flags, **changes))

    if not quantized and asked.adapter.method != "full":
        add("a 4-bit base", quantize=True)
    if not asked.train.grad_checkpoint:
        add("--grad-checkpoint", train=replace(asked.train, grad_checkpoint=True))
    least = processes * (2 if preference_of(asked.train.loss).rows == LABELS else 1)
    while (size := found[-1].train.batch_size) > least:
        size = max(least, size // 2 // processes * processes)
        times = -(-asked.train.batch_size // size) * asked.train.grad_accumulation_steps
        train = replace(found[-1].train, batch_size=size, grad_accumulation_steps=times)
        add(f"--batch-size {size}", f"--grad-accumulation-steps {times}", train=train)
    length = 1 << (asked.length - 1).bit_length() if asked.length > 2 else 2
    while length // 2 >= _SHORTEST:
        length //= 2
        add(f"--max-seq-length {length}", length=length)
    for count in (8, 4):
        if count < asked.adapter.last_layers(layers) and asked.adapter.layers_to_transform is None:
            adapter = replace(asked.adapter, num_layers=count)
            add(f"--num-layers {count}", adapter=adapter)
    return found


def verdicts(options: list[Variant], peak: Callable[[Variant], float]) -> list[Verdict]:
    """A verdict for each of ``MACS``. Each call of ``peak`` takes about a second, so few of ``options`` are tried.

    Options get smaller and smaller. So the search for the first that fits starts at the one that fits the next larger
    Mac, in doubling steps. If the last does not fit, none does, on this and every smaller Mac.
    """
    found, first, last = [], 0, len(options)
    for gigabytes in reversed(MACS):
        size = working_set(gigabytes)

        def fitting(index: int, size: int = size) -> bool:
            return fits(peak(options[index]), size)

        if first < last and not fitting(first):
            first = _first(fitting, first, last) if fitting(last - 1) else last
        best = options[min(first, last - 1)]
        found.append(Verdict(gigabytes, size, first == 0, peak(best), best.flags if first < last else None))
    return found[::-1]


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first index after ``low``, where it does not hold, at which ``holds``; it does at ``high - 1``."""
    step = 1
    while low + step < high - 1 and not holds(low + step):
        low, step = low + step, 2 * step
    return bisect_left(range(high), True, lo=low + 1, hi=min(low + step, high - 1), key=holds)
