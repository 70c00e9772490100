"""Initialisations of LoRA's A and B other than the default (A uniform, B = 0), and the table of them.

A new initialisation is a file here with ``initial_pairs(request)`` and a row of ``INITS``. The files compute arrays;
``model.attach`` creates the layers and sets the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..adapter import explicit_config, raise_faults
from ..base.decompositions import Pair
from ..base.forward_paths import as_generated
from ..base.modules import kind
from ..config import AdapterConfig
from ..errors import ConfigError
from ..layers import AdapterLayer
from . import eva, gaussian, loftq, lora_ga, olora, orthogonal, pissa
from .request import Request


@dataclass(frozen=True)
class Init:
    """One initialisation.

    Args:
        initial_pairs: computes (A [.., r, in], B [.., out, r]) by module path.
        kinds: the kinds of layers it can initialise, as in ``base.modules.kind``.
        needs_batches: it reads training data.
        needs_reference: it compares with the model before quantization.
        subtracted: its initial update is not zero, so the layer subtracts it again (layers/difference.py).
        chooses_ranks: the ranks of its pairs replace the config's, and modules without a pair get no adapter.
    """

    initial_pairs: Callable[[Request], dict[str, Pair]]
    kinds: tuple[str, ...] = ("linear", "switch")
    needs_batches: bool = False
    needs_reference: bool = False
    subtracted: bool = False
    chooses_ranks: bool = False


INITS = {
    "gaussian": Init(gaussian.initial_pairs, kinds=("linear", "embedding", "switch")),
    "orthogonal": Init(orthogonal.initial_pairs),
    "pissa": Init(pissa.initial_pairs, subtracted=True),  # and pissa_niter_N
    "olora": Init(olora.initial_pairs, subtracted=True),
    "loftq": Init(loftq.initial_pairs, needs_reference=True),
    "eva": Init(eva.initial_pairs, kinds=("linear",), needs_batches=True, chooses_ranks=True),
    "lora_ga": Init(lora_ga.initial_pairs, kinds=("linear",), needs_batches=True, subtracted=True),
}
DEFAULT = Init(lambda _: {}, kinds=("linear", "embedding", "switch"))  # layers keep the values they are created with
FROM_DATA = tuple(name for name, row in INITS.items() if row.needs_batches)
SUBTRACTED = tuple(name for name, row in INITS.items() if row.subtracted)


def init_of(config: AdapterConfig) -> Init:
    """The table's row for ``config.init``."""
    return INITS.get(config.init.partition("_niter_")[0], DEFAULT)


def initial_pairs(request: Request) -> dict[str, Pair]:
    """(A [.., r, in], B [.., out, r]) by module path, for the modules whose layers do not keep their default values.

    Raises: ConfigError, AdapterError, DataError: something that the initialisation needs is missing or unsuitable.
    """
    row, name = init_of(request.config), request.config.init
    if row.needs_reference != (request.reference is not None):
        raise ConfigError(
            "init 'loftq' needs a reference model, and no other init takes one",
            "Pass the model before quantization, or create base and adapter with mlx-lora quantize --loftq-rank.",
        )
    if row.needs_batches and request.batches is None:
        raise ConfigError(f"init {name!r} needs data", "Pass batches: attach(model, config, batches).")
    unsuitable = [(path, kind(m)) for path, m in request.modules.items() if kind(m) not in row.kinds]
    raise_faults(
        [f"{path}: init {name} cannot initialise {which} layers" for path, which in unsuitable],
        "Leave these modules out: name the modules to adapt with --keys.",
    )
    if not request.modules:
        return {}
    if not row.needs_batches:
        return row.initial_pairs(request)
    first, request = request.peeked()
    with as_generated(request.model, first):
        return row.initial_pairs(request)


def set_initial_pair(layer: AdapterLayer, a: np.ndarray, b: np.ndarray) -> None:
    """Set a layer's arrays to A [.., r, in] and B [.., out, r], transposed to the layer's own layout."""
    if a.ndim == 2:
        a, b = a.T, b.T
    a, b = mx.array(np.ascontiguousarray(a)), mx.array(np.ascontiguousarray(b))
    if hasattr(layer, "start_from"):
        layer.start_from(a, b)
    else:
        layer.lora_a, layer.lora_b = a.astype(layer.lora_a.dtype), b.astype(layer.lora_b.dtype)


def with_ranks(config: AdapterConfig, ranks: dict[str, int]) -> AdapterConfig:
    """``config`` with other ranks. As in PEFT, alpha grows with the rank, which keeps the size of the gradients."""
    scales = {}
    for path, rank in ranks.items():
        growth = math.sqrt(rank / config.rank_of(path)) if config.rslora else 1.0
        scales[path] = config.scale_of(path) * growth
    return replace(explicit_config(config, ranks, scales), init=config.init, keys=config.keys)


__all__ = ["FROM_DATA", "INITS", "SUBTRACTED", "Init", "Request", "init_of", "initial_pairs"]
