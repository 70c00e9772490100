"""Macs by their memory: what of it MLX can use, and the settings with which a run fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..config import AdapterConfig, TrainConfig

MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a Mac, and if not, the options with which it does. Estimated: no Mac was asked."""

    machine: int  # GB of memory
    working_set: int  # bytes that the GPU may use
    fits: bool  # as planned
    peak: int  # bytes, with `flags`; of the smallest run tried if none fits
    flags: tuple[str, ...] | None  # None: nothing that was tried makes it fit


@dataclass(frozen=True)
class Variant:
    """Settings of a run, as far as they decide on its memory."""

    adapter: AdapterConfig
    train: TrainConfig
    quantize: bool = False  # the base, to 4 bits
    length: int = 0  # tokens of the longest row
    flags: tuple[str, ...] = ()  # in which it differs from what was asked for


def working_set(gigabytes: int) -> int:
    """Bytes that the GPU of a Mac may keep resident: two thirds up to 32 GB, three quarters above.

    macOS's default, `recommendedMaxWorkingSetSize`, which `sudo sysctl iogpu.wired_limit_mb` raises.
    """
    size = gigabytes * 2**30
    return size * 2 // 3 if gigabytes <= 32 else size * 3 // 4


def variants(asked: Variant, quantized: bool, layers: int, processes: int = 1) -> Iterator[Variant]:
    """``asked``, and then ever smaller runs: what changes the result of the training least comes first."""
    yield asked
    dense = [asked]
    if not quantized and asked.adapter.method != "full":
        flags = (*asked.flags, "a 4-bit base")
        dense.append(replace(asked, quantize=True, flags=flags))
    for start in dense:
        if start is not asked:
            yield start
        here = start
        if not here.train.grad_checkpoint:
            here = _with(here, "--grad-checkpoint", grad_checkpoint=True)
            yield here
        while here.train.batch_size > processes:
            size = max(processes, here.train.batch_size // 2 // processes * processes)
            times = -(-asked.train.batch_size // size) * asked.train.grad_accumulation_steps
            flags = [flag for flag in here.flags if not flag.startswith(("--batch-size", "--grad-acc"))]
            flags += [f"--batch-size {size}", f"--grad-accumulation-steps {times}"]
            train = replace(here.train, batch_size=size, grad_accumulation_steps=times)
            here = replace(here, train=train, flags=tuple(flags))
            yield here
    smallest = here
    adapted = asked.adapter.last_layers(layers)
    for count in (8, 4):
        if count < adapted and asked.adapter.layers_to_transform is None:
            adapter = replace(smallest.adapter, num_layers=count)
            here = replace(smallest, adapter=adapter, flags=(*smallest.flags, f"--num-layers {count}"))
            yield here
    length = 1 << (asked.length - 1).bit_length() if asked.length > 2 else 2
    while length // 2 >= 256:
        length //= 2
        yield replace(here, length=length, flags=(*here.flags, f"--max-seq-length {length}"))


def _with(variant: Variant, flag: str, **changes: object) -> Variant:
    return replace(variant, train=replace(variant.train, **changes), flags=(*variant.flags, flag))


def verdicts(options: list[Variant], peak: Callable[[Variant], int]) -> list[Verdict]:
    """One for each of ``MACS``; ``peak`` plans a variant, and is asked for those only that a machine needs."""
    found = []
    for gigabytes in reversed(MACS):
        size = working_set(gigabytes)
        fitting = next((v for v in options if peak(v) <= size), None)
        best = peak(fitting) if fitting else min(map(peak, options))
        flags = fitting.flags if fitting else None
        found.append(Verdict(gigabytes, size, fitting is options[0], best, flags))
    return found[::-1]
