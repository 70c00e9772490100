"""One dispatch: buffers with redzones, the call into the runtime, and what it found and counted."""

from __future__ import annotations

import ctypes as c
import os
import random
import time
from dataclasses import dataclass, field

import numpy as np

from .compiler import Built, where

MAX_BUFFERS, MAX_ERRORS, REDZONE = 32, 8, 4096


class EmuError(RuntimeError):
    """A kernel did what no kernel may."""


@dataclass
class Options:
    """How kernels run inside ``installed``."""

    schedule: str = "random"  # of threads and threadgroups: forward, reverse or random
    seed: int = int(os.environ.get("MSLEMU_SEED") or 1)
    misalign: bool = True  # inputs start at an odd multiple of their element size, as slices do
    coalescing: bool = False  # count 128-byte transactions by instruction (slow)
    instrument: bool = True  # False: only run, at a tenth of the time
    check_races: bool = True
    poison: int = 0xFF  # fills outputs and threadgroup memory: NaN
    allow_waw: tuple[str, ...] = ()  # outputs on which threads may write the same place twice


@dataclass
class Stats:
    """What one dispatch did. ``buffers``: by name, bytes ``read`` and ``written``, 128-byte lines touched once in all
    (``lines``) and once a threadgroup (``group_lines``), ``transactions`` under ``coalescing``. ``copied``: the inputs
    whose rows do not lie one after the other, which MLX copies by a launch of its own before this one."""

    name: str
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]
    groups: int
    simd_operations: int
    barriers: int
    atomics: int
    threadgroup_bytes: int
    compile_seconds: float
    seconds: float
    buffers: dict[str, dict[str, int]] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)


options = Options()
log: list[Stats] = []  # every dispatch, the newest last


class _Buffer(c.Structure):
    _fields_ = [
        ("lo", c.c_uint64),
        ("hi", c.c_uint64),
        ("writable", c.c_int32),
        ("allow_waw", c.c_int32),
        ("name", c.c_char_p),
        *[
            (n, c.c_uint64)
            for n in ["read", "written", "accesses", "group_lines", "lines", "unwritten", "transactions"]
        ],
        ("first_unwritten", c.c_int64),
    ]


class _Error(c.Structure):
    _fields_ = [("message", c.c_char * 400), ("pc", c.c_uint64), ("thread", c.c_int32), ("group", c.c_uint32 * 3)]


class _Arguments(c.Structure):  # msl_launch_args of rt.h
    _fields_ = [
        ("entry", c.c_void_p),
        ("pointers", c.POINTER(c.c_void_p)),
        ("grid", c.c_uint32 * 3),
        ("group", c.c_uint32 * 3),
        ("seed", c.c_uint64),
        *[
            (n, c.c_int32)
            for n in [
                "schedule",
                "poison",
                "check_races",
                "allow_divergent",
                "keep_going",
                "init",
                "coalescing",
                "nbuf",
                "nerr",
                "pad",
            ]
        ],
        *[
            (n, c.c_uint64)
            for n in [
                "n_groups",
                "n_simd",
                "n_barrier",
                "n_divergent",
                "n_atomic",
                "group_bytes",
                "group_read",
                "group_written",
            ]
        ],
        ("buffers", _Buffer * MAX_BUFFERS),
        ("errors", _Error * MAX_ERRORS),
    ]


