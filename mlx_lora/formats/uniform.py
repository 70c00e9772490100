"""Convert adapters to one rank and one scale with the same function, for systems that cannot store more.

Smaller ranks are padded with zeros, and differing scales are folded into ``lora_b``. Knows no format.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx

from ..adapter import Adapter, explicit_config, raise_faults
from ..base.names import BaseModel
from ..base.vera import adapter_as_lora
from ..config import AdapterConfig
from ..errors import FormatError
from .options import MERGE, NAME_BASE, WriteOptions


def fold(adapter: Adapter, config: AdapterConfig) -> dict[str, mx.array]:
    """The arrays with rank ``config.rank`` and scale ``config.scale`` in all modules, computing the same function."""
    weights = dict(adapter.weights)
    for path in adapter.modules:
        _rescale(weights, path, config.scale_of(path) / config.scale)
        _pad(weights, path, config.rank)
    return weights


def unfold(adapter: Adapter) -> Adapter:
    """The inverse of ``fold``. Ranks come back exactly; scales up to float32 rounding."""
    weights, config = dict(adapter.weights), adapter.config
    for path in adapter.modules:
        a, b = f"{path}.lora_a", f"{path}.lora_b"
        if a not in weights or b not in weights:
            continue  # ``Adapter.check`` names what is missing
        rank, dtype = config.rank_of(path), weights[a].dtype
        experts = weights[a].ndim == 3
        weights[a] = weights[a][:, :rank]
        weights[b] = weights[b][..., :rank] if experts else weights[b][:rank]
        for name in _rescale(weights, path, config.scale / config.scale_of(path)):
            weights[name] = weights[name].astype(dtype)
    return replace(adapter, weights=weights)


def uniform(adapter: Adapter, alpha: float | None = None, *, integer: bool = False, pad: bool = True) -> Adapter:
    """``adapter`` with one alpha (scale * rank) for all modules and, with ``pad``, one rank.

    Args:
        alpha: the alpha to have; by default the most common scale times the rank.
        integer: use the rank as alpha if that default is not a whole number.
        pad: pad every module to the largest rank. Otherwise ranks stay unchanged.
    """
    ranks = {path: adapter.rank_of(path) for path in adapter.modules}
    largest = max(ranks.values())
    if alpha is None:
        exact = adapter.exact_config(rank=largest if pad else None)
        alpha = integral(exact.scale * exact.rank)
        if integer and not isinstance(alpha, int):
            alpha = exact.rank
    weights, scales = dict(adapter.weights), {}
    for path in ranks:
        ranks[path] = largest if pad else ranks[path]
        scales[path] = alpha / ranks[path]
        _rescale(weights, path, adapter.config.scale_of(path) / scales[path])
        _pad(weights, path, ranks[path])
    return replace(adapter, weights=weights, config=explicit_config(adapter.config, ranks, scales))


def low_rank_only(
    adapter: Adapter,
    options: WriteOptions,
    system: str,
    methods: tuple[str, ...] = ("lora",),
    *,
    keep_biases: bool = False,
    hint: str = MERGE,
) -> Adapter:
    """``adapter`` for a system that stores low-rank matrices alone.

    VeRA becomes the equivalent LoRA. Methods that are not in ``methods`` are refused. Full parameters, trained tokens,
    lora_bias and the adapter of a tied head alone are refused too, or left out if ``options`` allows losses.
    """
    adapter = vera_as_lora(adapter, options.base)
    if adapter.config.method not in methods:
        raise FormatError(f"{system} has no {adapter.config.method} adapters", hint)
    full = [name for name in adapter.full_parameters if not (keep_biases and name.endswith(".bias"))]
    faults = [f"{name}: {system} adapters have no full parameters" for name in full]
    faults += [f"{path}: {system} adapters have no trained tokens" for path in adapter.tokens]
    faults += [f"{path}: {system} adapters have no lora_bias" for path in adapter.modules if adapter.config.lora_bias]
    tied = options.known_base is not None and options.known_base.tied
    heads = [path for path in adapter.modules if tied and path.rpartition(".")[2] == "lm_head"]
    faults += [f"{path}: {system} adapters have no head apart from the embedding it is tied to" for path in heads]
    options.leave_out(faults, hint)
    if heads:
        kept = {name: w for name, w in adapter.weights.items() if name.rpartition(".")[0] not in heads}
        adapter = replace(adapter, weights=kept)
    if not adapter.modules:
        raise FormatError(f"the adapter has no LoRA, and {system} adapters hold nothing else", hint)
    return adapter


def vera_as_lora(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """A VeRA adapter (arXiv:2310.11454) as LoRA: A' = diag(lambda_d) A, B' = diag(lambda_b) B, scale 1.

    Args:
        base: gives the sizes of the modules' inputs. The projections are drawn for these sizes if the adapter does
            not store them.
    """
    if adapter.config.method != "vera":
        return adapter
    paths = adapter.modules
    unknown = [path for path in paths if base is None or path not in base.modules]
    raise_faults([f"{path}: the size of this layer's input is not known" for path in unknown], NAME_BASE, FormatError)
    experts = [path for path in paths if adapter.weights[f"{path}.vera_lambda_d"].ndim != 1]
    raise_faults(
        [f"{path}: VeRA of experts is not converted" for path in experts],
        "Leave the experts out of the adapter, or merge it: convert --to merged.",
        FormatError,
    )
    return adapter_as_lora(adapter, {path: base.modules[path][1:3] for path in paths})


def integral(alpha: float) -> int | float:
    """``alpha`` as an int if it is one up to rounding, because readers in Go and C require an integer."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _rescale(weights: dict[str, mx.array], path: str, factor: float) -> list[str]:
    """Multiply the update of a module by ``factor``; returns the names of the arrays that changed.

    They become float32: half precision would round the products.
    """
    if math.isclose(factor, 1, rel_tol=1e-12):
        return []
    names = [name for name in (f"{path}.lora_b", f"{path}.lora_bias") if name in weights]
    for name in names:
        weights[name] = weights[name].astype(mx.float32) * factor
    return names


def _pad(weights: dict[str, mx.array], path: str, rank: int) -> None:
    """Pad the matrices of a module with zeros to ``rank``."""
    a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
    more, experts = rank - a.shape[1], a.ndim == 3
    if more > 0:  # a: [in, r], for experts [experts, r, in]; b: [r, out], for experts [experts, out, r]
        weights[f"{path}.lora_a"] = mx.pad(a, [(0, 0), (0, more), (0, 0)] if experts else [(0, 0), (0, more)])
        weights[f"{path}.lora_b"] = mx.pad(b, [(0, 0), (0, 0), (0, more)] if experts else [(0, more), (0, 0)])
