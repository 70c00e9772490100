"""Many adapters on one model at once, each row of a batch with its own. The base is read once for all of them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..adapter import Adapter, raise_faults
from ..base.modules import base_dtype, dims, kind, model_dtype
from ..errors import AdapterError
from ..fast import accelerate
from ..layers import MultiLoRALinear, Rows
from .attach import adapters_on
from .state import bare_modules


class MultiLoRA:
    """LoRA adapters mounted together on ``model``; ``choose`` says which row takes which.

    Raises:
        AdapterError: an adapter that is no LoRA, does not fit, or adapts what is no linear layer. The model is then
            as it was.
    """

    def __init__(self, model: nn.Module, adapters: dict[str, Adapter]):
        if adapters_on(model):
            raise AdapterError("the model has an adapter already", "Take it off with unmount(model).")
        if not adapters:
            raise AdapterError("no adapters are given", "Give at least one, by name.")
        modules = bare_modules(model)
        self._names, self._rows, self._model = list(adapters), Rows(), model
        raise_faults(_faults(modules, adapters), "Serve it by itself, or fuse it.")
        paths = list(dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules))
        self._bases = {path: modules[path] for path in paths}
        layers = {path: self._layer(path, list(adapters.values())) for path in paths}
        for layer in layers.values():
            layer.train(model.training)
        model.update_modules(tree_unflatten(list(layers.items())))
        accelerate(model)

    def choose(self, names: list[str | None]) -> None:
        """The adapter of each row of the next batches; None for the base. One name serves all rows.

        Raises: AdapterError: an unknown name.
        """
        known = f"Give a name, or None, for each row of the batch. Known: {', '.join(self._names)}."
        if not names:
            raise AdapterError("no adapter is chosen", known)
        if unknown := sorted({name for name in names if name is not None and name not in self._names}):
            raise AdapterError(f"no adapter named {', '.join(unknown)}", known)
        self._rows.index = mx.array([-1 if n is None else self._names.index(n) for n in names], mx.int32)

    def unmount(self) -> None:
        """Take them all off the model."""
        self._model.update_modules(tree_unflatten(list(self._bases.items())))

    def _layer(self, path: str, adapters: list[Adapter]) -> MultiLoRALinear:
        base = self._bases[path]
        inputs, outputs = dims(base)
        pairs = [self._pair(adapter, path, inputs, outputs) for adapter in adapters]
        ranks = [a.shape[-1] for a, _ in pairs]
        dtype, width = base_dtype(base) or model_dtype(self._model), max(ranks)
        a = mx.stack([mx.pad(a.astype(dtype), [(0, 0), (0, width - a.shape[-1])]) for a, _ in pairs])
        b = mx.stack([mx.pad(b.astype(dtype), [(0, width - b.shape[0]), (0, 0)]) for _, b in pairs])
        scale = mx.array([adapter.config.scale_of(path) for adapter in adapters], mx.float32)
        mx.eval(a, b)
        return MultiLoRALinear(base, a, b, scale, mx.array(ranks, mx.int32), self._rows)

    @staticmethod
    def _pair(adapter: Adapter, path: str, inputs: int, outputs: int) -> tuple[mx.array, mx.array]:
        if path not in adapter.modules:  # of rank 0
            return mx.zeros((inputs, 0)), mx.zeros((0, outputs))
        return adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]


def _faults(modules: dict[str, nn.Module], adapters: dict[str, Adapter]) -> list[str]:
    faults = []
    for name, adapter in adapters.items():
        if adapter.config.method != "lora":
            faults.append(f"{name}: is {adapter.config.method}, not lora")
            continue
        more = {
            "lora_bias": adapter.config.lora_bias,
            "trained tokens": adapter.tokens,
            "whole parameters": adapter.whole,
        }
        if more := [what for what, there in more.items() if there]:
            faults.append(f"{name}: has {' and '.join(more)} beside its matrices")
        for path in adapter.modules:
            module = modules.get(path)
            if module is None or kind(module) != "linear":
                faults.append(f"{name}: {path} is no linear layer of this model")
                continue
            a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
            rows, columns = dims(module)
            if (a.shape[0], b.shape[-1]) != (rows, columns):
                faults.append(f"{name}: {path} is {a.shape[0]} x {b.shape[-1]}, the model's {rows} x {columns}")
    return faults
