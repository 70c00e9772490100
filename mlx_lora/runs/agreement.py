"""Check that all processes of a distributed run train the same thing: otherwise they would hang or diverge."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import __version__
from ..base.fingerprint import digest
from ..errors import ConfigError
from ..training import TrainingState
from .group import group
from .identity import flat

# Paths may differ from machine to machine. The files' contents are compared by hash.
_PATHS = ("settings.model", "settings.init_reference", "settings.data.data", "start.file")


def check_agreement(identity: dict[str, Any], model: nn.Module, state: TrainingState | None) -> None:
    """Compare this process's run with that of every other process.

    Args:
        identity: see ``identity.py``. model: with its adapter. state: the training state to continue from.

    Raises: ConfigError: they differ. Every process raises the same error, which lists every difference.
    """
    everyone = group()
    if everyone.size() == 1:
        return
    facts = {name: value for name, value in flat(identity).items() if name not in _PATHS}
    if state is not None:
        arrays = {"parameters": state.parameters, "optimizer": state.optimizer, "pending": state.pending}
        facts |= {"iteration to continue from": state.iteration, "training state": digest(arrays)}
    else:
        facts["initial adapter"] = digest(model.trainable_parameters())
    facts |= {"mlx-lora": __version__, **{name: _version(name) for name in ("mlx", "mlx-lm")}}
    every = _gather(json.dumps(facts, sort_keys=True, default=str), everyone)
    first, *others = map(json.loads, every)
    names = dict.fromkeys(name for facts in (first, *others) for name in facts)
    faults = [
        f"{name}: {first.get(name)} on rank 0, {found.get(name)} on rank {rank}"
        for rank, found in enumerate(others, 1)
        for name in names
        if first.get(name) != found.get(name)
    ]
    if faults:
        raise ConfigError(
            "\n".join(["The processes of this run would not train the same:", *faults[:20]]),
            "Use the same versions, model, data and options on every machine. To resume, copy the run's folder from "
            "rank 0, which writes it, to the others.",
        )


def _gather(text: str, everyone: Any) -> list[str]:
    """The ``text`` of every process, by rank."""
    data = text.encode()
    longest = mx.distributed.all_max(mx.array(len(data)), group=everyone).item()
    rows = mx.distributed.all_gather(mx.array(list(data.ljust(longest)), mx.uint8)[None], group=everyone)
    return [bytes(row).decode() for row in rows.tolist()]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
