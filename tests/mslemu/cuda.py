"""The stand-in for ``mx.fast.cuda_kernel``, which MLX without CUDA refuses to make: the source is written here.

As MLX's ``backend/cuda/custom_kernel.cpp`` writes it: header and body between MLX's own includes, an input as a pointer
whatever its dimensions, its shape and their number by value where the body names them, template arguments as constants
in the body.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .compiler import build
from .dispatch import EmuError, dispatch, options
from .kernel import empty, from_numpy, standing_in, to_numpy
from .source import rewrite_threadgroup

TYPES = {
    **{getattr(mx, f"{sign}int{bits}"): f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
INCLUDES = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
MAX_DIMENSIONS = 10


class CudaKernel:
    """Called like the object that ``mx.fast.cuda_kernel`` returns; evaluates at once."""

    def __init__(self, name, input_names, output_names, source, header=""):
        self.name, self._inputs, self._outputs = name, input_names, output_names
        self._source, self._header = source, header

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=()):
        function = "custom_kernel_" + self.name + "".join(f"_{_short(value)}" for _, value in template)
        parameters, constants = [], []
        for name, array in zip(self._inputs, inputs, strict=True):
            parameters.append((f"const {TYPES[array.dtype]}*", name, to_numpy(array), False))
            if name + "_shape" in self._source:
                if not array.ndim:
                    raise EmuError(f"{function}: MLX passes a shape of {name} that it did not declare")
                # The rest is MLX's to fill: nobody may read it.
                shape = np.array([*array.shape, *[-(2**30)] * (MAX_DIMENSIONS - array.ndim)], np.int32)
                parameters.append(("const __grid_constant__ Shape", name + "_shape", shape, False))
            if name + "_ndim" in self._source:
                ndim = np.array([array.ndim], np.int32)
                parameters.append(("const __grid_constant__ int", name + "_ndim", ndim, False))
        for name, shape, dtype in zip(self._outputs, output_shapes, output_dtypes, strict=True):
            parameters.append((f"{TYPES[dtype]}*", name, empty(shape, dtype), True))
        for name, value in template:
            is_type = isinstance(value, mx.Dtype)
            constants.append(f"using {name} = {TYPES[value]};" if is_type else f"constexpr int {name} = {value};")
        signature = ",\n".join(f"    {type_} {name}" for type_, name, *_ in parameters)
        text = (
            f"{INCLUDES}{self._header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
            f"__global__ void {function}(\n{signature}) {{\n  " + "\n  ".join(constants) + "\n\n"
            f"{self._source}\n}}\n\n}} // namespace mlx::core::cu\n"
        )
        self.run(function, text, parameters, grid, threadgroup)
        results = [array for *_, array, is_output in parameters if is_output]
        return [from_numpy(result, dtype) for result, dtype in zip(results, output_dtypes, strict=True)]

    def run(self, function, text, parameters, grid, threadgroup) -> None:
        """Fill the outputs among ``parameters``, (type, name, array, is it an output?) each."""
        arguments = []
        for i, (type_, *_) in enumerate(parameters):
            by_value = {"Shape": "const mlx::core::cu::Shape*", "int": "const int*"}
            pointer = by_value.get(type_.rpartition(" ")[2], type_)
            arguments.append(f"{'' if pointer == type_ else '*'}({pointer})b[{i}]")
        built = build(
            rewrite_threadgroup(text, "__shared__", "MSL_SHARED")
            + '\n#line 1 "<entry>"\nextern "C" __attribute__((visibility("default"))) MSL_RT '
            + f"void msl_entry(void** b, msl_thread*) {{\n  mlx::core::cu::{function}({', '.join(arguments)});\n}}\n",
            options.instrument,
        )
        blocks = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
        whole = tuple(n * t for n, t in zip(blocks, threadgroup, strict=True))  # every block runs whole
        buffers = [(name, np.ascontiguousarray(array), output) for _, name, array, output in parameters]
        dispatch(built, self.name, buffers, whole, threadgroup)


def _short(value) -> str:
    return str(value).rpartition(".")[2]


@contextlib.contextmanager
def installed_cuda(kernel: type[CudaKernel] = CudaKernel, **changes) -> Iterator[None]:
    """MLX as on a machine with CUDA and without Metal, its custom kernels emulated. As ``installed``."""
    with standing_in(**changes):
        mx.fast.cuda_kernel = kernel
        mx.cuda.is_available, mx.metal.is_available = lambda: True, lambda: False
        yield
