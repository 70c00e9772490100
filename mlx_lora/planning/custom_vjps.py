"""Traces functions whose operations have custom vjps, which `mx.export_function` refuses.

Such an operation ``y = f(x)`` is traced as ``stop_gradient(f(x)) + link``, where the link leads from x to y through a
maximum with a unique constant, the tag. MLX differentiates the link. In the exported graph the tags show where the
cotangent of y arrives and where the cotangent of x is expected; the custom vjp, traced separately, is put in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..kernels.registry import is_traced, traced_by, with_backward
from .graph import Graph, Operation, simplify, trace

_FIRST_TAG = 7_654_321  # exact in float32, and in no model


@dataclass
class _Call:
    """One call of an operation with a custom vjp, in the traced function."""

    backward: Callable
    arguments: list[mx.array]
    outputs: list[mx.array]  # of f
    results: list[mx.array]  # y
    single: bool  # f returns one array, not several
    argument_tags: list[int | None]  # None for integers
    result_tags: list[int]
    names: list[str] = field(default_factory=list)  # of arguments, outputs and results in the graph


def trace_with_vjps(function: Callable[..., list[mx.array]], inputs: list[mx.array], complete: bool = True) -> Graph:
    """The simplified graph of ``function(*inputs)``; includes custom vjps if ``complete``."""
    tags = itertools.count(_FIRST_TAG)
    graph = _trace(function, inputs, tags, itertools.count(), complete)
    simplify(graph)
    return graph


def _trace(function: Callable, inputs: list[mx.array], tags, numbers, complete: bool) -> Graph:
    calls: list[_Call] = []

    def tracer(forward: Callable, backward: Callable, arguments: tuple[mx.array, ...]):
        calls.append(_call(forward, backward, arguments, tags))
        return calls[-1].results[0] if calls[-1].single else tuple(calls[-1].results)

    def traced(*arrays: mx.array) -> list[mx.array]:
        with traced_by(tracer), _exportable_products():
            made = list(function(*arrays))
        return made + [array for call in calls for array in (*call.arguments, *call.outputs, *call.results)]

    graph = trace(traced, inputs)
    at = len(graph.outputs) - sum(len(c.arguments) + 2 * len(c.outputs) for c in calls)
    graph.outputs, names = graph.outputs[:at], iter(graph.outputs[at:])
    for call in calls:
        call.names = list(itertools.islice(names, len(call.arguments) + 2 * len(call.outputs)))
    if calls and complete:
        _Splicing(graph, tags, numbers).splice(calls)
    return graph


@contextmanager
def _exportable_products() -> Iterator[None]:
    """MLX cannot export the gradient of `mx.gather_mm` for sorted experts, a segmented product: replace it here."""
    own = mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, *rest: Any, sorted_indices: bool = False, **named: Any) -> mx.array:
        indices = named.get("rhs_indices")
        if not is_traced() or not sorted_indices or rest or set(named) - {"rhs_indices"} or indices is None:
            return own(a, b, *rest, sorted_indices=sorted_indices, **named)
        return with_backward(_sorted_product, _sorted_backward)(a, b, indices)

    def _sorted_product(a: mx.array, b: mx.array, indices: mx.array) -> mx.array:
        return own(a, b, rhs_indices=indices, sorted_indices=True)

    def _sorted_backward(primals: tuple, cotangent: mx.array, _: Any) -> tuple:  # as in mlx/primitives.cpp
        a, b, indices = primals
        of_a = own(cotangent, b.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=True)
        # Only the inputs and the shape of the segmented product matter, not its values: its rows are multiplied once.
        first = mx.zeros(b.shape[:-2], mx.uint32)
        left, right = cotangent.flatten(0, -2).swapaxes(0, 1)[None], a.flatten(0, -2)[None]
        of_b = own(left, right, lhs_indices=first, rhs_indices=first).swapaxes(-1, -2)
        return of_a.reshape(a.shape) if of_a.size == a.size else mx.zeros_like(a), of_b, mx.zeros_like(indices)

    mx.gather_mm = gather_mm
    try:
        yield
    finally:
        mx.gather_mm = own


def _call(forward: Callable, backward: Callable, arguments: tuple[mx.array, ...], tags) -> _Call:
    made = forward(*[mx.stop_gradient(array) for array in arguments])
    single = isinstance(made, mx.array)
    outputs = [mx.stop_gradient(array) for array in ([made] if single else [a for _, a in tree_flatten(made)])]
    total, argument_tags, result_tags, results = mx.array(0.0), [], [], []
    for array in arguments:
        floating = mx.issubdtype(array.dtype, mx.floating)
        argument_tags.append(next(tags) if floating else None)
        if floating:
            total = total + mx.maximum(array.reshape(-1).sum().astype(mx.float32), float(argument_tags[-1]))
    for array in outputs:
        result_tags.append(next(tags))
        link = mx.maximum(total, float(result_tags[-1]))
        results.append(array + mx.broadcast_to(link, array.shape).astype(array.dtype))
    return _Call(backward, list(arguments), outputs, results, single, argument_tags, result_tags)


class _Splicing:
    """Puts the vjps of calls into a graph."""

    def __init__(self, graph: Graph, tags, numbers):
        self.graph, self._tags, self._numbers = graph, tags, numbers
        self._readers: dict[str, list[Operation]] = {}
        for op in graph.operations:
            for name in op.inputs:
                self._readers.setdefault(name, []).append(op)
        self._tag_names = {}
        for name, array in graph.constants.items():
            if array.dtype == mx.float32 and array.size == 1 and array.ndim == 0 and not _is_traced(array):
                self._tag_names[array.item()] = name

    def splice(self, calls: list[_Call]) -> None:
        self._replace_forward(calls)
        renamed: dict[str, str] = {}
        for call in calls:
            arguments, _, results = _split(call)
            cotangents = [self._cotangent_of(*pair) for pair in zip(call.result_tags, results, strict=True)]
            expected = [self._expected(*pair) for pair in zip(call.argument_tags, arguments, strict=True)]
            if any(cotangents) and any(expected):
                renamed |= self._insert(call, arguments, results, cotangents, expected)
        operations = self.graph.operations
        for op in operations:
            op.inputs = [_final(renamed, name) for name in op.inputs]
        self.graph.outputs = [_final(renamed, name) for name in self.graph.outputs]
        self.graph.index()

    def _replace_forward(self, calls: list[_Call]) -> None:
        """Replace the links by one operation per call that passes on its outputs, as in MLX."""
        made = {name for call in calls for name in _split(call)[2]}
        self.graph.operations = [op for op in self.graph.operations if made.isdisjoint(op.outputs)]
        for call in calls:
            arguments, outputs, results = _split(call)
            inputs = [*outputs, *dict.fromkeys(arguments)]
            self.graph.operations.append(Operation("CustomTransforms", inputs, results, [next(self._numbers)]))

    def _mask(self, tag: int | None) -> Operation | None:
        """The product with the mask of the maximum with a tag, if a gradient passes through it."""
        name = self._tag_names.get(tag)
        above = next((op for op in self._readers.get(name, ()) if op.name == "Greater"), None)
        if above is None:
            return None
        op = above
        while op.name != "Multiply":
            op = self._readers[op.outputs[0]][0]
        return op

    def _cotangent_of(self, tag: int, result: str) -> str | None:
        product, graph = self._mask(tag), self.graph
        if product is None:
            return None
        masked = graph.makers.get(product.inputs[1])
        is_mask = masked is not None and masked.name in ("AsType", "Greater")
        name = product.inputs[0] if is_mask else product.inputs[1]
        while graph.shapes[name] != graph.shapes[result]:
            name = graph.makers[name].inputs[0]
        if graph.itemsizes[name] != graph.itemsizes[result]:
            name = graph.makers[name].inputs[0]
        return name

    def _expected(self, tag: int | None, argument: str) -> str | None:
        product, graph = self._mask(tag), self.graph
        if product is None:
            return None
        name = product.outputs[0]
        while graph.shapes[name] != graph.shapes[argument] or graph.itemsizes[name] != graph.itemsizes[argument]:
            name = self._readers[name][0].outputs[0]
        return name

    def _insert(self, call: _Call, arguments, results, cotangents, expected) -> dict[str, str]:
        """Trace the vjp and add it to the graph. Returns {the name of an expected cotangent: of the one computed}."""
        counts = len(arguments), len(results)

        def backward(*arrays: mx.array) -> list[mx.array]:
            primals, outputs, given = arrays[: counts[0]], arrays[counts[0] : sum(counts)], iter(arrays[sum(counts) :])
            by = [next(given) if name else mx.zeros_like(o) for name, o in zip(cotangents, outputs, strict=True)]
            primals = primals[0] if len(primals) == 1 else primals
            by, outputs = (by[0], outputs[0]) if call.single else (tuple(by), outputs)
            made = call.backward(primals, by, outputs)
            made = [made] if isinstance(made, mx.array) else list(made)
            return [array for array, name in zip(made, expected, strict=True) if name]

        given = [array for array, name in zip(call.results, cotangents, strict=True) if name]
        inputs = [_stand_in(array) for array in (*call.arguments, *call.results, *given)]
        part = _trace(backward, inputs, self._tags, self._numbers, complete=True)
        prefix = f"{next(self._numbers)}:"
        known = dict(zip(part.inputs, [*arguments, *results, *filter(None, cotangents)], strict=True))
        for name in part.shapes:
            if name not in known:
                known[name] = prefix + name
                self.graph.shapes[prefix + name] = part.shapes[name]
                self.graph.itemsizes[prefix + name] = part.itemsizes[name]
        for op in part.operations:
            op.inputs, op.outputs = [known[n] for n in op.inputs], [known[n] for n in op.outputs]
        self.graph.operations += part.operations
        self.graph.constants |= {known[name]: array for name, array in part.constants.items()}
        computed = [known[name] for name in part.outputs]
        return dict(zip(filter(None, expected), computed, strict=True))


def _split(call: _Call) -> tuple[list[str], list[str], list[str]]:
    count, made = len(call.arguments), len(call.outputs)
    return call.names[:count], call.names[count : count + made], call.names[count + made :]


def _final(renamed: dict[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _is_traced(array: mx.array) -> bool:
    """Whether an array has no value, because it is an argument of a function being traced."""
    try:
        array.item()
    except (ValueError, RuntimeError):
        return True
    return False


def _stand_in(array: mx.array) -> mx.array:
    return mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
