"""An adapter as a value: a config and named arrays, independent of any model and any file.

Formats, models, training and serving all exchange this value. Array names are mlx-lm's where mlx-lm has one:

    ``<module>.lora_a`` [in, r], ``.lora_b`` [r, out], ``.m`` [out] (DoRA); for an embedding [vocabulary, r], [r, dim],
        [vocabulary]; for experts [experts, r, in], [experts, out, r], [experts, out]
    ``<module>.lora_bias`` [out]: y += scale * lora_bias
    ``<module>.vera_lambda_d`` [r], ``.vera_lambda_b`` [out] (for experts [experts, r], [experts, out]), with the shared
        projections ``vera_a`` [r, max in] and ``vera_b`` [max out, r]; an adapter without them draws both from
        ``projection_prng_key``
    ``<module>.ia3_l`` [out, 1], or [1, in] where the input is scaled ((IA)^3)
    ``<module>.trainable_tokens`` [n, dim]: replaces the embedding's rows of ``trainable_token_indices``
    ``<module>.weight``, ``<module>.bias``, ...: full parameters, trained because of ``modules_to_save`` or ``bias``.
        They replace the base's parameters. With ``method="full"`` the adapter holds nothing else.

``<module>`` is the module's path in the model without adapters. This file validates adapters; it reads and writes no
files.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .config import LEAVES, UNSCALED, AdapterConfig
from .errors import AdapterError

_LAYER = re.compile(r"^(.*?\.(\d+))\.(.+)$")
FINGERPRINT = "base_fingerprint"  # key in ``metadata`` and in files; see base/fingerprint.py
SHARED = ("vera_a", "vera_b")
LORA_BIAS, TOKENS = "lora_bias", "trainable_tokens"
_LEAVES = {leaf for leaves in LEAVES.values() for leaf in leaves} | {LORA_BIAS}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A config and the arrays it describes.

    Two adapters are equal if config, base, array names, dtypes and contents are equal; ``metadata`` does not count.

    Args:
        config: method, rank and scale of every module. ``keys`` and ``num_layers`` are kept as they were given to
            ``attach``; a format that needs them derives them from ``weights``.
        weights: arrays by name.
        base: path or repository of the model the adapter was trained on, if known.
        metadata: other values from the adapter's file, kept so that it can be written back, and the fingerprint of the
            base model.
    """

    config: AdapterConfig
    weights: dict[str, mx.array]
    base: str | None = None
    metadata: dict = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        if self is other:
            return True
        if self._signature() != other._signature() or self.config != other.config:
            return False
        pairs = [(array, other.weights[name]) for name, array in self.weights.items()]
        same = [mx.array_equal(a, b, equal_nan=True) for a, b in pairs if a is not b]
        return not same or bool(mx.stack(same).all().item())

    def __hash__(self) -> int:
        # Names, shapes and dtypes only: a hash of the contents would have to read every array.
        return hash(self._signature())

    def _signature(self) -> tuple:
        return self.base, frozenset((name, a.shape, str(a.dtype)) for name, a in self.weights.items())

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that the method adapts, in the model's order; with "full" those of all parameters."""
        full = self.config.method == "full"
        names = [name.rpartition(".") for name in self.weights]
        return sorted({path for path, _, leaf in names if full or leaf in _LEAVES}, key=_natural)

    @property
    def full_parameters(self) -> dict[str, mx.array]:
        """The arrays that replace parameters of the base, by the parameter's name."""
        full = self.config.method == "full"
        return {n: w for n, w in self.weights.items() if full or not (n in SHARED or _leaf(n) in (*_LEAVES, TOKENS))}

    @property
    def tokens(self) -> dict[str, tuple[tuple[int, ...], mx.array]]:
        """Trained rows of embeddings by module path: (token ids, rows [n, dim])."""
        found = {n.rpartition(".")[0]: w for n, w in self.weights.items() if _leaf(n) == TOKENS}
        return {path: (token_ids(self.config, path), rows) for path, rows in found.items()}

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
        b = self.weights.get(f"{path}.lora_b")
        if b is None:  # a method without low-rank matrices
            return self.config.rank_of(path)
        return b.shape[-1] if b.ndim == 3 else b.shape[0]

    def exact_config(self, rank: int | None = None) -> AdapterConfig:
        """``explicit_config`` for this adapter's modules."""
        ranks = {path: self.rank_of(path) for path in self.modules}
        return explicit_config(self.config, ranks, {path: self.config.scale_of(path) for path in ranks}, rank)

    def problems(self) -> list[str]:
        """Everything that is wrong with the adapter itself, one sentence each; empty if it is valid."""
        if not self.weights:
            return ["the adapter holds no arrays"]
        problems = []
        if self.config.method != "full":
            leaves = LEAVES[self.config.method] + ((LORA_BIAS,) if self.config.lora_bias else ())
            problems = self._unexpected_arrays(leaves)
            for path in [] if problems else self.modules:
                problems += self._module_problems(path, leaves)
            problems += [] if problems else self._token_problems()
        finite = {name: mx.isfinite(array).all() for name, array in self.weights.items()}
        mx.eval(finite)  # all at once: one evaluation per array would make swapping adapters slow
        for name, array in self.weights.items():
            if not mx.issubdtype(array.dtype, mx.floating):
                problems.append(f"{name}: has dtype {array.dtype}, not floats")
            elif not finite[name].item():
                problems.append(f"{name}: holds NaN or infinite numbers")
        return problems

    def _unexpected_arrays(self, leaves: tuple[str, ...]) -> list[str]:
        """Arrays that the config does not account for."""
        problems, config = [], self.config
        for name in sorted(self.weights, key=_natural):
            path, _, leaf = name.rpartition(".")
            known = leaf in leaves
            if name in SHARED:
                known = config.method == "vera"
            elif leaf == TOKENS:
                known = token_ids(config, path) is not None
            elif leaf not in _LEAVES:
                known = (leaf == "bias" and config.bias != "none") or in_modules_to_save(config, path)
            if not known:
                problems.append(f"{name}: {config.method} has no such array (it has {', '.join(leaves)})")
        return problems

    def _token_problems(self) -> list[str]:
        return [
            f"{path}: {len(ids)} token ids, but rows of shape {list(rows.shape)}"
            for path, (ids, rows) in self.tokens.items()
            if rows.ndim != 2 or rows.shape[0] != len(ids)
        ]

    def _module_problems(self, path: str, leaves: tuple[str, ...]) -> list[str]:
        missing = [leaf for leaf in leaves if f"{path}.{leaf}" not in self.weights]
        if missing:
            return [f"{path}: {' and '.join(missing)} missing"]
        if self.config.method == "vera":
            return self._vera_problems(path)
        if "lora_a" not in leaves:
            return []
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

    def _vera_problems(self, path: str) -> list[str]:
        d, b = self.weights[f"{path}.vera_lambda_d"], self.weights[f"{path}.vera_lambda_b"]
        shapes = f"vera_lambda_d {list(d.shape)}, vera_lambda_b {list(b.shape)}"
        if d.ndim != b.ndim or d.ndim not in (1, 2) or (d.ndim == 2 and d.shape[0] != b.shape[0]) or 0 in d.shape:
            return [f"{path}: the shapes {shapes} contradict each other"]
        if d.shape[-1] != self.config.rank:
            return [f"{path}: its arrays have rank {d.shape[-1]}, the config says {self.config.rank}"]
        given = [name for name in SHARED if name in self.weights]
        if len(given) == 1:
            return [f"{given[0]} is there without {'vera_b' if given[0] == 'vera_a' else 'vera_a'}"]
        if given:
            big_a, big_b = self.weights["vera_a"], self.weights["vera_b"]
            matching = big_a.ndim == big_b.ndim == 2 and big_a.shape[0] == big_b.shape[1] == self.config.rank
            if not matching or big_b.shape[0] < b.shape[-1]:
                projections = f"vera_a {list(big_a.shape)} and vera_b {list(big_b.shape)}"
                return [f"{path}: the shapes {shapes} contradict {projections}"]
        return []

    def check(self) -> Adapter:
        """Return the adapter itself, or raise one ``AdapterError`` that lists every problem."""
        raise_faults(self.problems(), "This adapter is damaged or incomplete: save or download it again.")
        return self


