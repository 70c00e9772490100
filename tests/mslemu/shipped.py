"""The kernels in MLX's own wheel, unmodified: what shows that the emulator is faithful."""

from __future__ import annotations

import numpy as np

from .compiler import build
from .dispatch import Stats, dispatch
from .source import entry, flatten, parameters, translate


def mlx_kernel(
    header: str,
    function: str,
    template: str,
    buffers: list[tuple[int, str, np.ndarray, bool]],
    groups: tuple[int, ...],
    threadgroup: tuple[int, ...],
    *,
    before: tuple[str, ...] = (),
    defines: str = "",
    constants: dict[str, int] | None = None,
    **options,
) -> Stats:
    """Run ``function<template>`` of a header in ``mlx/backend/metal/kernels``.

    Args:
        buffers: (index, name, array, is it an output?); outputs are filled in place.
        groups: threadgroups.
        before: headers it needs, in order. defines: source before all. constants: its function constants.
        options: fields of ``dispatch.Options``.
    """
    seen: set[str] = set()
    headers = [flatten("mlx/backend/metal/kernels/" + h, seen) for h in ("utils.h", *before, header)]
    source = translate("#include <metal_stdlib>\n" + defines + "".join(headers), constants)
    built = build(source + entry(function, template, parameters(source, function)))
    given = {index: (name, array, output) for index, name, array, output in buffers}
    unused = np.zeros(1, np.uint8)
    ordered = [given.get(i, (f"unused{i}", unused, False)) for i in range(1 + max(given))]
    grid = tuple(g * t for g, t in zip(groups, threadgroup, strict=True))
    return dispatch(built, function + template, ordered, grid, threadgroup, **options)
