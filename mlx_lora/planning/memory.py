"""The peak of the memory that MLX allocates while it evaluates a graph.

Views take no memory. An operation may write into an input that nothing else needs (donation). MLX prepares operations
ahead of the device: an operation's inputs are freed only after it was computed, some operations later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .graph import ELEMENTWISE, Graph, Operation, evaluation_order

_DONATES = ELEMENTWISE | {
    "Compiled",
    "Softmax",
    "SliceUpdate",
    "Scatter",
    "ScatterAxis",
    "RMSNorm",
    "LayerNorm",
    "Scan",
}
_PRODUCTS = ("Matmul", "AddMM", "BlockMaskedMM", "GatherMM", "SegmentedMM")
_ALIGNED = 16


@dataclass(frozen=True)
class Queue:
    """How far MLX prepares operations ahead of the device: ``groups`` of work, each limited in operations and bytes."""

    groups: int
    operations: int
    bytes: float = math.inf


# mlx/backend/cpu/encoder.h; an operation counts twice: for its kernel and for releasing its buffers
CPU = Queue(11, 10)
GPU = Queue(11, 40, 50 * 2**20)  # mlx/backend/metal/device.cpp, command buffers


@dataclass(frozen=True)
class Peak:
    """The peak and its parts, in bytes."""

    total: int
    moment: str  # the operation at the peak
    live: dict[str, int]  # allocated at the peak besides inputs: {array: bytes}


class _Arrays:
    """The buffers and strides of arrays, and which arrays are views."""

    def __init__(self, graph: Graph):
        self.graph, self.buffer, self.strides = graph, {}, {}

    def own(self, name: str, strides: tuple[int, ...] | None = None) -> None:
        self.buffer[name] = name
        self.strides[name] = strides or _contiguous(self.graph.shapes[name])

    def is_contiguous(self, name: str) -> bool:
        shape, strides = self.graph.shapes[name], self.strides[name]
        return all(n == 1 or s == e for n, s, e in zip(shape, strides, _contiguous(shape), strict=True))

    def is_dense(self, name: str) -> bool:
        """Whether the elements fill a buffer without gaps, in any order."""
        pairs = sorted((s, n) for n, s in zip(self.graph.shapes[name], self.strides[name], strict=True) if n > 1)
        expected = 1
        for stride, count in pairs:
            if stride != expected:
                return False
            expected *= count
        return True

    def view(self, op: Operation) -> bool:
        """Record the outputs of ``op`` as views of its input if they are views. False if it allocates."""
        if not op.inputs or op.inputs[0] not in self.strides:
            return False
        if op.name in ("CustomTransforms", "Depends"):  # each output is one of the inputs
            for read, out in zip(op.inputs, op.outputs, strict=False):
                self.buffer[out], self.strides[out] = self.buffer[read], self.strides[read]
            return True
        source, shapes = op.inputs[0], self.graph.shapes
        strides, shape = self.strides[source], shapes[source]
        for out in op.outputs:
            found = _view_strides(op, strides, shape, shapes[out])
            if found is None:
                return False
            self.buffer[out], self.strides[out] = self.buffer[source], found
        return True


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def _view_strides(op: Operation, strides: tuple, shape: tuple, new: tuple) -> tuple | None:
    """The strides of a view of an array with ``strides`` and ``shape``; None if ``op`` makes no view."""
    name, arguments = op.name, op.arguments
    if name == "Transpose":
        return tuple(strides[axis] for axis in arguments[0])
    if name == "Broadcast":
        missing = len(new) - len(shape)
        return (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
    if name == "Slice":
        return tuple(s * step for s, step in zip(strides, arguments[2], strict=True))
    if name in ("Split", "StopGradient", "Copy", "View") and len(new) == len(shape):
        return strides
    if name in ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"):
        return _reshaped(strides, shape, new)
    return None


def _reshaped(strides: tuple, shape: tuple, new: tuple) -> tuple | None:
    """The strides after a reshape without a copy; None if it needs one."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    merged: list[list[int]] = []
    for n, s in old:
        if merged and merged[-1][1] == n * s:
            merged[-1] = [merged[-1][0] * n, s]
        else:
            merged.append([n, s])
    found, at, left = [], 0, merged[0][0] if merged else 1
    for n in new:
        if n == 1:
            found.append(0)
            continue
        if at >= len(merged) or left % n:
            return None
        left //= n
        found.append(merged[at][1] * left)
        if left == 1:
            at += 1
            left = merged[at][0] if at < len(merged) else 1
    return tuple(found)


