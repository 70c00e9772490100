"""Merging several adapters into one by weights, with the numbers of PEFT's ``add_weighted_adapter``.

    linear            A = sum sqrt|w s| sign A_i, B = sum sqrt|w s| B_i: inexact, products of different adapters mix
    cat               concatenates along the rank: exact, with the sum of all ranks
    svd               the best approximation of sum w s B_i A_i at rank r (exact if r is at least the sum of the ranks)
    ties              keep the largest values, elect a sign, average the values that agree (arXiv:2306.01708)
    dare_linear       drop random values, scale up the rest (arXiv:2311.03099)
    dare_ties         the same, then elect signs
    magnitude_prune   keep the largest values
    <any of the last four>_svd   on the products B_i A_i instead of A and B, then as svd

Random drops use torch's generator: seeded with ``seed``, PEFT would draw the same masks, module by module, for every A
and then for every B. (PEFT itself uses the global generator, after drawing an initialisation that it discards.) Works
on arrays only; the result's scale is 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapter import FINGERPRINT, Adapter, explicit_config, raise_faults
from ..base.fingerprint import Fingerprint
from ..base.modules import dims
from ..base.vera import adapter_as_lora
from ..errors import AdapterError, ConfigError, MLXLoRAWarning
from ..formats.options import is_embedding
from ..model.compatibility import incompatibilities
from ..model.state import HEAD, bare_modules

ELEMENTWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MERGES = (*ELEMENTWISE, "cat", "svd", *(f"{name}_svd" for name in ELEMENTWISE if name != "linear"))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class _Rule:
    """Combines one tensor of several adapters."""

    method: str
    density: float
    sign: str
    generator: np.random.RandomState

    def __call__(self, tensors: list[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        if self.method.startswith("dare"):
            tensors = [self._drop(t) for t in tensors]
        elif self.method != "linear":
            tensors = [self._keep_largest(t) for t in tensors]
        stacked = np.stack(tensors)
        weighted = stacked * np.array(weights, np.float32).reshape(-1, *[1] * (stacked.ndim - 1))
        if "ties" not in self.method:
            return weighted.sum(axis=0)
        votes = (stacked if self.sign == "total" else np.sign(stacked)).sum(axis=0)
        agrees = np.sign(stacked) == np.where(votes >= 0, 1, -1)
        return (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)

    def _drop(self, tensor: np.ndarray) -> np.ndarray:
        if self.density >= 1:
            return tensor
        bits = self.generator.randint(0, 2**32, size=tensor.size, dtype=np.uint32) & np.uint32((1 << 24) - 1)
        mask = bits.astype(np.float32) * np.float32(2**-24) < np.float32(self.density)
        return tensor * mask.reshape(tensor.shape) / np.float32(self.density)

    def _keep_largest(self, tensor: np.ndarray) -> np.ndarray:
        if self.density >= 1:
            return tensor
        kept = int(self.density * tensor.size)
        mask = np.zeros(tensor.size, tensor.dtype)
        if kept:
            mask[np.argpartition(-np.abs(tensor).reshape(-1), kept - 1)[:kept]] = 1
        return tensor * mask.reshape(tensor.shape)


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "svd",
    *,
    density: float | None = None,
    sign: str = "total",
    rank: int | None = None,
    clamp: float | None = None,
    seed: int = 0,
    order: Sequence[str] | None = None,
) -> Adapter:
    """Merge several LoRA adapters into one.

    A module that some adapters lack is merged from those that have it. A single adapter is only multiplied by its
    weight.

    Args:
        weights: one per adapter, of any sign; 1 each by default.
        method: one of ``MERGES``.
        density: share of the values that ties, dare and magnitude_prune keep, above 0 and at most 1.
        sign: ties: elect the sign of the sum (``total``) or of the majority (``frequency``).
        rank: of the result of svd methods; by default the largest rank of the adapters.
        clamp: svd methods: clip both factors at this quantile of their values.
        seed: of dare's random drops.
        order: module paths in the order in which dare draws (in PEFT the model's); by default the order of the paths.

    Raises:
        ConfigError: a setting is invalid or does not belong to the method.
        AdapterError: the adapters cannot be merged.
    """
    weights = list(weights) if weights is not None else [1.0] * len(adapters)
    check_settings(len(adapters), weights, method, density=density, sign=sign, rank=rank, clamp=clamp, seed=seed)
    _check_adapters(adapters)
    _check_rank(adapters, method, rank)
    if len(adapters) == 1:
        method = "linear"  # as in PEFT
    rule = _Rule(method.removesuffix("_svd"), 1.0 if density is None else density, sign, np.random.RandomState(seed))
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.modules))
    if order is not None:
        place = {path: i for i, path in enumerate(order)}
        paths.sort(key=lambda path: place.get(path, len(place)))
    rank = rank or max(adapter.rank_of(path) for adapter in adapters for path in adapter.modules)
    new, ranks = {}, {}
    for path in paths:
        have = [
            (adapter, w) for adapter, w in zip(adapters, weights, strict=True) if f"{path}.lora_a" in adapter.weights
        ]
        pairs = [_rows_first(adapter, path) for adapter, _ in have]
        if len({(a.shape[:-2], a.shape[-1], b.shape[-2]) for a, b in pairs}) > 1:
            raise AdapterError(f"{path}: the adapters are for layers of different size", "Merge adapters of one base.")
        if method in ELEMENTWISE and len({a.shape for a, _ in pairs}) > 1:
            raise AdapterError(f"{path}: {method} needs adapters of one rank", "Use cat or svd.")
        scales = [adapter.config.scale_of(path) for adapter, _ in have]
        a, b = _merge(pairs, scales, [w for _, w in have], method, rule, rank, clamp)
        ranks[path] = a.shape[-2]
        new |= _as_stored(path, a, b, have[0][0].weights[f"{path}.lora_a"].dtype)
    side = next(iter(_sides(adapters)), "both")
    config = explicit_config(replace(adapters[0].config, embedding_side=side), ranks, dict.fromkeys(ranks, 1.0))
    bases = {adapter.base for adapter in adapters}
    prints = [adapter.metadata.get(FINGERPRINT) for adapter in adapters]
    known = [found for one in prints if (found := Fingerprint.from_stored(one))]
    if known and not all(known[0].matches(one) for one in known):
        names = ", ".join(str(adapter.base or "an unnamed model") for adapter in adapters)
        warnings.warn(
            f"The adapters were trained on base models with different weights ({names}). Their merge may answer worse "
            "than each of them.",
            MLXLoRAWarning,
            stacklevel=2,
        )
        known = []
    metadata = {FINGERPRINT: known[0].stored()} if len(known) == len(prints) else {}
    return Adapter(config, new, base=bases.pop() if len(bases) == 1 else None, metadata=metadata)


def as_lora(model: nn.Module, adapter: Adapter) -> Adapter:
    """Convert a VeRA adapter to the LoRA adapter of scale 1 that computes the same.

    Args:
        model: the base. Its layers' sizes determine which part of the shared projections each module uses.

    Raises: AdapterError: the adapter is not VeRA, or cannot be mounted on this model.
    """
    if adapter.config.method != "vera":
        raise AdapterError(
            f"the method of the adapter is {adapter.config.method}, not vera", "Only VeRA is converted to LoRA."
        )
    raise_faults(*incompatibilities(model, adapter.check()))
    modules = bare_modules(model)
    return adapter_as_lora(adapter, {path: dims(modules[path]) for path in adapter.modules})


Pair = tuple[np.ndarray, np.ndarray]  # A [.., r, in], B [.., out, r]


def _merge(pairs: list[Pair], scales, weights, method: str, rule: _Rule, rank: int, clamp: float | None) -> Pair:
    """One pair whose product is the merged update. ``scales`` and ``weights``: one value per adapter."""
    factors = [w * s for w, s in zip(weights, scales, strict=True)]
    if method in ("cat", "svd"):
        a = np.concatenate([np.float32(f) * a for (a, _), f in zip(pairs, factors, strict=True)], axis=-2)
        b = np.concatenate([b for _, b in pairs], axis=-1)
        return (a, b) if method == "cat" else _clamped(*best_of_rank(a, b, rank), clamp)
    if method.endswith("_svd"):
        # Signs are elected among the scaled products, before the weights apply.
        product = rule([np.float32(s) * (b @ a) for (a, b), s in zip(pairs, scales, strict=True)], weights)
        u, s, v = np.linalg.svd(product, full_matrices=False)
        return _clamped(v[..., :rank, :], u[..., :rank] * s[..., None, :rank], clamp)
    roots = [math.sqrt(abs(f)) for f in factors]
    # A negative sign goes to one factor only, otherwise it would cancel.
    a = rule([a for a, _ in pairs], [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)])
    return a, rule([b for _, b in pairs], roots)


def best_of_rank(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """The best approximation of ``b @ a`` at ``rank``: (V^T, U S) of its SVD, without computing the product."""
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(np.swapaxes(a, -1, -2))
    u, s, v = np.linalg.svd(rb @ np.swapaxes(ra, -1, -2), full_matrices=False)
    v = v[..., :rank, :] @ np.swapaxes(qa, -1, -2)
    return v, qb @ (u[..., :rank] * s[..., None, :rank])


def _clamped(a: np.ndarray, b: np.ndarray, quantile: float | None) -> Pair:
    if quantile is not None:
        most = np.quantile(np.concatenate([b.reshape(-1), a.reshape(-1)]), quantile)
        a, b = np.clip(a, -most, most), np.clip(b, -most, most)
    return a, b


def _rows_first(adapter: Adapter, path: str) -> Pair:
    """A [.., r, in] and B [.., out, r] of a module in float32."""
    a, b = (np.array(adapter.weights[f"{path}.{leaf}"].astype(mx.float32)) for leaf in ("lora_a", "lora_b"))
    return (a, b) if a.ndim == 3 else (a.T, b.T)


def _as_stored(path: str, a: np.ndarray, b: np.ndarray, dtype: mx.Dtype) -> dict[str, mx.array]:
    if a.ndim == 2:
        a, b = a.T, b.T
    return {f"{path}.{leaf}": mx.array(np.ascontiguousarray(x, np.float32)).astype(dtype) for leaf, x in
            (("lora_a", a), ("lora_b", b))}  # fmt: skip


def check_settings(
    count: int,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    *,
    density: float | None = None,
    sign: str = "total",
    rank: int | None = None,
    clamp: float | None = None,
    seed: int = 0,
) -> None:
    """Refuse settings of ``merge_adapters`` for ``count`` adapters. Raises: ConfigError, with a hint for each fault."""
    weights = [1.0] * count if weights is None else list(weights)
    faults: dict[str, str] = {}
    if method not in MERGES:
        faults[f"method must be one of {', '.join(MERGES)}, not {method!r}"] = "Leave method out for svd."
    if not count:
        faults["there is nothing to merge"] = "Give at least one adapter."
    if len(weights) != count:
        faults[f"{len(weights)} weights for {count} adapters"] = (
            "Give one weight per adapter, in the same order, or leave weights out for 1 each."
        )
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w) for w in weights):
        faults[f"weights must be numbers, not {weights!r}"] = "Write numbers such as 0.7,0.3."
    elif not any(weights) and weights:
        faults["every weight is 0: the result would be empty"] = "Give at least one adapter a weight other than 0."
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if prunes and density is None and count != 1:
        faults[f"{method} keeps a share of the values: give density"] = "Write density 0.5 to keep half of them."
    if density is not None and not 0 < density <= 1:
        faults[f"density must be above 0 and at most 1, not {density!r}"] = "Write density 0.5 to keep half of them."
    if sign not in SIGNS:
        faults[f"sign must be one of {', '.join(SIGNS)}, not {sign!r}"] = "Leave sign out for total."
    if rank is not None and rank < 1:
        faults[f"rank must be at least 1, not {rank}"] = "Leave rank out for the largest rank of the adapters."
    if clamp is not None and not 0 < clamp <= 1:
        faults[f"clamp is a quantile above 0 and at most 1, not {clamp!r}"] = "Write clamp 0.99, or leave it out."
    given = {"density": density, "sign": None if sign == "total" else sign, "rank": rank, "clamp": clamp}
    given["seed"] = seed or None
    svd = method.endswith("svd")
    acts = {"density": prunes, "sign": "ties" in method, "rank": svd, "clamp": svd, "seed": method.startswith("dare")}
    which = {"density": "ties, dare and magnitude_prune", "sign": "ties", "seed": "dare"}
    for name, value in given.items():
        if value is not None and count == 1:
            fault = f"{name} has no effect on one adapter, which is only multiplied by its weight"
            faults[fault] = f"Leave {name} out."
        elif value is not None and not acts[name] and method in MERGES:
            faults[f"{name} is for {which.get(name, 'svd methods')}, not for {method}"] = f"Leave {name} out."
    if faults:
        raise ConfigError("\n".join(faults), "\n".join(dict.fromkeys(faults.values())))


def _check_rank(adapters: Sequence[Adapter], method: str, rank: int | None) -> None:
    """Refuse a rank above the sum of the updates' ranks, which would add nothing. Raises: ConfigError."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.modules)
    have = {path: [a for a in adapters if f"{path}.lora_a" in a.weights] for path in paths}
    most = max(sum(a.rank_of(path) for a in some) for path, some in have.items())
    if rank is not None and method == "svd" and rank > most:
        raise ConfigError(
            f"rank {rank} is more than the adapters' ranks together ({most})",
            f"Choose at most {most}, which is exact, as the method cat is.",
        )


def _sides(adapters: Sequence[Adapter]) -> set[str]:
    """``embedding_side`` of the adapters that have an embedding or an output head."""
    heads = [a for a in adapters if any(p.endswith(HEAD) or is_embedding(p, a) for p in a.modules)]
    return {adapter.config.embedding_side for adapter in heads}


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    faults = []
    for i, adapter in enumerate(adapters, 1):
        faults += [f"adapter {i}: {problem}" for problem in adapter.problems()]
        if adapter.config.method != "lora":
            fix = "give its base (--model, or as_lora)" if adapter.config.method == "vera" else "merge plain LoRA"
            faults.append(f"adapter {i}: its method is {adapter.config.method}; {fix}")
        elif adapter.config.lora_bias or adapter.full_parameters or adapter.tokens:
            faults.append(f"adapter {i} contains more than low-rank updates (biases, full modules or tokens)")
        elif not adapter.modules:
            faults.append(f"adapter {i} contains no low-rank update")
    if len(_sides(adapters)) > 1:
        faults.append("the adapters differ in embedding_side, the side on which a tied embedding's update acts")
    raise_faults(faults, "Merge plain LoRA adapters of one base.")
