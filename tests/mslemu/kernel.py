"""The stand-in for ``mx.fast.metal_kernel``. MLX generates the source; it is captured from an export of the call."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .compiler import build
from .dispatch import dispatch, options
from .source import entry, parameters, preamble, translate

_metal_kernel = mx.fast.metal_kernel
_STOOD_IN_FOR = [
    (mx.fast, "metal_kernel"),
    (mx.fast, "cuda_kernel"),
    (mx.metal, "is_available"),
    (mx.cuda, "is_available"),
]


def to_numpy(array: mx.array) -> np.ndarray:
    """bfloat16 as the bits in a uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


def empty(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None = None) -> np.ndarray:
    return np.array(to_numpy(mx.full(shape, 0 if value is None else value, dtype)))


class EmulatedKernel:
    """Called like the object that ``mx.fast.metal_kernel`` returns; evaluates at once."""

    def __init__(self, name, input_names, output_names, source, header="", ensure_row_contiguous=True, **rest):
        self._name, self._inputs, self._outputs = name, input_names, output_names
        self._kernel = _metal_kernel(
            name=name,
            input_names=input_names,
            output_names=output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            **rest,
        )

    def __call__(self, *, inputs, output_shapes, output_dtypes, template=None, init_value=None, stream=None, **launch):
        inputs = [i if isinstance(i, mx.array) else mx.array(i) for i in inputs]
        call = {"output_shapes": output_shapes, "output_dtypes": output_dtypes, **launch}
        if template:
            call["template"] = template
        try:
            mx.eval(inputs)
        except ValueError:  # a graph is recorded, to count its launches: MLX's own kernel stands in it
            return self._kernel(inputs=inputs, **call)
        function, source, grid, group, shape_infos, contiguous = self._capture(inputs, call)
        arguments = ""
        # The last line instantiates the template.
        last = r"\ntemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;\s*$"
        if found := re.search(last, source, re.S):
            arguments, source = found.group(1)[len(function) :], source[: found.start()] + "\n"
        text = preamble() + f'\n#line 1 "{self._name}"\n' + translate(source)
        built = build(text + entry(function, arguments, parameters(source, function)), options.instrument)
        buffers = []
        for name, array, infos in zip(self._inputs, inputs, shape_infos, strict=True):
            buffers += self._input(name, array, infos, contiguous)
        results = [empty(s, d, init_value) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        buffers += [(name, result, True) for name, result in zip(self._outputs, results, strict=True)]
        stats = dispatch(built, self._name, buffers, grid, group, init_value is not None)
        if contiguous:
            stats.copied = [n for n, a in zip(self._inputs, inputs, strict=True) if not to_numpy(a).flags.c_contiguous]
        return [from_numpy(result, dtype) for result, dtype in zip(results, output_dtypes, strict=True)]

    def _capture(self, inputs, call):
        """MLX's own source, grid and flags for this call."""
        found = []
        mx.export_function(
            lambda item: found.append(item) if item.get("name") == "CustomKernel" else None,
            lambda *arrays: self._kernel(inputs=list(arrays), **call),
            *inputs,
        )
        (primitive,) = found
        a = primitive["arguments"]
        return a[0], a[1], tuple(a[2:5]), tuple(a[5:8]), a[8], a[9]

    @staticmethod
    def _input(name, array, infos, contiguous):
        value = to_numpy(array)
        if contiguous:
            value = np.ascontiguousarray(value)
        yield name, value.ravel(order="K"), False  # the memory as it lies; the strides describe it
        if array.ndim:
            shape, strides, ndim = infos
            if shape:
                yield name + "_shape", np.array(array.shape, np.int32), False
            if strides:
                yield name + "_strides", np.array([s // value.itemsize for s in value.strides], np.int64), False
            if ndim:
                yield name + "_ndim", np.array(array.ndim, np.int32), False


@contextlib.contextmanager
def installed(**changes) -> Iterator[None]:
    """Emulate every Metal kernel that is made meanwhile. ``changes``: fields of ``dispatch.Options``.

    An emulated kernel computes when it is called: ``mx.compile`` is off meanwhile, ``mx.grad`` and ``mx.checkpoint``
    work, ``mx.vmap`` does not.
    """
    with standing_in(**changes):
        mx.fast.metal_kernel, mx.cuda.is_available = EmulatedKernel, lambda: False
        yield


@contextlib.contextmanager
def standing_in(**changes) -> Iterator[None]:
    """What is put in the place of MLX's functions meanwhile is taken away again."""
    before, functions = dict(vars(options)), [(o, n, getattr(o, n)) for o, n in _STOOD_IN_FOR]
    vars(options).update(changes)
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
        for owner, name, function in functions:
            setattr(owner, name, function)
        vars(options).update(before)