def explicit_config(
    config: AdapterConfig, ranks: dict[str, int], scales: dict[str, float], rank: int | None = None
) -> AdapterConfig:
    """``config`` with the rank and scale of every module written out.

    ``rank`` (default: the most common one) and the most common scale become the config's own; every module with another
    rank or scale gets a pattern that matches this module only. ``alpha`` and ``rslora`` are resolved into scales.
    """
    config = replace(config, init="default", init_batches=None, eva_rho=None, eva_tau=None)
    if not ranks or config.method in UNSCALED:  # no low-rank update, or an update without its own rank and scale
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


def token_ids(config: AdapterConfig, path: str) -> tuple[int, ...] | None:
    """The token ids whose rows are trained in the embedding at ``path``, or None.

    ``trainable_token_indices`` may name the embedding by the end of its path.
    """
    named = [k for k in config.trainable_token_indices if path == k or path.endswith("." + k)]
    return config.trainable_token_indices[max(named, key=len)] if named else None


def in_modules_to_save(config: AdapterConfig, path: str) -> bool:
    """Whether ``modules_to_save`` names the module at ``path`` or a module that contains it."""
    return any(f".{path}.".find(f".{name}.") >= 0 for name in config.modules_to_save or ())


def raise_faults(faults: list[str], hint: str, kind: type[AdapterError] = AdapterError, most: int = 12) -> None:
    """Raise one error that lists the first ``most`` of ``faults``; return if there are none."""
    if faults:
        more = [f"... and {len(faults) - most} more"] if len(faults) > most else []
        raise kind("\n".join([*faults[:most], *more]), hint)


def split_layer(path: str) -> tuple[int | None, str]:
    """``model.layers.3.self_attn.q_proj`` -> (3, "self_attn.q_proj"); a path outside the layers -> (None, path)."""
    match = _LAYER.match(path)
    return (int(match[2]), match[3]) if match else (None, path)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
