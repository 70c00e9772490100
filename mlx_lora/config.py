"""Every option of mlx-lora, with its default, its help text and its section of ``--help``.

A field's name is the Python argument, the YAML key and, with dashes, the flag. Names and defaults are mlx-lm's
wherever mlx-lm has the option. Validation raises one ``ConfigError`` that lists every fault. This file imports the
standard library only, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

DEFAULT_RANK, DEFAULT_SCALE, DEFAULT_LAYERS = 8, 20.0, 16
VERA_RANK = 256  # PEFT's default
# A scale above this is questioned. 20 is the largest default of any tool (mlx-lm's; it was 10 before 2024-10), and
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
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon", "lion")
SCHEDULES = ("constant", "linear_schedule", "cosine_decay", "exponential_decay", "step_decay")
REPORTERS = ("wandb", "swanlab")
# Without a validation set: the share of the training rows held out for it, at most so many, of at least so many.
HOLD_OUT, HOLD_OUT_MOST, HOLD_OUT_FROM = 0.05, 500, 20


# Sections of ``train --help``, in their order. ``help_section`` is the section of a config's fields without one.
COMMON, MORE = "Common options", "More adapter options"
SECTIONS = (COMMON, "Model and data", "Adapter", MORE, "Optimizer", "Run", "Output")


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with a help text. ``extra``: ``choices`` and ``section``, for the command line."""
    metadata = {"help": help, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


common, more = functools.partial(option, section=COMMON), functools.partial(option, section=MORE)


@dataclass(frozen=True)
class AdapterConfig:
    """The method, size, scale and modules of an adapter.

    The low-rank update of a layer is ``y = W x + scale * B A x``. The scale of a module is, in this order: its entry
    in ``scale_pattern``; ``alpha / rank`` if ``alpha`` is given or ``alpha_pattern`` names the module (with ``rslora``
    ``alpha / sqrt(rank)``, arXiv:2312.03732); ``scale``. Pattern keys are regular expressions, matched as PEFT does:
    against the whole module path or any dotted suffix of it; the first match counts. ``scale`` stays None beside
    ``alpha``, and so do ``rank`` and ``scale`` with "full", which has neither.

    ``keys`` selects modules by path inside a layer (``self_attn.q_proj``), absolute path (``lm_head``,
    ``model.embed_tokens``), leaf name as in PEFT (``q_proj``), ``all-linear``, or a regular expression for absolute
    paths. None selects every linear layer of the last ``num_layers`` layers except the routers of mixtures of experts.
    An empty tuple selects none, for adapters that only train ``modules_to_save`` or ``trainable_token_indices``.

    Besides the low-rank matrices, an adapter may train modules in full (``modules_to_save``), biases (``bias``) and
    rows of an embedding (``trainable_token_indices``); ``Adapter`` lists the names of their arrays. VeRA
    (arXiv:2310.11454) has one rank and no scale; its shared projections are drawn from ``projection_prng_key`` as in
    PEFT. (IA)^3 (arXiv:2205.05638) has neither.

    An output head that is tied to the embedding is ``lm_head`` here, too: as in PEFT it can be adapted or trained apart
    from the embedding, whose ``embedding_side`` is then "input".
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
        if self.rank is None and self.method != "full":
            self._set("rank", default_rank(self.method))
        if self.scale is None and self.alpha is None and self.method != "full":
            self._set("scale", default_scale(self.method))

    def _contradictions(self) -> list[str]:
        """Faults of settings that are wrong by themselves, for the method, or together with another one."""
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
        """Refuse settings of low-rank updates where no module gets one. An adapter that is read may hold them."""
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
        """Warnings about settings that are valid, and hardly what was meant."""
        stated = {"scale": self.scale, **{f"scale_pattern[{k!r}]": v for k, v in self.scale_pattern.items()}}
        found = [
            f"{name} {value:g} is a multiplier, alpha / rank: here alpha is {value * self.rank:g} at rank {self.rank}. "
            f"You probably meant --alpha {abs(value):g} (scale {abs(value) / self.rank:g})."
            for name, value in stated.items()
            if value is not None and abs(value) > LARGEST_SCALE
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
        """ia3: whether the input of the module at ``path`` is scaled, and not its output."""
        names = FEEDFORWARD if self.feedforward_modules is None else self.feedforward_modules
        return f".{path}".endswith(tuple(f".{name}" for name in names))

    def scale_of(self, path: str) -> float:
        """The multiplier of the low-rank update of the module at ``path``."""
        rank = self.rank_of(path)
        alpha = match_pattern(self.alpha_pattern, path, self.alpha)
        default = self.scale if alpha is None else alpha / (math.sqrt(rank) if self.rslora else rank)
        return float(match_pattern(self.scale_pattern, path, default))


def default_rank(method: str) -> int:
    return {"vera": VERA_RANK, "ia3": 1}.get(method, DEFAULT_RANK)


def default_scale(method: str) -> float:
    return 1.0 if method in UNSCALED else DEFAULT_SCALE


def without_effect(config: Any, rules: tuple) -> list[str]:
    """A fault for each field that is set although, by ``rules``, it has no effect on ``config``.

    A rule is (names of fields, a function that says whether they act, the reason if they do not). A reason may name
    fields of the config in braces.
    """
    facts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return [
        f"{name} {reason.format(**facts)}"
        for names, acts, reason in rules
        if not acts(config)
        for name in names
        if is_set(config, name)
    ]


def is_set(config: Any, name: str) -> bool:
    """Whether the field ``name`` has a value other than its default; an explicit default cannot be told apart."""
    default = next(f.default for f in dataclasses.fields(config) if f.name == name)
    value = getattr(config, name)
    if name in ("rank", "scale") and config.method != "full":  # their defaults depend on the method
        default = (default_rank if name == "rank" else default_scale)(config.method)
    return value not in (None, {}, default)


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
        "cannot be used with {method}, which has no ranks of single modules and no scale",
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
        "has no effect beside layers_to_transform, which names the layers",
    ),
)


def ignored_alpha(parameters: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """mlx-lm's ``lora_parameters`` without the ``alpha`` that mlx-lm passes over, and that alpha; None without one.

    mlx-lm multiplies the update by ``scale``, whatever alpha is beside it. Only from 2024-01-24 to 2024-06-02 did it
    multiply by scale * alpha / rank; a file with ``lora_layers`` and alpha may be from these months. Without a scale,
    alpha is PEFT's and stays.
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


@dataclass(frozen=True)
class DataConfig:
    """The data set, and which of its tokens to learn."""

    help_section = "Model and data"

    data: str = common(
        "mlx-community/WikiSQL",
        "Folder with train.jsonl, valid.jsonl and test.jsonl, one such file, or a Hugging Face data set. Files may "
        "also be .json, .csv, .tsv, .parquet or .arrow, and compressed (.gz).",
    )
    valid_split: float | None = option(
        None,
        "Share of the training rows to hold out for validation, where there is no validation set; the same rows in "
        f"every run (default: {HOLD_OUT}, at most {HOLD_OUT_MOST} rows, of {HOLD_OUT_FROM} or more; 0 for none).",
    )
    mask_prompt: bool = common(False, "Compute the loss only on completions or assistant turns.")
    mask_turns: str = option("all", "With mask_prompt: the assistant turns that count.", choices=("all", "last"))
    max_seq_length: int = option(2048, "Truncate rows to this many tokens.")
    text_feature: str = option("text", "Key of the text in text rows.")
    prompt_feature: str = option("prompt", "Key of the prompt in completion rows.")
    completion_feature: str = option("completion", "Key of the completion in completion rows.")
    chat_feature: str = option("messages", "Key of the messages in chat rows.")
    hf_dataset: Any = option(None, "mlx-lm's hf_dataset section (YAML only): a mapping or a list of mappings.")

    def __post_init__(self):
        check_types(self)
        faults = []
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 2:
            faults.append(f"max_seq_length must be at least 2, not {self.max_seq_length!r}")
        if self.mask_turns not in ("all", "last"):
            faults.append(f"mask_turns must be 'all' or 'last', not {self.mask_turns!r}")
        share = self.valid_split
        if share is not None and (isinstance(share, bool) or not 0 <= share < 1):
            faults.append(f"valid_split must be a share of at least 0 and below 1, not {share!r}")
        raise_all(faults + without_effect(self, _DATA_RULES), self)


_DATA_RULES = (
    (("mask_turns",), lambda c: c.mask_prompt, "has no effect without mask_prompt"),
    (("data",), lambda c: not c.hf_dataset, "has no effect beside hf_dataset, which names the data sets"),
)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    help_section = "Optimizer"

    optimizer: str = option("adam", "Optimizer.", choices=OPTIMIZERS)
    optimizer_config: dict[str, dict] = option({}, "Arguments by optimizer, {adamw: {weight_decay: 0.1}}.")
    learning_rate: float = common(1e-5, "Learning rate.")
    lr_schedule: Any = option(None, f"{', '.join(SCHEDULES)}, or mlx-lm's {{name, arguments, warmup, warmup_init}}.")
    warmup: int = option(0, "Optimizer steps over which the learning rate rises from 0.")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+ (arXiv:2402.12354): learning rate of B and of vectors, as a multiple of A's, such as 16."
    )
    loraplus_lr_embedding: float | None = option(
        None, "LoRA+: learning rate of low-rank matrices of embeddings (default: 1e-6)."
    )
    loraplus_weight_decay: float | None = option(
        None, "LoRA+: weight decay of everything but biases and LayerNorms (default: 0)."
    )

    def __post_init__(self):
        check_types(self)
        faults = []
        if self.optimizer not in OPTIMIZERS:
            faults.append(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (0 < rate < math.inf):
            faults.append(f"learning_rate must be a positive number, not {rate!r}")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            faults.append(f"warmup must be a number of steps, not {self.warmup!r}")
        for name in ("loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "loraplus_weight_decay"):
                faults.append(f"{name} must be a positive number, not {value!r}")
            elif self.loraplus_lr_ratio is None:
                faults.append(f"{name} needs loraplus_lr_ratio (LoRA+)")
        known = (
            {self.optimizer, "adamw"} if self.optimizer == "muon" else {self.optimizer}
        )  # muon leaves vectors to adamw
        for name in sorted(self.optimizer_config.keys() - known) if self.optimizer in OPTIMIZERS else ():
            if name in OPTIMIZERS and self.optimizer_config[name]:
                faults.append(f"optimizer_config: {name} has no effect, the optimizer is {self.optimizer}")
        own_rate = chooses_own_rate(self.optimizer, self.optimizer_config)
        if self.learning_rate != OptimizerConfig.learning_rate and own_rate:
            faults.append(f"learning_rate {rate} has no effect: adafactor with relative_step chooses its own")
        first = first_rate(self.lr_schedule)
        if self.learning_rate not in (OptimizerConfig.learning_rate, first) and first is not None:
            faults.append(
                f"learning_rate {rate} has no effect: the arguments of lr_schedule begin with the rate {first}"
            )
        raise_all(faults, self)


def chooses_own_rate(optimizer: str, arguments: dict[str, Any]) -> bool:
    """Whether the optimizer takes no learning rate: adafactor with ``relative_step``."""
    own = arguments.get(optimizer)
    return optimizer == "adafactor" and isinstance(own, dict) and own.get("relative_step") is True


def first_rate(lr_schedule: Any) -> float | None:
    """The learning rate that the arguments of mlx-lm's schedule mapping begin with; None where they give none."""
    arguments = lr_schedule.get("arguments") if isinstance(lr_schedule, dict) else None
    try:
        return float(arguments[0])
    except (TypeError, ValueError, LookupError):
        return None


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run, its batches and its reports. One iteration is one batch."""

    help_section = "Run"

    iters: int = common(1000, "Iterations (batches) to train for.")
    batch_size: int = common(4, "Rows per batch.")
    pack: bool = option(
        False,
        "Place several rows side by side in each sequence of --max-seq-length tokens; every row attends to itself "
        "alone, and none is cut for it. --batch-size then counts sequences.",
    )
    loss: str = option("cross_entropy", "Name of the loss.")
    grad_accumulation_steps: int = option(1, "Batches per optimizer step; every token has the same weight.")
    max_grad_norm: float | None = option(None, "Clip the gradient to this global norm.")
    val_batches: int = option(25, "Validation batches; -1 for the whole set.")
    steps_per_report: int = option(10, "Iterations between reports of the training loss.")
    steps_per_eval: int = option(200, "Iterations between validations.")
    save_every: int = option(100, "Iterations between checkpoints.", section="Output")
    grad_checkpoint: bool = option(False, "Recompute activations in the backward pass to save memory.")
    clear_cache_threshold: int | None = option(
        None,
        "Empty MLX's cache of freed memory after a step that leaves it larger than this "
        "(default: keep it, up to a quarter of the GPU's working set).",
    )
    max_skipped_steps: int = option(10, "Stop after this many steps in a row with non-finite gradients.")
    seed: int = option(0, "Seed of the initialisation, dropout and the order of the data.")

    def __post_init__(self):
        check_types(self)
        faults = []
        for name in (
            "iters",
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "save_every",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.append(f"{name} must be an integer of at least 1, not {value!r}")
        if not isinstance(self.val_batches, int) or self.val_batches < -1:
            faults.append(f"val_batches must be -1 (all), 0 (none) or more, not {self.val_batches!r}")
        most = self.clear_cache_threshold
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            faults.append(f"clear_cache_threshold must be a number of bytes, not {most!r}")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and 0 < norm < math.inf):
            faults.append(f"max_grad_norm must be a positive number, not {norm!r}")
        if not isinstance(self.max_skipped_steps, int) or self.max_skipped_steps < 1:
            faults.append(f"max_skipped_steps must be at least 1, not {self.max_skipped_steps!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            faults.append(f"seed must be an integer from 0 to 2^32 - 1, not {self.seed!r}")
        raise_all(faults + without_effect(self, _TRAIN_RULES), self)


_TRAIN_RULES = ((("steps_per_eval",), lambda c: c.val_batches != 0, "has no effect where val_batches is 0"),)


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate text."""

    help_section = "Generation"

    max_tokens: int = option(256, "Maximum number of tokens to generate.")
    temp: float = option(0.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Sample from the most likely tokens that together have this probability.")
    min_p: float = option(0.0, "Drop tokens whose probability is below this fraction of the most likely token's.")
    top_k: int = option(0, "Sample from this many most likely tokens; 0 for all.")
    seed: int | None = option(None, "Seed of the sampling (default: a new one each time).")

    def __post_init__(self):
        check_types(self)
        faults = []
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            faults.append(f"max_tokens must be at least 1, not {self.max_tokens!r}")
        if not 0 <= self.temp < math.inf:
            faults.append(f"temp must be 0 or more, not {self.temp!r}")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            faults.append(f"min_p must be in [0, 1], not {self.min_p!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            faults.append(f"top_k must be 0 or more, not {self.top_k!r}")
        raise_all(faults, self)


_TYPES = {  # by the first word of a field's annotation: the types to accept, and what to call them
    "dict": (dict, "a mapping"),
    "tuple": ((list, tuple, set, frozenset, str), "a list"),
    "str": (str, "text"),
    "bool": (int, "true or false"),
    "float": ((int, float), "a number"),
}


def check_types(config: Any) -> None:
    """Raise a ``ConfigError`` that lists the fields whose values do not have the annotated type."""
    faults = []
    for known in dataclasses.fields(config):
        name, value = re.match(r"\w+", known.type)[0], getattr(config, known.name)
        if name not in _TYPES or (value is None and known.default is None):
            continue
        types, what = _TYPES[name]
        valid = isinstance(value, types) or (known.name == "layers_to_transform" and isinstance(value, int))
        if not valid or (name == "float" and isinstance(value, bool)):
            faults.append(f"{known.name} must be {what}, not {value!r}")
        elif name == "dict" and not all(isinstance(key, str) for key in value):
            faults.append(f"{known.name} must have text keys, not {list(value)!r}")
    raise_all(faults, config)


def as_config(kind: type, value: Any, name: str) -> Any:
    """``value`` as a ``kind`` of config: a mapping of its fields becomes one, and None the default.

    Raises: ConfigError: it is something else, or names fields that ``kind`` does not have.
    """
    if isinstance(value, kind):
        return value
    known = [field.name for field in dataclasses.fields(kind)]
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f"{name} must be {kind.__name__} or a dict of its fields, not {type(value).__name__}",
            f"Write {name}={kind.__name__}(...).",
        )
    if unknown := [str(key) for key in value or {} if key not in known]:
        raise ConfigError(f"{name}: {kind.__name__} has no {', '.join(unknown)}", f"It has: {', '.join(known)}.")
    return kind(**(value or {}))


def raise_all(faults: list[str], config: Any) -> None:
    """Raise one ``ConfigError`` that lists ``faults``, or return where there are none.

    Each fault begins with the name of a field of ``config``; the hint explains these fields.
    """
    if faults:
        named = [re.match(r"\w+", fault)[0] for fault in faults]
        hints = [_hint(field) for field in dataclasses.fields(config) if field.name in named]
        raise ConfigError("\n".join(faults), "\n".join(hints))


def _hint(field: dataclasses.Field) -> str:
    default, help = field.default, field.metadata["help"]
    if default is None or default is False or default is dataclasses.MISSING:
        return f"{field.name}: {help} " + ("Leave it out for the default." if "default" in help else "Or leave it out.")
    return f"{field.name}: {help} Leave it out for the default ({default})."
