"""Train mlx-lm's gated delta layers (Qwen3.5, Qwen3-Next, Kimi Linear, ...) in chunks instead of a loop.

Such a layer calls mlx-lm's ``gated_delta_update``, which computes the gates and, in training, calls ``gated_delta_ops``
for the loop over the tokens. Here the code of both runs as mlx-lm wrote it, with one global name of each replaced, so
that the last call reaches ``delta_rule.gated_delta``. mlx-lm's modules and other models are unchanged.
"""

from __future__ import annotations

import functools
import inspect
import sys

import mlx.nn as nn

from .delta_rule import gated_delta
from .global_names import with_global
from .shared_input import SharesInput
from .swap import plain_class

_MODULE, _UPDATE, _OPS = "mlx_lm.models.gated_delta", "gated_delta_update", "gated_delta_ops"


def has_gated_delta(module: nn.Module) -> bool:
    """Whether a method of the module's class calls a function named as mlx-lm's."""
    return _calls_update(plain_class(module))


@functools.cache
def _calls_update(kind: type) -> bool:
    return any(
        _UPDATE in method.__code__.co_names
        for owner in kind.__mro__
        for method in vars(owner).values()
        if inspect.isfunction(method)
    )


def obstacle(module: nn.Module) -> str | None:
    """Why a module with a gated delta rule cannot train in chunks; None if it can."""
    call = plain_class(module).__call__
    if not inspect.isfunction(call) or _UPDATE not in call.__code__.co_names:
        return f"its class does not call {_UPDATE} in __call__"
    update, ops = (getattr(sys.modules.get(_MODULE), name, None) for name in (_UPDATE, _OPS))
    if not inspect.isfunction(update) or call.__globals__.get(_UPDATE) is not update:
        return f"{call.__module__}.{_UPDATE} is not the function of {_MODULE}"
    if _OPS not in update.__code__.co_names or not _takes_the_same(ops):
        return f"this version of mlx-lm has another {_MODULE}"
    return None


def _takes_the_same(ops: object) -> bool:
    return inspect.isfunction(ops) and list(inspect.signature(ops).parameters) == list(
        inspect.signature(gated_delta).parameters
    )


class _InChunks:
    def __call__(self, *args, **kwargs):
        if not self._training:
            return super().__call__(*args, **kwargs)
        call = plain_class(self).__call__
        update = with_global(call.__globals__[_UPDATE], _OPS, gated_delta)
        return with_global(call, _UPDATE, update)(self, *args, **kwargs)


class ChunkedDelta(SharesInput, _InChunks):
    """Mixin for a module with a gated delta rule."""
