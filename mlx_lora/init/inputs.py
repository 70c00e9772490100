"""Recording the inputs of layers in a forward pass. The layers' classes are changed for the duration of the pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def record_inputs(model: nn.Module, modules: dict[str, nn.Module], tokens: Any) -> dict[str, mx.array]:
    """The input of each of ``modules`` when ``model`` reads all but the last of ``tokens`` [B, T]: [B, T-1, ...]."""
    found: dict[str, mx.array] = {}
    classes = {path: type(module) for path, module in modules.items()}

    def recording(path: str, kind: type) -> type:
        def __call__(self, x, *args, **kwargs):
            found[path] = x
            return kind.__call__(self, x, *args, **kwargs)

        return type(kind.__name__, (kind,), {"__call__": __call__})

    training = model.training
    model.eval()
    try:
        for path, module in modules.items():
            module.__class__ = recording(path, classes[path])
        mx.eval(model(mx.array(tokens)[:, :-1]))
    finally:
        for path, module in modules.items():
            module.__class__ = classes[path]
        model.train(training)
    mx.eval(found)
    return {path: found[path] for path in modules if path in found}