def peak_of(graph: Graph, freed: Iterable[str], resident: int, queue: Queue) -> Peak:
    """The peak of evaluating a fused graph.

    Args:
        freed: inputs that nothing else holds; they are freed after their last use. Other inputs stay.
        resident: bytes allocated besides the inputs.
    """
    arrays, freed = _Arrays(graph), set(freed)
    for name in (*graph.inputs, *graph.constants):
        arrays.own(name)
    order = evaluation_order(graph)
    uses: dict[str, int] = {}
    for op in order:
        for name in op.inputs:
            uses[name] = uses.get(name, 0) + 1
    inputs = set(graph.inputs)
    stays = {*graph.outputs, *(inputs - freed), *graph.constants}
    sizes = {name: graph.bytes(name) for name in graph.inputs}
    held = {name: 1 for name in graph.inputs if name not in freed}  # holders of a buffer: arrays and pending work
    for name in (*freed, *graph.constants):
        held[name] = 1
    left = dict(uses)
    total = resident + sum(sizes.values())
    best, moment, live = total, "start", {}
    flight: deque[list[str]] = deque([[]])
    load = [0, 0.0]

    def release(buffer: str) -> None:
        nonlocal total
        held[buffer] -= 1
        if held[buffer] == 0:
            total -= sizes.pop(buffer, 0)

    def done(buffers: list[str], kernels: int, size: int) -> None:
        flight[-1].extend(buffers)
        load[0] += kernels
        load[1] += size
        if load[0] >= queue.operations or load[1] >= queue.bytes:
            load[:] = 0, 0.0
            flight.append([])
            while len(flight) > queue.groups:
                for buffer in flight.popleft():
                    release(buffer)

    for op in order:
        made, kernels = 0, 1
        if arrays.view(op):
            for name in op.outputs:
                held[arrays.buffer[name]] += 1
        else:
            kernels = 2
            for name, donor in _outputs(op, arrays, left, held, stays, sizes):
                if donor is None:
                    arrays.own(name, _strides_of(op, name, arrays))
                    sizes[name] = max(graph.bytes(name), _ALIGNED)
                    held[name], made = 1, made + sizes[name]
                else:
                    strides = arrays.strides[donor]
                    arrays.buffer[name], arrays.strides[name] = arrays.buffer[donor], strides
                    held[arrays.buffer[donor]] += 1
        copies = _copied(op, arrays)
        temporary = f"copy for {op.outputs[0]}"
        if copies:
            sizes[temporary], held[temporary] = copies, 1
        total += made + copies
        if total > best:
            best, moment, live = total, op.name, dict(sizes)
        buffers = list(dict.fromkeys(arrays.buffer[name] for name in op.inputs if name in arrays.buffer))
        for buffer in buffers:
            held[buffer] += 1
        done(buffers + [temporary] * bool(copies), kernels, made + copies)
        for name in op.inputs:
            left[name] -= 1
            if left[name] == 0 and name not in stays and name in arrays.buffer:
                release(arrays.buffer[name])
    return Peak(best, moment, {name: size for name, size in live.items() if name not in inputs})


def _outputs(op, arrays: _Arrays, left, held, stays, sizes):
    """(output, the input whose buffer it takes over, or None) of an operation that computes."""
    graph, taken = arrays.graph, set()
    for name in op.outputs:
        donor = None
        for read in op.inputs if op.name in _DONATES else ():
            buffer = arrays.buffer.get(read)
            if buffer is None or read in taken or left[read] != 1 or held.get(buffer) != 1:
                continue
            if read in stays:
                continue
            same = graph.shapes[read] == graph.shapes[name] and graph.itemsizes[read] == graph.itemsizes[name]
            if same and arrays.is_dense(read) and sizes.get(buffer, 0) <= graph.bytes(name) + 16384:
                donor = read
                taken.add(read)
                break
        yield name, donor


def _strides_of(op: Operation, name: str, arrays: _Arrays) -> tuple[int, ...] | None:
    """Elementwise operations keep the order of the elements of an input of the same shape."""
    if op.name in ELEMENTWISE or op.name == "Compiled":
        shape = arrays.graph.shapes[name]
        same = [read for read in op.inputs if arrays.graph.shapes[read] == shape and read in arrays.strides]
        if same and all(arrays.is_dense(read) for read in same) and len({arrays.strides[r] for r in same}) == 1:
            return arrays.strides[same[0]]
    return None


def _copied(op: Operation, arrays: _Arrays) -> int:
    """Bytes of the contiguous copies that a matrix product makes of its inputs."""
    if op.name not in _PRODUCTS:
        return 0
    copied = 0
    for name in op.inputs[:2]:
        shape, strides = arrays.graph.shapes[name], arrays.strides[name]
        (rows, columns), (down, right) = shape[-2:], strides[-2:]
        plain = (right == 1 or columns == 1) and (down == columns or rows == 1)
        flipped = (down == 1 or rows == 1) and (right == rows or columns == 1)
        if not (plain or flipped):
            copied += arrays.graph.bytes(name)
    return copied
