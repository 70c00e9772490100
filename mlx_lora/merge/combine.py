"""One adapter out of several, weighted: what PEFT's ``add_weighted_adapter`` computes, on the same numbers.

    linear            A = sum sqrt|w s| sign A_i, B = sum sqrt|w s| B_i: rough, since products of different adapters mix
    cat               ranks side by side: exact, as large as all of them together
    svd               the best of rank r for sum w s B_i A_i (exact where r reaches their ranks together)
    ties              keep the largest, elect a sign, average those that agree (arXiv:2306.01708)
    dare_linear       drop numbers at random, scale up the rest (arXiv:2311.03099)
    dare_ties         the same, then elect signs
    magnitude_prune   keep the largest
    <any of the last four>_svd   on the products B_i A_i rather than on A and B, then as svd

Random drops are torch's: from a generator seeded by ``seed`` PEFT would draw the same masks, by module, for every A
and then for every B. (PEFT itself draws from the global generator, after an initialisation that it throws away.) Works
on arrays alone; the result's scale is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapter import Adapter, explicit_config, raise_faults
from ..base.modules import dims
from ..base.vera import adapter_as_lora
from ..errors import AdapterError, ConfigError
from ..model.compatibility import misfits
from ..model.state import bare_modules

ELEMENTWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MERGES = (*ELEMENTWISE, "cat", "svd", *(f"{name}_svd" for name in ELEMENTWISE if name != "linear"))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class _Rule:
    """How the tensors of several adapters become one."""

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
        agree = np.sign(stacked) == np.where(votes >= 0, 1, -1)
        return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)

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
    """A LoRA adapter that does what ``adapters`` do, each by its weight.

    Args:
        weights: one an adapter, any sign; 1 each by default.
        method: one of ``MERGES``.
        density: share of the numbers that ties, dare and magnitude_prune keep.
        sign: ties: the elected sign is that of the sum (``total``) or of the most (``frequency``).
        rank: of the result of svd methods; the largest of the adapters' by default.
        clamp: svd methods: cut both factors off at this quantile of their numbers.
        seed: of dare's drops.
        order: module paths in the order in which dare draws; PEFT's is the model's. By default that of the paths.

    Modules that some adapters lack are merged from those that have them. One adapter alone is only weighed.

    Raises: ConfigError: settings; AdapterError: adapters that cannot be merged.
    """
    weights = list(weights) if weights is not None else [1.0] * len(adapters)
    _check_settings(len(adapters), weights, method, density, sign, rank, clamp)
    _check_adapters(adapters)
    if len(adapters) == 1:
        method = "linear"  # as PEFT: there is nothing to weigh against
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
            raise AdapterError(f"{path}: the adapters are of layers of different size", "Merge adapters of one base.")
        if method in ELEMENTWISE and len({a.shape for a, _ in pairs}) > 1:
            raise AdapterError(f"{path}: {method} wants adapters of one rank", "Use cat or svd.")
        scales = [adapter.config.scale_of(path) for adapter, _ in have]
        a, b = _merge(pairs, scales, [w for _, w in have], method, rule, rank, clamp)
        ranks[path] = a.shape[-2]
        new |= _as_stored(path, a, b, have[0][0].weights[f"{path}.lora_a"].dtype)
    config = explicit_config(adapters[0].config, ranks, dict.fromkeys(ranks, 1.0))
    bases = {adapter.base for adapter in adapters}
    return Adapter(config, new, base=bases.pop() if len(bases) == 1 else None)


def as_lora(model: nn.Module, adapter: Adapter) -> Adapter:
    """A VeRA adapter as LoRA of scale 1 that computes the same: (lambda_d A)^T and (lambda_b B)^T.

    Args:
        model: the base, whose layers tell how much of the shared projections each module uses.

    Raises: AdapterError: the adapter is not VeRA's, or not of this model.
    """
    if adapter.config.method != "vera":
        raise AdapterError(
            f"the adapter is of method {adapter.config.method}, not vera", "Only VeRA is turned into LoRA."
        )
    modules = bare_modules(model)
    raise_faults(misfits(modules, adapter), "Name the model that the adapter was made for.")
    return adapter_as_lora(adapter.check(), {path: dims(modules[path]) for path in adapter.modules})


Pair = tuple[np.ndarray, np.ndarray]  # A [.., r, in], B [.., out, r]


def _merge(pairs: list[Pair], scales, weights, method: str, rule: _Rule, rank: int, clamp: float | None) -> Pair:
    """One pair whose product is the merged update. ``scales`` and ``weights``: a number an adapter."""
    factors = [w * s for w, s in zip(weights, scales, strict=True)]
    if method in ("cat", "svd"):
        a = np.concatenate([np.float32(f) * a for (a, _), f in zip(pairs, factors, strict=True)], axis=-2)
        b = np.concatenate([b for _, b in pairs], axis=-1)
        return (a, b) if method == "cat" else _clamped(*best_of_rank(a, b, rank), clamp)
    if method.endswith("_svd"):
        # Signs are elected among the scaled products, before the weights.
        product = rule([np.float32(s) * (b @ a) for (a, b), s in zip(pairs, scales, strict=True)], weights)
        u, s, v = np.linalg.svd(product, full_matrices=False)
        return _clamped(v[..., :rank, :], u[..., :rank] * s[..., None, :rank], clamp)
    roots = [math.sqrt(abs(f)) for f in factors]
    # The sign goes to one side alone, else it would cancel.
    a = rule([a for a, _ in pairs], [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)])
    return a, rule([b for _, b in pairs], roots)


def best_of_rank(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """The pair of ``rank`` nearest to the product ``b @ a``, which is never written out: (V^T, U S) of its SVD."""
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
    """A [.., r, in] and B [.., out, r] of a module, float32."""
    a, b = (np.array(adapter.weights[f"{path}.{leaf}"].astype(mx.float32)) for leaf in ("lora_a", "lora_b"))
    return (a, b) if a.ndim == 3 else (a.T, b.T)


def _as_stored(path: str, a: np.ndarray, b: np.ndarray, dtype: mx.Dtype) -> dict[str, mx.array]:
    if a.ndim == 2:
        a, b = a.T, b.T
    return {f"{path}.{leaf}": mx.array(np.ascontiguousarray(x, np.float32)).astype(dtype) for leaf, x in
            (("lora_a", a), ("lora_b", b))}  # fmt: skip


def _check_settings(count: int, weights: list, method: str, density, sign: str, rank, clamp) -> None:
    faults = []
    if method not in MERGES:
        faults.append(f"method must be one of {', '.join(MERGES)}, not {method!r}")
    if not count:
        faults.append("there is nothing to merge: give at least one adapter")
    if len(weights) != count:
        faults.append(f"{len(weights)} weights for {count} adapters")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w) for w in weights):
        faults.append(f"weights must be numbers, not {weights!r}")
    elif not any(weights) and weights:
        faults.append("every weight is 0: nothing would be left")
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if prunes and density is None:
        faults.append(f"{method} keeps a share of the numbers: give density")
    if density is not None and not prunes:
        faults.append(f"density is for ties, dare and magnitude_prune, not for {method}")
    elif density is not None and not 0 < density <= 1:
        faults.append(f"density must be above 0 and at most 1, not {density!r}")
    if sign not in SIGNS:
        faults.append(f"sign must be one of {', '.join(SIGNS)}, not {sign!r}")
    elif sign != "total" and "ties" not in method:
        faults.append(f"sign is for ties, not for {method}")
    if rank is not None and (not method.endswith("svd") or rank < 1):
        faults.append(f"rank {rank} is {'no rank' if rank < 1 else f'for svd methods, not for {method}'}")
    if clamp is not None and not (method.endswith("svd") and 0 < clamp <= 1):
        faults.append("clamp is a quantile from 0 to 1, for svd methods")
    if faults:
        raise ConfigError(
            "\n".join(faults),
            "Take svd, the default, which needs weights alone, or give ties, dare and magnitude_prune a density.",
        )


def _check_adapters(adapters: Sequence[Adapter]) -> None:
    faults = []
    for i, adapter in enumerate(adapters, 1):
        faults += [f"adapter {i}: {fault}" for fault in adapter.faults()]
        if adapter.config.method != "lora":
            mend = "name its base (--model, or as_lora)" if adapter.config.method == "vera" else "merge plain LoRA"
            faults.append(f"adapter {i} is of method {adapter.config.method}: {mend}")
        elif adapter.config.lora_bias or adapter.whole or adapter.tokens:
            faults.append(f"adapter {i} trains more than low-rank updates (biases, whole modules or tokens)")
        elif not adapter.modules:
            faults.append(f"adapter {i} holds no low-rank update")
    if len({adapter.config.embedding_side for adapter in adapters}) > 1:
        faults.append("the adapters of embeddings act on different sides")
    raise_faults(faults, "Merge plain LoRA adapters of one base.")
