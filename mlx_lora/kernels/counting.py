"""Launches counted without running: the primitives in the graph of a function that reach the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mlx.core as mx

from .registry import exportable

# Views of what is there: no kernel runs for these.
_FREE = """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Full NumberOfElements
    Reshape Slice Split Squeeze StopGradient Transpose Unflatten View"""


def launches(f: Callable, *args: mx.array) -> Counter[str]:
    """How often ``f(*args)`` launches each primitive, by MLX's name. Nothing is evaluated.

    A kernel of ours is a ``CustomKernel``; under ``MLX_LORA_KERNELS=on`` they are counted without Metal too.
    """
    found: Counter[str] = Counter()

    def record(entry):
        if entry.get("type") == "primitive" and entry["name"] not in free:
            found[entry["name"]] += 1

    free = set(_FREE.split())
    with exportable():
        mx.export_function(record, f, *args)
    return found