def dispatch(
    built: Built,
    name: str,
    buffers: list[tuple[str, np.ndarray, bool]],
    grid: tuple[int, ...],
    threadgroup: tuple[int, ...],
    initialised: bool = False,
    **changes,
) -> Stats:
    """Run a kernel over ``grid`` threads.

    Args:
        buffers: (name, contiguous array, is it an output?) by buffer index; outputs are filled in place.
        initialised: outputs hold values before the kernel starts.
        changes: fields of ``Options`` for this dispatch.

    Raises: EmuError, with the seed that repeats it.
    """
    o = Options(**{**vars(options), **changes})
    pick = random.Random(o.seed)
    arena, addresses = _lay_out(buffers, pick if o.misalign else None)
    arguments = _Arguments()
    pointers = (c.c_void_p * len(buffers))(*addresses)
    names = [n.encode() for n, _, _ in buffers]
    for i, (n, array, output) in enumerate(buffers):
        lo, slot = addresses[i], arguments.buffers[i]
        slot.lo, slot.hi, slot.writable, slot.name = lo, lo + array.nbytes, int(output), names[i]
        slot.allow_waw = int(n in o.allow_waw)
        if array.nbytes:
            filled = not output or initialised
            _memory(lo, array.nbytes)[:] = array.reshape(-1).view(np.uint8) if filled else o.poison
    group = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))  # as MLX does
    arguments.entry = c.cast(built.library.msl_entry, c.c_void_p).value
    arguments.pointers = c.cast(pointers, c.POINTER(c.c_void_p))
    arguments.grid[:], arguments.group[:] = grid, group
    arguments.schedule = ("forward", "random", "reverse").index(o.schedule)
    arguments.seed, arguments.poison, arguments.nbuf = o.seed, o.poison, len(buffers)
    arguments.check_races, arguments.init, arguments.coalescing = o.check_races, initialised, o.coalescing
    tic = time.perf_counter()
    built.library.msl_launch(c.byref(arguments))
    stats = _stats(name, arguments, buffers, grid, group, built.seconds, time.perf_counter() - tic)
    log.append(stats)
    again = f" [schedule {o.schedule}, MSLEMU_SEED={o.seed}]"
    if arguments.nerr:
        found = [_describe(built, error) for error in arguments.errors[: min(arguments.nerr, MAX_ERRORS)]]
        raise EmuError(f"{name}: " + "; ".join(found) + again)
    for (n, array, output), slot in zip(buffers, arguments.buffers, strict=False):
        if not output or not array.nbytes:
            continue
        if o.instrument and o.check_races and not initialised and slot.unwritten:
            raise EmuError(
                f"{name}: output '{n}': {slot.unwritten} of {array.nbytes} bytes never written, the first at byte "
                f"{slot.first_unwritten}; MLX does not clear outputs{again}"
            )
        array.reshape(-1).view(np.uint8)[:] = _memory(slot.lo, array.nbytes)
    del arena
    return stats


def _lay_out(buffers, pick: random.Random | None) -> tuple[np.ndarray, list[int]]:
    """Memory for all buffers, redzones between them, and their addresses."""
    offsets, top = [], REDZONE
    for _, array, output in buffers:
        top = (top + 255) // 256 * 256
        # MLX's own allocations are aligned, but an input may be a slice: only its elements are.
        shift = 0 if output or pick is None else array.itemsize * (2 * pick.randrange(4) + 1)
        offsets.append(top + shift)
        top += shift + array.nbytes + REDZONE
    arena = np.full(top + 512, 0xA5, np.uint8)
    base = (arena.ctypes.data + 255) // 256 * 256
    return arena, [base + offset for offset in offsets]


def _memory(address: int, size: int) -> np.ndarray:
    return np.frombuffer((c.c_uint8 * size).from_address(address), np.uint8)


def _stats(name, arguments, buffers, grid, group, compile_seconds, seconds) -> Stats:
    counts = ["read", "written", "accesses", "group_lines", "lines", "transactions"]
    found = {}
    for (n, array, _), slot in zip(buffers, arguments.buffers, strict=False):
        found[n] = {"nbytes": array.nbytes, **{key: getattr(slot, key) for key in counts}}
    return Stats(
        name,
        tuple(grid),
        group,
        arguments.n_groups,
        arguments.n_simd,
        arguments.n_barrier,
        arguments.n_atomic,
        arguments.group_bytes,
        compile_seconds,
        seconds,
        found,
    )


def _describe(built: Built, error: _Error) -> str:
    place = f" (threadgroup {tuple(error.group)}, thread {error.thread})" if error.thread >= 0 else ""
    return error.message.decode() + where(built, error.pc) + place
