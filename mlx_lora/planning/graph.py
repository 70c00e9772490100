"""The operations of a training step in MLX's order of evaluation: traced, fused and sorted, but never computed.

`mx.export_function` calls back for each primitive of a traced function, with the shapes and dtypes of its inputs and
outputs. MLX then fuses elementwise operations (mlx/compile.cpp) and evaluates the rest in its own order
(mlx/transforms.cpp). This module does both in the same way; `memory.py` adds up the bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

# mlx/compile.cpp: the operations that are fused, and the limits.
_UNARY = (
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Cosh Conjugate Remainder Erf ErfInv Exp Expm1 "
    "Floor Log Log2 Log10 Log1p LogicalNot Negative Round Sigmoid Sign Sin Sinh Square Sqrt Rsqrt Tan Tanh Real Imag "
    "BitwiseInvert"
)
_BINARY = (
    "Add Divide Equal NaNEqual Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogAddExp Maximum Minimum "
    "Multiply NotEqual Power Subtract BitwiseBinary ArcTan2"
)
ELEMENTWISE = frozenset(f"{_UNARY} {_BINARY} Select".split())
_FUSED = ELEMENTWISE | {"Broadcast"}
_DEPTH, _MOST_INPUTS, _WIDTH = 11, 24, 20


@dataclass
class Operation:
    """A primitive, or several fused ones (name "Compiled")."""

    name: str
    inputs: list[str]
    outputs: list[str]
    arguments: Sequence[Any] = ()


@dataclass
class Graph:
    """A traced function. Arrays have names; ``shapes`` and ``itemsizes`` (bytes) are by name."""

    inputs: list[str]
    outputs: list[str]
    operations: list[Operation]  # in a valid order of computation
    shapes: dict[str, tuple[int, ...]]
    itemsizes: dict[str, int]
    constants: dict[str, mx.array] = field(default_factory=dict)
    makers: dict[str, Operation] = field(default_factory=dict)  # the operation that makes an array

    def index(self) -> None:
        """Bring ``makers`` up to date with ``operations``."""
        self.makers = {name: op for op in self.operations for name in op.outputs}

    def bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.itemsizes[name]


def trace(function: Callable[..., list[mx.array]], inputs: list[mx.array]) -> Graph:
    """The operations of ``function(*inputs)``. Only the shapes and dtypes of the inputs are used."""
    records: dict[str, list[dict]] = defaultdict(list)
    mx.export_function(lambda record: records[record["type"]].append(record), function, *inputs)
    graph = Graph([], [], [], {}, {})

    def names(arrays: list[tuple]) -> list[str]:
        for name, shape, dtype in arrays:
            graph.shapes[name], graph.itemsizes[name] = tuple(shape), dtype.size
        return [name for name, *_ in arrays]

    graph.inputs = names(records["inputs"][0]["inputs"])
    graph.outputs = names(records["outputs"][0]["outputs"])
    graph.constants = dict(records["constants"][0]["constants"])
    names([(name, array.shape, array.dtype) for name, array in graph.constants.items()])
    for record in records["primitive"]:
        outputs, read = names(record["outputs"]), names(record["inputs"])
        graph.operations.append(Operation(record["name"], read, outputs, record["arguments"]))
    graph.index()
    return graph


def simplify(graph: Graph) -> None:
    """Merge equal operations, drop unused ones, and order the rest starting from the outputs."""
    graph.index()
    same: dict[str, str] = {}
    seen: dict[tuple, Operation] = {}
    order: list[Operation] = []
    done: set[int] = set()
    stack = [(graph.makers[name], False) for name in reversed(graph.outputs) if name in graph.makers]
    while stack:
        op, ready = stack.pop()
        if id(op) in done:
            continue
        if not ready:
            stack.append((op, True))
            stack += [(graph.makers[name], False) for name in reversed(op.inputs) if name in graph.makers]
            continue
        done.add(id(op))
        op.inputs = [same.get(name, name) for name in op.inputs]
        key = (op.name, repr(op.arguments), *op.inputs)
        if (first := seen.setdefault(key, op)) is op:
            order.append(op)
        else:
            same |= dict(zip(op.outputs, first.outputs, strict=True))
    graph.operations = order
    graph.outputs = [same.get(name, name) for name in graph.outputs]
    graph.index()


def fuse(graph: Graph) -> None:
    """Replace groups of elementwise operations by one "Compiled" each, as `mx.compile` does."""
    readers: dict[str, list[int]] = defaultdict(list)
    place = {name: i for i, op in enumerate(graph.operations) for name in op.outputs}
    for i, op in enumerate(graph.operations):
        for name in op.inputs:
            readers[name].append(i)
    results, gone, kept = set(graph.outputs), set(), []
    for last in range(len(graph.operations) - 1, -1, -1):
        if last in gone:
            continue
        op = graph.operations[last]
        group = _group(graph, last, place, readers, results) if op.name in ELEMENTWISE else [last]
        if len(group) <= 1:
            kept.append((last, op))
            continue
        inside, read, made = set(group), [], []
        for i in sorted(group):
            one = graph.operations[i]
            read += [name for name in one.inputs if place.get(name) not in inside]
            if i == last or one.outputs[0] in results:
                made.append(one.outputs[0])
        # A broadcast that other operations read is also computed for them.
        shared = {i for i in group if any(r not in inside for r in readers[graph.operations[i].outputs[0]])}
        gone |= inside - shared
        fused = Operation("Compiled", list(dict.fromkeys(read)), made)
        for i in group:
            for name in graph.operations[i].inputs:
                readers[name] = [r for r in readers[name] if r not in inside or i in shared]
        for name in fused.inputs:
            readers[name].append(last)
        kept.append((last, fused))
    graph.operations = [op for _, op in reversed(kept)]
    graph.index()


def _group(graph: Graph, last: int, place: dict, readers: dict, results: set[str]) -> list[int]:
    """The operations to compute together with ``last``, which come before it."""
    shape = graph.shapes[graph.operations[last].outputs[0]]
    group: dict[int, None] = {}
    inputs: set[str] = set()

    def visit(name: str, depth: int) -> None:
        i = place.get(name)
        if i in group:
            return
        fusable = i is not None and graph.operations[i].name in _FUSED and depth < _DEPTH
        if not fusable or (name in results and graph.shapes[name] != shape):
            inputs.add(name)
            return
        splits = graph.operations[i].name == "Broadcast" and len(inputs) < _MOST_INPUTS
        if depth and not splits and any(reader not in group for reader in readers[name]):
            inputs.add(name)
            return
        (inputs.add if name in results else inputs.discard)(name)
        if len(inputs) >= _MOST_INPUTS:
            return
        group[i] = None
        for read in graph.operations[i].inputs:
            visit(read, depth + 1)

    visit(graph.operations[last].outputs[0], 0)
    return list(group)


def evaluation_order(graph: Graph) -> list[Operation]:
    """The operations in the order in which MLX evaluates them (a breadth-first walk from the outputs, reversed)."""
    counts: dict[int, int] = defaultdict(int)
    makers = graph.makers
    end = Operation("Synchronize", graph.outputs, [])
    stack = [end]
    while stack:
        for name in stack.pop().inputs:
            if (op := makers.get(name)) is not None:
                counts[id(op)] += 1
                if counts[id(op)] == 1:
                    stack.append(op)
    tape, waiting, at = [end], [], 0
    while counts and (at < len(tape) or waiting):
        if at >= len(tape):
            op, first = waiting.pop()
        else:
            op, first, at = tape[at], 0, at + 1
        for j in range(first, len(op.inputs)):
            maker = makers.get(op.inputs[j])
            if maker is None or id(maker) not in counts:
                continue
            if len(tape) - at >= _WIDTH:
                waiting.append((op, j))
                break
            counts[id(maker)] -= 1
            if counts[id(maker)] == 0:
                del counts[id(maker)]
                tape.append(maker)
    return tape[:0:-1]
