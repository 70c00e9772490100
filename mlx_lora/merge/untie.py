"""Give a model with a tied output head its own head, if its class can have one.

mlx-lm's classes read ``tie_word_embeddings`` from their arguments or keep it as an attribute; some (Gemma, GPT-2)
never have a separate head. Whether the class uses the new head is found by running the model.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ..base.heads import FLAG
from ..base.origin import base_of, set_base
from ..model.state import HEAD


def untie(model: nn.Module, head: nn.Module) -> bool:
    """Make ``head`` the output head of ``model``. Returns False, and changes nothing, if the model does not use it."""
    owner = model
    while isinstance(owner.get("language_model"), nn.Module):
        owner = owner["language_model"]
    flags = [
        holder for holder in (getattr(owner, "args", None), owner) if isinstance(getattr(holder, FLAG, None), bool)
    ]
    for holder in flags:
        setattr(holder, FLAG, False)
    owner[HEAD] = probe = _Probe(head)
    with contextlib.suppress(Exception):  # an error of a model that needs further inputs
        model(mx.zeros((1, 1), mx.int32))  # the result is never evaluated
    if not probe.called:
        del owner[HEAD]
        for holder in flags:
            setattr(holder, FLAG, True)
        return False
    owner[HEAD] = head
    if (base := base_of(model)) is not None:
        config = {**base.config, FLAG: False}
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], FLAG: False}
        set_base(model, replace(base, config=config))
    return True


class _Probe(nn.Module):
    """Records whether the layer is called."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.called = layer, False

    def __call__(self, x: mx.array) -> mx.array:
        self.called = True
        return self.layer(x)
