"""The method, size, scale and modules of an adapter."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .options import check_types, common, more, option, raise_all, without_effect

DEFAULT_RANK, DEFAULT_SCALE, DEFAULT_LAYERS = 8, 20.0, 16
VERA_RANK = 256  # PEFT's default
# A scale above this gives a warning. 20 is the largest default of any tool (mlx-lm's; it was 10 before 2024-10), and
# users of PEFT choose alpha / rank between 0.5 and 4. Public files with a larger scale have written alpha into it.
LARGEST_SCALE = 20.0
# The arrays of each method for each module. With "full" an adapter holds parameters of the model itself.
LEAVES = {
    "lora": ("lora_a", "lora_b"),
    "dora": ("lora_a", "lora_b", "m"),
    "vera": ("vera_lambda_d", "vera_lambda_b"),
    "ia3": ("ia3_l",),
}
UNSCALED = ("vera", "ia3")  # methods without ranks and scales of single modules
# The layers whose inputs (IA)^3 scales by default, as in PEFT.
FEEDFORWARD = ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj")
METHODS = (*LEAVES, "full")
BIASES = ("none", "all", "lora_only")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The method, size, scale and modules of an adapter.

    The low-rank update of a layer is ``y = W x + scale * B A x``. The scale of a module is, in this order: its entry
    in ``scale_pattern``; ``alpha / rank`` if ``alpha`` is given or ``alpha_pattern`` names the module (with ``rslora``
    ``alpha / sqrt(rank)``, arXiv:2312.03732); ``scale``. Pattern keys are regular expressions, matched as PEFT does:
    against the whole module path or any dotted suffix of it; the first match counts. ``scale`` stays None if
    ``alpha`` is given; with "full", both ``rank`` and ``scale`` are None.

    ``keys`` selects modules by path inside a layer (``self_attn.q_proj``), absolute path (``lm_head``,
    ``model.embed_tokens``), leaf name as in PEFT (``q_proj``), ``all-linear``, or a regular expression for absolute
    paths. None selects every linear layer of the last ``num_layers`` layers except the routers of mixtures of experts.
    An empty tuple selects none, for adapters that only train ``modules_to_save`` or ``trainable_token_indices``.

    Besides the low-rank matrices, an adapter may train modules in full (``modules_to_save``), biases (``bias``) and
    rows of an embedding (``trainable_token_indices``); ``Adapter`` lists the names of their arrays. VeRA
    (arXiv:2310.11454) has one rank and no scale; its shared projections are drawn from ``projection_prng_key`` as in
    PEFT. (IA)^3 (arXiv:2205.05638) has neither.

    An output head that is tied to the embedding is also called ``lm_head``. As in PEFT, it can be adapted or trained
    separately from the embedding, whose ``embedding_side`` is then "input".
    """

    help_section = "Adapter"

    method: str = common("lora", "Adapter method; full trains the layers themselves.", choices=METHODS)
    rank: int = common(None, f"Rank of the update (default: {DEFAULT_RANK}; vera: {VERA_RANK}).")
    scale: float = option(None, f"Multiplier of the update, alpha / rank (default: {DEFAULT_SCALE:g}; vera has none).")
    alpha: float | None = common(None, "PEFT's lora_alpha, instead of scale: scale = alpha / rank.")
    rslora: bool = option(False, "Use scale = alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732); requires alpha.")
    dropout: float = option(0.0, "Dropout on the adapter's input during training.")
    keys: tuple[str, ...] | None = option(None, "Modules to adapt (default: all linear layers of the chosen layers).")
    target_parameters: tuple[str, ...] | None = more(
        None, "Expert parameters to adapt, by PEFT's names, such as mlp.experts.gate_up_proj."
    )
    num_layers: int | None = common(
        None, f"Adapt the last N layers; -1 for all (default: {DEFAULT_LAYERS}, or all of a smaller model)."
    )
    layers_to_transform: tuple[int, ...] | None = more(
        None, "Adapt the layers with these indices, counted from 0, instead of the last num_layers."
    )
    rank_pattern: dict[str, int] = more({}, "Rank of the modules that match a regular expression.")
    scale_pattern: dict[str, float] = more({}, "Scale of the modules that match a regular expression.")
    alpha_pattern: dict[str, float] = more({}, "PEFT's lora_alpha of the modules that match a regular expression.")
    init: str = option(
        "default",
        "Initialisation: default (A uniform, B zero), gaussian, orthogonal, pissa, pissa_niter_N (randomized SVD), "
        "olora, loftq, eva or lora_ga.",
    )
    init_batches: int | None = more(
        None, "eva, lora_ga: number of batches to read at most (default: eva 32, lora_ga 8)."
    )
    eva_rho: float | None = more(
        None, "eva: a layer's rank may grow by this factor (default: 2; 1 keeps the ranks equal)."
    )
    eva_tau: float | None = more(None, "eva: cosine similarity at which a component has converged (default: 0.99).")
    bias: str = more("none", "Also train biases: all of the model's, or those of the adapted layers.", choices=BIASES)
    lora_bias: bool = more(False, "Add a trainable bias to the update (PEFT's lora_bias).")
    modules_to_save: tuple[str, ...] | None = more(
        None, "Modules to train in full besides the adapter, such as lm_head."
    )
    trainable_token_indices: dict[str, tuple[int, ...]] = more({}, "Train only these rows of an embedding.")
    embedding_side: str = more(
        "both",
        "For an embedding tied to the output head, what the update acts on: both (mlx-lm) or input (PEFT).",
        choices=("both", "input"),
    )
    feedforward_modules: tuple[str, ...] | None = more(
        None, f"ia3: modules whose input is scaled, not the output (default: {', '.join(FEEDFORWARD)})."
    )
    projection_prng_key: int = more(0, "vera: seed of the shared projections.")
    save_projection: bool = more(True, "vera: save the shared projections, not only their seed.")
    d_initial: float = more(0.1, "vera: initial value of lambda_d.")

    def __post_init__(self):
        check_types(self)
        for name in ("keys", "target_parameters", "modules_to_save", "layers_to_transform", "feedforward_modules"):
            value = getattr(self, name)
            if isinstance(value, int if name == "layers_to_transform" else str):
                value = (value,)
            self._set(name, None if value is None else tuple(value))
        self._set_defaults()
        faults = []
        if self.method not in METHODS:
            faults.append(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        tokens = self.trainable_token_indices.items()
        several = {k: tuple(v) if isinstance(v, (list, tuple, set)) else (v,) for k, v in tokens}
        self._set("trainable_token_indices", several)
        ranks = {"rank": self.rank, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if value is None and name == "rank":  # "full" has none
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.append(f"{name} must be an integer of at least 1, not {value!r}")
        scales = {"scale": self.scale, **{f"scale_pattern[{k!r}]": v for k, v in self.scale_pattern.items()}}
        scales |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()} | {"alpha": self.alpha}
        for name, value in scales.items():
            if value is None and name in ("scale", "alpha"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                faults.append(f"{name} must be a finite number, not {value!r}")
            elif value == 0:
                faults.append(f"{name} is 0: the adapter would have no effect and could not learn")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), not {self.dropout!r}")
        layers = 0 if self.num_layers is None else self.num_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < -1:
            faults.append(f"num_layers must be -1 (all), 0 or more, not {self.num_layers!r}")
        if self.rslora and self.alpha is None and not self.alpha_pattern:
            faults.append("rslora needs alpha: the scale is alpha / sqrt(rank)")
        if self.keys == () and not (self.target_parameters or self.modules_to_save or self.trainable_token_indices):
            faults.append("keys is empty: name at least one module, or leave keys out")
        for name in ("rank_pattern", "scale_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    faults.append(f"{name}: {pattern!r} is not a regular expression ({error})")
        raise_all(faults + self._contradictions() + without_effect(self, _ADAPTER_RULES), self)

    def __hash__(self) -> int:
        return hash((self.method, self.rank, self.scale, self.keys))  # equal configs have equal hashes; dicts have none

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_defaults(self) -> None:
        defaults = self.defaults()
        if self.rank is None:
            self._set("rank", defaults.get("rank"))
        if self.scale is None and self.alpha is None:
            self._set("scale", defaults.get("scale"))

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the method; "full" has no rank and no scale."""
        if self.method == "full":
            return {}
        rank = {"vera": VERA_RANK, "ia3": 1}.get(self.method, DEFAULT_RANK)
        return {"rank": rank, "scale": 1.0 if self.method in UNSCALED else DEFAULT_SCALE}

    def _contradictions(self) -> list[str]:
        """Faults: invalid values, settings that the method does not have, and settings that contradict each other."""
        faults = []
        for name in ("keys", "target_parameters", "modules_to_save", "feedforward_modules"):
            if any(not isinstance(item, str) for item in getattr(self, name) or ()):
                faults.append(f"{name} must be names of modules, not {list(getattr(self, name))!r}")
        if self.init not in INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", self.init or ""):
            faults.append(f"init must be one of {', '.join(INITS)} or pissa_niter_N, not {self.init!r}")
        for name, allowed in (("bias", BIASES), ("embedding_side", ("both", "input"))):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name, ids in self.trainable_token_indices.items():
            if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
                faults.append(f"trainable_token_indices[{name!r}] must be token ids, not {list(ids)!r}")
            elif len(set(ids)) != len(ids):
                faults.append(f"trainable_token_indices[{name!r}] names a token twice")
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.layers_to_transform or ()):
            faults.append(f"layers_to_transform must be indices of layers, not {list(self.layers_to_transform)!r}")
        if self.init not in ("default", "gaussian", "orthogonal") and self.method not in ("lora", "full"):
            faults.append(f"init {self.init!r} is for lora, not for {self.method}")
        elif self.init != "default" and self.method == "vera":
            faults.append(f"init {self.init!r} is for low-rank methods, not for {self.method}")
        for name, least in (("init_batches", 1), ("eva_rho", 1), ("eva_tau", 0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf
            if value is not None and not number:
                faults.append(f"{name} must be a number of at least {least}, not {value!r}")
        if self.lora_bias and self.init not in ("default", "gaussian"):
            faults.append(f"lora_bias cannot be combined with init {self.init!r}")
        if self.alpha is not None and self.scale is not None:
            faults.append(f"alpha {self.alpha:g} and scale {self.scale:g} contradict each other: scale is alpha / rank")
        for pattern in self.scale_pattern.keys() & self.alpha_pattern.keys():
            faults.append(f"scale_pattern and alpha_pattern both name {pattern!r}, and scale is alpha / rank")
        if self.feedforward_modules is not None and self.method != "ia3":
            faults.append(f"feedforward_modules is for ia3, not for {self.method}")
        if not isinstance(self.d_initial, (int, float)) or not math.isfinite(self.d_initial) or self.d_initial == 0:
            faults.append(f"d_initial must be a number other than 0, not {self.d_initial!r}")
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
            faults.append(f"projection_prng_key must be an integer from 0 to 2^64 - 1, not {key!r}")
        return list(dict.fromkeys(faults))

    def check_used(self) -> None:
        """Refuse low-rank settings if no module gets a low-rank update. Adapters read from files may hold them."""
        adapts = (lambda c: c.keys != () or bool(c.target_parameters)), "has no effect where keys is empty"
        raise_all(without_effect(self, ((_LOW_RANK, *adapts), (("num_layers",), *adapts))), self)

    def last_layers(self, total: int) -> int:
        """How many of a model's ``total`` layers ``num_layers`` selects. Raises: ConfigError: it has fewer."""
        if (self.num_layers or 0) > total:
            raise ConfigError(
                f"num_layers is {self.num_layers}, but the model has {total} layers", "Use -1 for all of them."
            )
        wanted = DEFAULT_LAYERS if self.num_layers is None else self.num_layers
        return min(wanted, total) if wanted > 0 else total

    def doubts(self) -> list[str]:
        """Warnings about settings that are valid but probably a mistake."""
        stated = {"scale": self.scale, **{f"scale_pattern[{k!r}]": v for k, v in self.scale_pattern.items()}}
        found = [
            f"{name} {value:g} is a multiplier, alpha / rank: here alpha is {value * self.rank:g} at rank {self.rank}. "
            f"You probably meant --alpha {abs(value):g} (scale {abs(value) / self.rank:g})."
            for name, value in stated.items()
            if value is not None and abs(value) > LARGEST_SCALE
        ]
        alphas = {"alpha": self.alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        found += [
            f"{name} {value:g} is negative: training then learns an update that is subtracted. Use a positive one."
            for name, value in {**stated, **alphas}.items()
            if value is not None and value < 0 and (name in alphas or value >= -LARGEST_SCALE)
        ]
        # rsLoRA's alpha of twice the rank is a scale of 2 sqrt(rank), 22.6 at rank 128.
        most = max(LARGEST_SCALE, 2 * math.sqrt(self.rank)) if self.rslora else LARGEST_SCALE
        scale = 0.0 if self.alpha is None else self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        if abs(scale) > most:
            found.append(
                f"alpha {self.alpha:g} at rank {self.rank} multiplies the update by {scale:g}. Alpha is usually "
                f"between the rank and twice the rank ({self.rank} to {2 * self.rank})."
            )
        return found

    def rank_of(self, path: str) -> int:
        """The rank of the module at ``path``."""
        return match_pattern(self.rank_pattern, path, self.rank)

    def is_feedforward(self, path: str) -> bool:
        """(IA)^3: whether the module at ``path`` scales its input instead of its output."""
        names = FEEDFORWARD if self.feedforward_modules is None else self.feedforward_modules
        return f".{path}".endswith(tuple(f".{name}" for name in names))

    def scale_of(self, path: str) -> float:
        """The multiplier of the low-rank update of the module at ``path``."""
        rank = self.rank_of(path)
        alpha = match_pattern(self.alpha_pattern, path, self.alpha)
        default = self.scale if alpha is None else alpha / (math.sqrt(rank) if self.rslora else rank)
        return float(match_pattern(self.scale_pattern, path, default))


_LOW_RANK = (
    *("rank", "scale", "alpha", "rslora", "dropout", "rank_pattern", "scale_pattern", "alpha_pattern", "init"),
    *("lora_bias", "target_parameters"),
)


_BESIDES = ("keys", "bias", "modules_to_save", "trainable_token_indices", "layers_to_transform", "embedding_side")
_ADAPTER_RULES = (
    (
        (*_LOW_RANK, *_BESIDES),
        lambda c: c.method != "full",
        "cannot be used with full, which trains the layers themselves",
    ),
    (
        ("scale", "alpha", "rslora", "rank_pattern", "scale_pattern", "alpha_pattern"),
        lambda c: c.method not in UNSCALED,
        "cannot be used with {method}, which has no scale and no rank per module",
    ),
    (("rank", "dropout"), lambda c: c.method != "ia3", "cannot be used with ia3, which has no matrices A and B"),
    (("lora_bias",), lambda c: c.method in ("lora", "full"), "is for lora, not for {method}"),
    (
        ("projection_prng_key", "save_projection", "d_initial"),
        lambda c: c.method == "vera",
        "is for vera, not for {method}",
    ),
    (("init_batches",), lambda c: c.init in ("eva", "lora_ga"), "is for init eva and lora_ga, not for {init!r}"),
    (("eva_rho", "eva_tau"), lambda c: c.init == "eva", "is for init eva, not for {init!r}"),
    (
        ("num_layers",),
        lambda c: c.layers_to_transform is None,
        "has no effect with layers_to_transform, which names the layers",
    ),
)


def ignored_alpha(parameters: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """mlx-lm's ``lora_parameters`` without the ``alpha`` that mlx-lm ignores, and that alpha (or None).

    mlx-lm multiplies the update by ``scale`` and ignores alpha. Only from 2024-01-24 to 2024-06-02 did it multiply by
    scale * alpha / rank; a file with ``lora_layers`` and alpha may be from these months. Without a scale, alpha is
    PEFT's and stays.
    """
    if parameters.get("scale") is None:
        return parameters, None
    return {k: v for k, v in parameters.items() if k != "alpha"}, parameters.get("alpha")


def match_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``path`` or a dotted suffix of it (PEFT's rule)."""
    for pattern, value in patterns.items():
        if _suffix_pattern(pattern).match(path):
            return value
    return default


@functools.lru_cache(maxsize=8192)  # an adapter may have one pattern per module; the cache of re holds 512
def _suffix_pattern(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")
