"""An adapter as a value: a config and named arrays, tied to no model and no file.

It alone passes between formats, models, training and serving. Names are mlx-lm's where it has them:

    ``<module>.lora_a`` [in, r], ``.lora_b`` [r, out], ``.m`` [out] (DoRA); of an embedding [vocabulary, r], [r, dim],
        [vocabulary]; of experts [experts, r, in], [experts, out, r], [experts, out]
    ``<module>.lora_bias`` [out]: y += scale * lora_bias
    ``<module>.vera_lambda_d`` [r], ``.vera_lambda_b`` [out] (of experts [experts, r], [experts, out]), with the shared
        ``vera_a`` [r, max in] and ``vera_b`` [max out, r], or without them: drawn from ``projection_prng_key``
    ``<module>.trainable_tokens`` [n, dim]: the rows that replace those of ``trainable_token_indices``
    ``<module>.weight``, ``<module>.bias``, ...: whole parameters of ``modules_to_save`` and ``bias``, replacements and
        not differences; under ``method="full"`` there is nothing else

``<module>`` is the path in the bare model. This file checks adapters; it reads and writes none.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .config import LEAVES, AdapterConfig
from .errors import AdapterError

_LAYER = re.compile(r"^(.*?\.(\d+))\.(.+)$")
SHARED = ("vera_a", "vera_b")
LORA_BIAS, TOKENS = "lora_bias", "trainable_tokens"
_LEAVES = {leaf for leaves in LEAVES.values() for leaf in leaves} | {LORA_BIAS}


@dataclass(frozen=True)
class Adapter:
    """A config and the arrays it describes.

    Args:
        config: method, rank and scale of every module; ``keys`` and ``num_layers`` are what ``attach`` was given and
            are derived anew from ``weights`` where a format wants them.
        weights: arrays by name.
        base: the model it was made for (a path or repository), if known.
        metadata: whatever a format carries besides, kept for the way back.
    """

    config: AdapterConfig
    weights: dict[str, mx.array]
    base: str | None = None
    metadata: dict = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that the method adapts, in the model's order; under "full" of every module."""
        full = self.config.method == "full"
        names = [name.rpartition(".") for name in self.weights]
        return sorted({path for path, _, leaf in names if full or leaf in _LEAVES}, key=_natural)

    @property
    def whole(self) -> dict[str, mx.array]:
        """The whole parameters, by name in the bare model."""
        full = self.config.method == "full"
        return {n: w for n, w in self.weights.items() if full or not (n in SHARED or _leaf(n) in (*_LEAVES, TOKENS))}

    @property
    def tokens(self) -> dict[str, tuple[tuple[int, ...], mx.array]]:
        """Trained rows of embeddings by module path: (token ids, rows [n, dim])."""
        found = {n.rpartition(".")[0]: w for n, w in self.weights.items() if _leaf(n) == TOKENS}
        return {path: (match_tokens(self.config, path), rows) for path, rows in found.items()}

    @property
    def num_parameters(self) -> int:
        return sum(w.size for w in self.weights.values())

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights.values())

    def rank_of(self, path: str) -> int:
        """The rank of the module at ``path``, read from its arrays."""
        if self.config.method == "vera":
            return self.weights[f"{path}.vera_lambda_d"].shape[-1]
        b = self.weights[f"{path}.lora_b"]
        return b.shape[-1] if b.ndim == 3 else b.shape[0]

    def exact_config(self, rank: int | None = None) -> AdapterConfig:
        """``explicit_config`` of this adapter's modules."""
        ranks = {path: self.rank_of(path) for path in self.modules}
        return explicit_config(self.config, ranks, {path: self.config.scale_of(path) for path in ranks}, rank)

    def faults(self) -> list[str]:
        """Everything wrong with the adapter in itself, one sentence each; empty where it is sound."""
        if not self.weights:
            return ["the adapter holds no arrays"]
        faults = []
        if self.config.method != "full":
            leaves = LEAVES[self.config.method] + ((LORA_BIAS,) if self.config.lora_bias else ())
            faults = self._strangers(leaves)
            for path in [] if faults else self.modules:
                faults += self._module_faults(path, leaves)
            faults += [] if faults else self._token_faults()
        finite = {name: mx.isfinite(array).all() for name, array in self.weights.items()}
        mx.eval(finite)  # at once: a swap must not wait for each array
        for name, array in self.weights.items():
            if not mx.issubdtype(array.dtype, mx.floating):
                faults.append(f"{name}: its numbers are {array.dtype}, not floats")
            elif not finite[name].item():
                faults.append(f"{name}: holds NaN or infinite numbers")
        return faults

    def _strangers(self, leaves: tuple[str, ...]) -> list[str]:
        """Arrays that nothing in the config explains."""
        faults, config = [], self.config
        for name in sorted(self.weights, key=_natural):
            path, _, leaf = name.rpartition(".")
            known = leaf in leaves
            if name in SHARED:
                known = config.method == "vera"
            elif leaf == TOKENS:
                known = match_tokens(config, path) is not None
            elif leaf not in _LEAVES:
                known = (leaf == "bias" and config.bias != "none") or saved_whole(config, path)
            if not known:
                faults.append(f"{name}: {config.method} has no such array (it has {', '.join(leaves)})")
        return faults

    def _token_faults(self) -> list[str]:
        return [
            f"{path}: {len(ids)} token ids, but rows of shape {list(rows.shape)}"
            for path, (ids, rows) in self.tokens.items()
            if rows.ndim != 2 or rows.shape[0] != len(ids)
        ]

    def _module_faults(self, path: str, leaves: tuple[str, ...]) -> list[str]:
        missing = [leaf for leaf in leaves if f"{path}.{leaf}" not in self.weights]
        if missing:
            return [f"{path}: {' and '.join(missing)} missing"]
        if self.config.method == "vera":
            return self._vera_faults(path)
        a, b = self.weights[f"{path}.lora_a"], self.weights[f"{path}.lora_b"]
        shapes = f"lora_a {list(a.shape)}, lora_b {list(b.shape)}"
        if 0 in a.shape or 0 in b.shape:
            return [f"{path}: empty arrays ({shapes}); gather sharded weights before saving"]
        if a.ndim == b.ndim == 2:
            agree = a.shape[1] == b.shape[0]
        else:
            agree = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
        if not agree:
            return [f"{path}: {shapes} do not multiply"]
        rank = self.config.rank_of(path)
        if self.rank_of(path) != rank:
            return [f"{path}: its arrays have rank {self.rank_of(path)}, the config says {rank}"]
        return []

    def _vera_faults(self, path: str) -> list[str]:
        d, b = self.weights[f"{path}.vera_lambda_d"], self.weights[f"{path}.vera_lambda_b"]
        shapes = f"vera_lambda_d {list(d.shape)}, vera_lambda_b {list(b.shape)}"
        if d.ndim != b.ndim or d.ndim not in (1, 2) or (d.ndim == 2 and d.shape[0] != b.shape[0]) or 0 in d.shape:
            return [f"{path}: {shapes} do not belong together"]
        if d.shape[-1] != self.config.rank:
            return [f"{path}: its arrays have rank {d.shape[-1]}, the config says {self.config.rank}"]
        given = [name for name in SHARED if name in self.weights]
        if len(given) == 1:
            return [f"{given[0]} is there without {'vera_b' if given[0] == 'vera_a' else 'vera_a'}"]
        if given:
            big_a, big_b = self.weights["vera_a"], self.weights["vera_b"]
            whole = big_a.ndim == big_b.ndim == 2 and big_a.shape[0] == big_b.shape[1] == self.config.rank
            if not whole or big_b.shape[0] < b.shape[-1]:
                return [f"{path}: {shapes} do not fit vera_a {list(big_a.shape)} and vera_b {list(big_b.shape)}"]
        return []

    def check(self) -> Adapter:
        """Return the adapter itself, or raise one ``AdapterError`` that lists every fault."""
        raise_faults(self.faults(), "This adapter is damaged or incomplete: save or download it again.")
        return self


