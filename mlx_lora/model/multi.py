"""Several LoRA adapters on one model, one per row of a batch. All share the base in memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..adapter import Adapter, raise_faults
from ..base.fingerprint import Fingerprint
from ..base.modules import base_dtype, dims, frozen_parameters, kind, model_dtype, restore_frozen
from ..base.origin import base_of
from ..errors import AdapterError
from ..fast import accelerate, undo
from ..layers import MultiLoRALinear, Rows
from .attach import adapters_on
from .compatibility import incompatibilities, warn_of_another_base
from .state import (
    HEAD,
    bare_modules,
    join_head,
    mark_changed,
    module_at,
    place,
    set_mode,
    split_head,
    split_of,
    state_of,
)


class MultiLoRA:
    """LoRA adapters mounted together on ``model``. ``choose`` selects the adapter of each row.

    Raises: AdapterError: an adapter is not LoRA, cannot be mounted on this model, or adapts other layers than linears.
        The model is then unchanged.
    """

    def __init__(self, model: nn.Module, adapters: dict[str, Adapter]):
        if adapters_on(model) or state_of(model) is not None:
            raise AdapterError("the model has an adapter already", "Remove it with unmount(model).")
        if not adapters:
            raise AdapterError("no adapters are given", "Give at least one, by name.")
        self._names, self._rows, self._model = list(adapters), Rows(), model
        if any(HEAD in adapter.modules for adapter in adapters.values()):
            split_head(model)
        modules = bare_modules(model)
        try:
            _check(model, adapters)
        except AdapterError:
            join_head(model)
            raise
        paths = list(dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules))
        self._bases = {path: modules[path] for path in paths}
        self._frozen = frozen_parameters(model)
        self._layers = {path: self._layer(path, list(adapters.values())) for path in paths}
        self._accelerated: list[nn.Module] = []
        self.mount()
        here, base = Fingerprint.of(modules), base_of(model)
        for adapter in adapters.values():
            warn_of_another_base(adapter, here, base)

    @property
    def names(self) -> list[str]:
        return list(self._names)

    @property
    def mounted(self) -> bool:
        """Whether the adapters' layers are on the model."""
        return any(module_at(self._model, path) is layer for path, layer in self._layers.items())

    def mount(self) -> None:
        """Put the adapters back on the model after ``unmount``. Does nothing if they are already on it.

        Raises: AdapterError: another adapter is on the model.
        """
        model = self._model
        if self.mounted:
            return
        if adapters_on(model) or state_of(model) is not None:
            raise AdapterError("the model has an adapter already", "Remove it with unmount(model).")
        if HEAD in self._layers:
            split_head(model)
        for layer in self._layers.values():
            set_mode(layer, model.training)
        place(model, self._layers)
        try:
            self._accelerated = accelerate(model)
        except BaseException:
            self.unmount()
            raise
        mark_changed(model)

    def choose(self, names: list[str | None]) -> None:
        """Set the adapter of each row of the next batches, None for the base. A single name applies to all rows.

        Raises: AdapterError: an unknown name.
        """
        hint = f"Give a name, or None, for each row of the batch. Known: {', '.join(self._names)}."
        if not names:
            raise AdapterError("no adapter is chosen", hint)
        if unknown := sorted({name for name in names if name is not None and name not in self._names}):
            raise AdapterError(f"no adapter named {', '.join(unknown)}", hint)
        mark_changed(self._model)
        self._rows.choose([-1 if n is None else self._names.index(n) for n in names])

    def unmount(self) -> None:
        """Remove all adapters from the model. Does nothing if they were removed before."""
        if not self.mounted:
            return
        place(self._model, self._bases)
        join_head(self._model)
        mark_changed(self._model)
        undo(self._accelerated)
        restore_frozen(self._frozen)

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
        if path not in adapter.modules:  # rank 0
            return mx.zeros((inputs, 0)), mx.zeros((0, outputs))
        return adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]


def why_alone(model: nn.Module, adapter: Adapter) -> list[str]:
    """Why ``adapter`` cannot share a batch with other adapters; empty if it can.

    Raises: AdapterError: it is not for ``model``.
    """
    trained = {name.rpartition(".")[0] for name in adapter.full_parameters}
    was_split = split_of(model) is not None
    if HEAD in (*adapter.modules, *trained, *adapter.tokens):
        split_head(model)
    try:
        return _why_alone(model, adapter)
    finally:
        if not was_split:
            join_head(model)


def _why_alone(model: nn.Module, adapter: Adapter) -> list[str]:
    faults, hint = incompatibilities(model, adapter)
    raise_faults(faults, hint)
    if adapter.config.method != "lora":
        return [f"its method is {adapter.config.method}, not lora"]
    besides = {
        "lora_bias": adapter.config.lora_bias,
        "trained tokens": adapter.tokens,
        "full parameters": adapter.full_parameters,
    }
    besides = [what for what, present in besides.items() if present]
    found = [f"has {' and '.join(besides)} besides its low-rank matrices"] if besides else []
    modules = bare_modules(model)
    return found + [f"{path} is not a linear layer" for path in adapter.modules if kind(modules[path]) != "linear"]


def _check(model: nn.Module, adapters: dict[str, Adapter]) -> None:
    """Refuse adapters that are not for ``model``, or that contain more than LoRA of linear layers."""
    alone = []
    for name, adapter in adapters.items():
        try:
            alone += [f"{name}: {reason}" for reason in why_alone(model, adapter)]
        except AdapterError as error:
            raise AdapterError(
                "\n".join(f"{name}: {line}" for line in error.message.splitlines()), error.hint
            ) from None
    raise_faults(alone, "Mount this adapter by itself, or fuse it.")
