"""Finds the kernels' sources, assembles and caches the kernels. Nothing else calls ``mx.fast.metal_kernel``.

A file ``metal/NAME.metal`` opens with ``//`` comments, followed by ``//@include OTHER``, ``//@header`` (functions) and
``//@body`` (the kernel; MLX writes its signature). ``MLX_LORA_KERNELS`` decides whether kernels are used:

- ``auto``: if MLX computes on Metal. Building a token's graph takes no longer with the kernels than with plain
  operations (``mlx-lora bench kernels``, host us), and it holds fewer launches. On CUDA, the kernels in
  ``TAKEN_ON_CUDA``.
- ``off``: never.
- ``on``: all of them on CUDA too, where the same source, rewritten by ``cuda.py``, has not run on a GPU yet; and, on a
  machine with neither, while a graph is traced to count its launches.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ..device import is_assumed_gpu
from ..errors import ConfigError
from . import cuda

_HERE = Path(__file__).resolve()
_differentiable = True
# metal/ is inside the package in a wheel, and next to the package in a checkout.
_FOLDERS = (_HERE.parents[1] / "metal", _HERE.parents[2] / "metal")


# Kernels that ``auto`` takes on CUDA: name -> the report in scripts/benchmarks/reports/ in which all kernel tests pass
# on a GPU and the kernel is at least as fast as plain operations at all sizes. A test reads that report. Empty so far,
# because nobody has run ``scripts/check_gpu`` on CUDA.
TAKEN_ON_CUDA: dict[str, str] = {}


def enabled(*kernels: str) -> bool:
    """Whether operations use these kernels now; without names, whether they use any.

    Raises ConfigError for an unknown MLX_LORA_KERNELS.
    """
    wanted = os.environ.get("MLX_LORA_KERNELS") or "auto"
    if wanted not in ("auto", "off", "on"):
        raise ConfigError(f"MLX_LORA_KERNELS is {wanted!r}", "Set it to auto, off or on.")
    if wanted != "auto":
        return wanted == "on"
    if is_assumed_gpu():
        return True
    if mx.default_device().type != mx.DeviceType.gpu:
        return False
    if _on_cuda():
        return bool(TAKEN_ON_CUDA) and TAKEN_ON_CUDA.keys() >= set(kernels)
    return mx.metal.is_available()


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """A context in which operations have no custom backward pass, which ``mx.export_function`` cannot record.

    MLX then refuses to differentiate a kernel. Used to export a model, and to count its launches.
    """
    global _differentiable
    before, _differentiable = _differentiable, False
    try:
        yield
    finally:
        _differentiable = before


def with_backward(forward: Callable, backward: Callable) -> Callable:
    """``forward`` as an operation whose vjp is ``backward(primals, cotangents, outputs)``."""
    differentiable = mx.custom_function(forward)
    differentiable.vjp(backward)

    @functools.wraps(forward)
    def operation(*arrays):
        if (tracer := _tracer.get()) is not None:
            return tracer(forward, backward, arrays)
        return (differentiable if _differentiable else forward)(*arrays)

    return operation


# While a plan traces a step: called as tracer(forward, backward, arrays) instead of an operation with a custom vjp.
_tracer: ContextVar[Callable | None] = ContextVar("tracer", default=None)


@contextlib.contextmanager
def traced_by(tracer: Callable) -> Iterator[None]:
    """A context in which ``tracer`` replaces operations with custom vjps, which MLX cannot export."""
    token = _tracer.set(tracer)
    try:
        yield
    finally:
        _tracer.reset(token)


def is_traced() -> bool:
    """Whether the code runs within ``traced_by``, in this thread."""
    return _tracer.get() is not None


def _as_list(arrays: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(arrays)] if not isinstance(arrays, mx.array) else [arrays]


def checkpointed(function: Callable) -> Callable:
    """`mx.checkpoint`: the backward pass computes ``function`` again from its arguments, which are all that is kept."""

    def operation(*args: Any, **kwargs: Any) -> Any:
        tracer = _tracer.get()
        if tracer is None:
            return mx.checkpoint(function)(*args, **kwargs)
        given = tree_flatten((args, kwargs))
        places = [i for i, (_, leaf) in enumerate(given) if isinstance(leaf, mx.array)]

        def forward(*arrays: mx.array) -> Any:
            known, at = dict(zip(places, arrays, strict=True)), itertools.count()
            some, named = tree_map(lambda leaf: known.get(next(at), leaf), (args, kwargs))
            return function(*some, **named)

        def backward(primals, cotangents, outputs):  # as in mlx/transforms.cpp
            primals, outputs = (_as_list(arrays) for arrays in (primals, outputs))
            floats = [i for i, array in enumerate(primals) if mx.issubdtype(array.dtype, mx.floating)]
            late = mx.depends(primals, outputs)

            def again(*values: mx.array) -> Any:
                arrays = list(late)
                for i, value in zip(floats, values, strict=True):
                    arrays[i] = value
                return forward(*arrays)

            found = mx.vjp(again, [late[i] for i in floats], _as_list(cotangents))[1]
            gradients = dict(zip(floats, found, strict=True))
            return tuple(gradients.get(i, mx.zeros_like(array)) for i, array in enumerate(primals))

        return tracer(forward, backward, tuple(given[i][1] for i in places))

    return operation


@functools.cache
def with_reference(kernel: Callable, reference: Callable, names: tuple[str, ...], form: Any, metal: bool) -> Callable:
    """An operation on the arrays ``names`` that runs ``kernel`` forward and differentiates ``reference`` backward.

    Both are called as ``f(names, form, *arrays)``. Without ``metal`` the operation is the reference. The gradient of an
    integer array is zeros.
    """
    if not metal:
        return functools.partial(reference, names, form)

    def backward(primals, cotangent, _):
        known = dict(zip(names, primals, strict=True))
        floats = [n for n in names if mx.issubdtype(known[n].dtype, mx.floating)]

        def forward(*values):
            return reference(names, form, *(known | dict(zip(floats, values, strict=True))).values())

        gradients = mx.vjp(forward, [known[n] for n in floats], [cotangent])[1]
        found = dict(zip(floats, gradients, strict=True))
        return tuple(found[n] if n in found else mx.zeros_like(known[n]) for n in names)

    return with_backward(functools.partial(kernel, names, form), backward)


def maker() -> Callable:
    """MLX's function that makes a kernel from source on this device, or an emulator's that replaces it."""
    return mx.fast.cuda_kernel if _on_cuda() else mx.fast.metal_kernel


def _on_cuda() -> bool:
    return mx.cuda.is_available() and not mx.metal.is_available()


class Launch:
    """A kernel ready to run: everything is fixed except the input arrays and the output's shape.

    Args:
        name: of ``metal/name.metal``.
        inputs: the names the source uses for its arrays, in the order of the call.
        output: its name and dtype.
        defines: preprocessor definitions, ``NAME`` or ``NAME VALUE``.
        constants: types and integers the kernel is compiled for.
        groups: threadgroups. threadgroup: threads in each.
    """

    def __init__(
        self,
        name: str,
        inputs: tuple[str, ...],
        output: tuple[str, mx.Dtype],
        *,
        defines: tuple[str, ...] = (),
        constants: dict[str, mx.Dtype | int],
        groups: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ):
        self._run = functools.partial(
            _kernel(name, inputs, output[0], defines, tuple(constants.items()), maker()),
            grid=tuple(g * t for g, t in zip(groups, threadgroup, strict=True)),
            threadgroup=threadgroup,
            output_dtypes=[output[1]],
        )

    def __call__(self, inputs: list[mx.array], shape: tuple[int, ...]) -> mx.array:
        """Run it on Metal or CUDA. ``shape``: of the output.

        Raises: ConfigError: MLX has neither on this machine, or computes on the CPU.
        """
        try:
            return self._run(inputs=inputs, output_shapes=(shape,))[0]
        except (RuntimeError, ValueError) as error:
            if "No Metal" in str(error) or "Only supports the GPU" in str(error):
                message = "MLX_LORA_KERNELS=on, but MLX computes on neither Metal nor CUDA here"
                raise ConfigError(message, "Set it to auto or off.") from None
            raise


_METAL_TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
_CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}


@functools.cache
def _kernel(name, inputs, output, defines, constants, make):
    header, body = source(name)
    # Constants are written into the source: MLX's own `template` argument costs 2 microseconds a call.
    types = _CUDA_TYPES if _on_cuda() else _METAL_TYPES
    lines = [
        f"using {n} = {types[v]};" if isinstance(v, mx.Dtype) else f"constexpr int {n} = {v};" for n, v in constants
    ]
    body = "\n" + " ".join(lines) + "\n" + body
    header = "".join(f"#define {d}\n" for d in defines) + header
    # MLX caches kernels by name, so everything that changes the source is part of the name.
    values = [f"{n}{str(v).rpartition('.')[2]}" for n, v in constants]
    variant = "_".join([*inputs, *(d.replace(" ", "") for d in defines), *values])
    if _on_cuda():
        header = f'#line 1 "cuda.h"\n{_file("cuda.h").read_text(encoding="utf-8")}{cuda.translate(header)}'
        body = cuda.translate(body)
    return make(
        name=f"mlx_lora_{name}_{variant}",
        input_names=list(inputs),
        output_names=[output],
        header=header,
        source=body,
    )


def _file(name: str) -> Path:
    path = next((f / name for f in _FOLDERS if (f / name).exists()), None)
    if path is None:
        raise ConfigError(f"the kernels' source {name} is missing", "Install mlx-lora again.")
    return path


@functools.cache
def source(name: str) -> tuple[str, str]:
    """(header, body) of ``metal/name.metal``, with its includes in the header. Compiler errors name its own lines."""
    path = _file(f"{name}.metal")
    parts: dict[str, list[str]] = {}
    header, part = "", None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("//@include "):
            header += source(line.split()[1])[0]
        elif line.startswith("//@"):
            part = parts[line[3:].strip()] = [f'#line {number + 1} "{path.name}"']
        elif part is not None:
            part.append(line)
    return header + "\n".join(parts["header"]) + "\n", "\n".join(parts.get("body", [])) + "\n"