def explicit_config(
    config: AdapterConfig, ranks: dict[str, int], scales: dict[str, float], rank: int | None = None
) -> AdapterConfig:
    """``config`` with every module's rank and scale told explicitly.

    ``rank`` (default: the commonest) and the commonest scale hold for all; other modules get patterns that match one
    module each. ``alpha`` and ``rslora`` are resolved into scales.
    """
    config = replace(config, init="default", init_batches=None, eva_rho=None, eva_tau=None)
    if not ranks or config.method == "vera":  # nothing low-rank in it, or one rank and no scale
        return replace(config, target_parameters=None, layers_to_transform=None)
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(scales.values()).most_common(1)[0][0]
    return replace(
        config,
        target_parameters=None,
        layers_to_transform=None,
        alpha_pattern={},
        rank=rank,
        scale=scale,
        alpha=None,
        rslora=False,
        rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        scale_pattern={f"^{re.escape(path)}": s for path, s in scales.items() if s != scale},
    )


def match_tokens(config: AdapterConfig, path: str) -> tuple[int, ...] | None:
    """The ids of the trained rows of the embedding at ``path``; its config may name it by the end of its path."""
    named = [k for k in config.trainable_token_indices if path == k or path.endswith("." + k)]
    return config.trainable_token_indices[max(named, key=len)] if named else None


def saved_whole(config: AdapterConfig, path: str) -> bool:
    """Whether ``modules_to_save`` names the module at ``path``, or one that it is a part of."""
    return any(f".{path}.".find(f".{name}.") >= 0 for name in config.modules_to_save or ())


def raise_faults(faults: list[str], hint: str, kind: type[AdapterError] = AdapterError, most: int = 12) -> None:
    """Raise one error that lists ``faults``, the first ``most`` of them in full; return where there are none."""
    if faults:
        more = [f"... and {len(faults) - most} more"] if len(faults) > most else []
        raise kind("\n".join([*faults[:most], *more]), hint)


def split_layer(path: str) -> tuple[int | None, str]:
    """``model.layers.3.self_attn.q_proj`` -> (3, "self_attn.q_proj"); outside the layers -> (None, path)."""
    match = _LAYER.match(path)
    return (int(match[2]), match[3]) if match else (None, path)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _natural(name: str) -> list:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
