"""An adapter as a value: a config and named arrays, tied to no model and no file.

It alone passes between formats, models, training and serving. Names are mlx-lm's: ``<module path>.lora_a`` [in, r],
``.lora_b`` [r, out], ``.m`` [out] (DoRA); for experts ``lora_a`` [experts, r, in], ``lora_b`` [experts, out, r]; under
``method="full"`` plain parameter names. This file checks adapters; it reads and writes none.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

import mlx.core as mx

from .config import LEAVES, AdapterConfig
from .errors import AdapterError

_LAYER = re.compile(r"^(.*?\.(\d+))\.(.+)$")


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
        """Paths of the adapted modules, in the model's order."""
        return sorted({name.rpartition(".")[0] for name in self.weights}, key=_natural)

    @property
    def num_parameters(self) -> int:
        return sum(w.size for w in self.weights.values())

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights.values())

    def rank_of(self, path: str) -> int:
        """The rank of the module at ``path``, read from its arrays."""
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
            leaves = LEAVES[self.config.method]
            for name in sorted(self.weights, key=_natural):
                if name.rpartition(".")[2] not in leaves:
                    faults.append(f"{name}: {self.config.method} has no such array (it has {', '.join(leaves)})")
            for path in [] if faults else self.modules:
                faults += self._module_faults(path, leaves)
        finite = {name: mx.isfinite(array).all() for name, array in self.weights.items()}
        mx.eval(finite)  # at once: a swap must not wait for each array
        for name, array in self.weights.items():
            if not mx.issubdtype(array.dtype, mx.floating):
                faults.append(f"{name}: its numbers are {array.dtype}, not floats")
            elif not finite[name].item():
                faults.append(f"{name}: holds NaN or infinite numbers")
        return faults

    def _module_faults(self, path: str, leaves: tuple[str, ...]) -> list[str]:
        missing = [leaf for leaf in leaves if f"{path}.{leaf}" not in self.weights]
        if missing:
            return [f"{path}: {' and '.join(missing)} missing"]
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
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(scales.values()).most_common(1)[0][0]
    return replace(
        config,
        rank=rank,
        scale=scale,
        alpha=None,
        rslora=False,
        rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        scale_pattern={f"^{re.escape(path)}": s for path, s in scales.items() if s != scale},
    )


def raise_faults(faults: list[str], hint: str, kind: type[AdapterError] = AdapterError, most: int = 12) -> None:
    """Raise one error that lists ``faults``, the first ``most`` of them in full; return where there are none."""
    if faults:
        more = [f"... and {len(faults) - most} more"] if len(faults) > most else []
        raise kind("\n".join([*faults[:most], *more]), hint)


def split_layer(path: str) -> tuple[int | None, str]:
    """``model.layers.3.self_attn.q_proj`` -> (3, "self_attn.q_proj"); outside the layers -> (None, path)."""
    match = _LAYER.match(path)
    return (int(match[2]), match[3]) if match else (None, path)


def _natural(name: str) -> list:
    """Sorts layer 10 behind layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
