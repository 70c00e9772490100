"""Every knob of mlx-lora on one page. Standard library only, so that the command line can read it in no time.

A field's name is the Python argument, the YAML key and, with dashes, the flag; its default and help are written here
and nowhere else. Names and defaults are mlx-lm's wherever mlx-lm has the knob. Validation raises one ``ConfigError``
that lists every fault.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

DEFAULT_RANK, DEFAULT_SCALE = 8, 20.0
VERA_RANK = 256  # PEFT's default: two vectors a module cost next to nothing
# The arrays a method keeps for each module it adapts. Under "full" an adapter holds whole parameters of the model.
LEAVES = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m"), "vera": ("vera_lambda_d", "vera_lambda_b")}
METHODS = (*LEAVES, "full")
BIASES = ("none", "all", "lora_only")
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga")
OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon", "lion")
SCHEDULES = ("constant", "linear_schedule", "cosine_decay", "exponential_decay", "step_decay")
REPORTERS = ("wandb", "swanlab")


def knob(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with its help text. ``extra``: ``choices``, for the command line."""
    metadata = {"help": help, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is: method, size, scale and where it sits.

    The multiplier of the low-rank update, ``y = W x + scale * B A x``, is for each module: its entry in
    ``scale_pattern``; else ``alpha / rank`` (``alpha / sqrt(rank)`` with ``rslora``, arXiv:2312.03732) where ``alpha``
    is given or ``alpha_pattern`` names the module; else ``scale``. Pattern keys are regular expressions matched as PEFT
    matches them: against the whole module path or any dotted suffix of it, first match wins.

    ``keys`` selects modules: paths relative to a layer (``self_attn.q_proj``), absolute paths (``lm_head``,
    ``model.embed_tokens``), PEFT leaf names (``q_proj``), ``all-linear``, or regular expressions over absolute paths.
    None means every linear layer of the last ``num_layers`` layers, routers of mixtures of experts left out. An empty
    tuple means none, where something else is trained.

    Beside the method's arrays an adapter may train whole modules (``modules_to_save``), biases (``bias``), and rows of
    an embedding (``trainable_token_indices``); see ``Adapter`` for the names of their arrays. VeRA has no multiplier
    and one rank: its shared projections are drawn from ``projection_prng_key`` as PEFT draws them.
    """

    method: str = knob("lora", "The adapter method; full trains the layers themselves.", choices=METHODS)
    rank: int = knob(None, f"Rank of the low-rank update; {DEFAULT_RANK} by default, {VERA_RANK} for vera.")
    scale: float = knob(
        None, f"Multiplier of the low-rank update (alpha = scale * rank); {DEFAULT_SCALE:g} by default; vera has none."
    )
    alpha: float | None = knob(None, "PEFT's lora_alpha, in place of scale: scale = alpha / rank.")
    rslora: bool = knob(False, "Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732); needs alpha.")
    dropout: float = knob(0.0, "Dropout on the input of the low-rank path, in training.")
    keys: tuple[str, ...] | None = knob(None, "Modules to adapt; default: every linear of the chosen layers.")
    target_parameters: tuple[str, ...] | None = knob(
        None, "PEFT's names of experts' parameters to adapt, such as mlp.experts.gate_up_proj."
    )
    num_layers: int = knob(16, "Adapt the last N layers; -1 for all of them.")
    layers_to_transform: tuple[int, ...] | None = knob(
        None, "Adapt the layers of these numbers, from 0, in place of the last num_layers."
    )
    rank_pattern: dict[str, int] = knob({}, "Rank by module, {regular expression: rank}.")
    scale_pattern: dict[str, float] = knob({}, "Scale by module, {regular expression: scale}.")
    alpha_pattern: dict[str, float] = knob({}, "PEFT's lora_alpha by module, {regular expression: alpha}.")
    init: str = knob(
        "default",
        "How the update starts: default (A uniform, B = 0), gaussian, orthogonal, pissa, pissa_niter_N (randomized), "
        "olora, loftq, eva or lora_ga.",
    )
    init_batches: int | None = knob(None, "eva, lora_ga: read at most so many batches; 32 and 8 by default.")
    eva_rho: float | None = knob(None, "eva: a layer may get up to so many times its rank; 2 by default, 1: no more.")
    eva_tau: float | None = knob(None, "eva: cosine at which a direction counts as settled; 0.99 by default.")
    bias: str = knob("none", "Also train biases: of the whole model, or of the adapted layers.", choices=BIASES)
    lora_bias: bool = knob(False, "Give the update a bias of its own (PEFT's lora_bias).")
    modules_to_save: tuple[str, ...] | None = knob(None, "Modules to train whole beside the adapter, such as lm_head.")
    trainable_token_indices: dict[str, tuple[int, ...]] = knob(
        {}, "Train these rows of an embedding alone, {module: [token ids]}."
    )
    embedding_side: str = knob(
        "both",
        "Where an embedding's update acts if the model ties its output to it: both (as mlx-lm) or input (as PEFT).",
        choices=("both", "input"),
    )
    projection_prng_key: int = knob(0, "VeRA: the seed of the shared projections (PEFT's name).")
    save_projection: bool = knob(True, "VeRA: save the shared projections too, not their seed alone.")
    d_initial: float = knob(0.1, "VeRA: what lambda_d starts from.")

    def __post_init__(self):
        check_kinds(self)
        for name in ("keys", "target_parameters", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, int if name == "layers_to_transform" else str):
                value = (value,)
            self._set(name, None if value is None else tuple(value))
        vera = self.method == "vera"
        if self.rank is None:
            self._set("rank", VERA_RANK if vera else DEFAULT_RANK)
        if self.scale is None:
            self._set("scale", 1.0 if vera else DEFAULT_SCALE)
        faults = []
        if self.method not in METHODS:
            faults.append(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        tokens = self.trainable_token_indices.items()
        several = {k: tuple(v) if isinstance(v, (list, tuple, set)) else (v,) for k, v in tokens}
        self._set("trainable_token_indices", several)
        ranks = {"rank": self.rank, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                faults.append(f"{name} must be a whole number of at least 1, not {value!r}")
        scales = {"scale": self.scale, **{f"scale_pattern[{k!r}]": v for k, v in self.scale_pattern.items()}}
        scales |= {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        if self.alpha is not None:
            scales["alpha"] = self.alpha
        for name, value in scales.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                faults.append(f"{name} must be a finite number, not {value!r}")
            elif value == 0:
                faults.append(f"{name} is 0: such an adapter does nothing and cannot learn")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), not {self.dropout!r}")
        if isinstance(self.num_layers, bool) or not isinstance(self.num_layers, int) or self.num_layers < -1:
            faults.append(f"num_layers must be -1 (all) or a number of layers, not {self.num_layers!r}")
        if self.rslora and self.alpha is None and not self.alpha_pattern:
            faults.append("rslora divides alpha by sqrt(rank): give alpha")
        if self.keys == () and not (self.target_parameters or self.modules_to_save or self.trainable_token_indices):
            faults.append("keys is empty: name at least one module, or leave keys out")
        for name in ("rank_pattern", "scale_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    faults.append(f"{name}: {pattern!r} is not a regular expression ({error})")
        raise_all(faults + self._contradictions(), self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _contradictions(self) -> list[str]:
        """Settings that each exist, and that the method or one another cannot honour."""
        faults = []
        for name in ("keys", "target_parameters", "modules_to_save"):
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
            faults.append(f"layers_to_transform must be numbers of layers, not {list(self.layers_to_transform)!r}")
        if self.lora_bias and self.method != "lora":
            faults.append(f"lora_bias is for lora, not for {self.method}")
        if self.init not in ("default", "gaussian", "orthogonal") and self.method != "lora":
            faults.append(f"init {self.init!r} is for lora, not for {self.method}")
        if self.init != "default" and self.method not in ("lora", "dora"):
            faults.append(f"init {self.init!r} is for low-rank methods, not for {self.method}")
        needs = {"init_batches": ("eva", "lora_ga"), "eva_rho": ("eva",), "eva_tau": ("eva",)}
        for name, inits in needs.items():
            value, least = getattr(self, name), 0 if name == "eva_tau" else 1
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                faults.append(f"{name} must be a number of at least {least}, not {value!r}")
            elif self.init not in inits:
                faults.append(f"{name} is of init {' and '.join(inits)}, not of {self.init!r}")
        if self.lora_bias and self.init not in ("default", "gaussian"):
            faults.append(f"lora_bias starts with a plain adapter, not with init {self.init!r}")
        if self.method == "vera":
            given = [
                n for n in ("alpha", "rslora", "rank_pattern", "scale_pattern", "alpha_pattern") if getattr(self, n)
            ]
            given += ["scale"] if self.scale != 1 else []
            faults += [f"{name}: vera has one rank and no multiplier" for name in given]
        if not isinstance(self.d_initial, (int, float)) or not math.isfinite(self.d_initial) or self.d_initial == 0:
            faults.append(f"d_initial must be a number other than 0, not {self.d_initial!r}")
        key = self.projection_prng_key
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**64:
            faults.append(f"projection_prng_key must be a whole number from 0 to 2^64 - 1, not {key!r}")
        if self.method == "full":
            extra = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layers_to_transform")
            plain = {f.name: f.default for f in dataclasses.fields(self)}
            given = [n for n in extra if getattr(self, n) not in (None, {}, plain[n])]
            faults += [f"{name}: full fine-tuning trains the layers themselves" for name in given]
        return list(dict.fromkeys(faults))

    def rank_of(self, path: str) -> int:
        """The rank of the module at ``path``."""
        return match_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The multiplier of the low-rank update of the module at ``path``."""
        rank = self.rank_of(path)
        alpha = match_pattern(self.alpha_pattern, path, self.alpha)
        default = self.scale if alpha is None else alpha / (math.sqrt(rank) if self.rslora else rank)
        return float(match_pattern(self.scale_pattern, path, default))


def match_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``path`` whole or a dotted suffix of it (PEFT's rule)."""
    for pattern, value in patterns.items():
        if _suffix_pattern(pattern).match(path):
            return value
    return default


@functools.lru_cache(maxsize=8192)  # an adapter may carry a pattern a module; the re module keeps 512
def _suffix_pattern(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")


@dataclass(frozen=True)
class DataConfig:
    """Which rows to learn from, and which of their tokens."""

    data: str = knob(
        "mlx-community/WikiSQL", "Folder with {train,valid,test}.jsonl, a .jsonl file, or a dataset's name."
    )
    mask_prompt: bool = knob(False, "Learn the answers only: assistant turns, or completions.")
    mask_turns: str = knob("all", "With mask_prompt: which assistant turns to learn.", choices=("all", "last"))
    max_seq_length: int = knob(2048, "Longer rows are cut to this many tokens.")
    text_feature: str = knob("text", "Key of the text in text rows.")
    prompt_feature: str = knob("prompt", "Key of the prompt in completion rows.")
    completion_feature: str = knob("completion", "Key of the completion in completion rows.")
    chat_feature: str = knob("messages", "Key of the messages in chat rows.")
    hf_dataset: Any = knob(None, "mlx-lm's hf_dataset section (YAML only): a mapping or a list of them.")

    def __post_init__(self):
        check_kinds(self)
        faults = []
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 2:
            faults.append(f"max_seq_length must be at least 2, not {self.max_seq_length!r}")
        if self.mask_turns not in ("all", "last"):
            faults.append(f"mask_turns must be 'all' or 'last', not {self.mask_turns!r}")
        raise_all(faults, self)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    optimizer: str = knob("adam", "The optimizer.", choices=OPTIMIZERS)
    optimizer_config: dict[str, dict] = knob({}, "Arguments by optimizer, {adamw: {weight_decay: 0.1}}.")
    learning_rate: float = knob(1e-5, "The learning rate.")
    lr_schedule: Any = knob(None, "A schedule's name, or mlx-lm's mapping {name, arguments, warmup, warmup_init}.")
    warmup: int = knob(0, "Optimizer steps from 0 to the learning rate.")
    loraplus_lr_ratio: float | None = knob(
        None, "LoRA+ (arXiv:2402.12354): B and vectors learn this many times faster than A, such as 16."
    )
    loraplus_lr_embedding: float | None = knob(
        None, "LoRA+: the rate of embeddings' low-rank matrices; 1e-6 by default."
    )
    loraplus_weight_decay: float | None = knob(
        None, "LoRA+: weight decay (0 by default) of all but biases, LayerNorms."
    )

    def __post_init__(self):
        check_kinds(self)
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
                faults.append(f"{name} is of LoRA+: give loraplus_lr_ratio")
        raise_all(faults, self)


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions to train. One iteration is one batch; see ``grad_accumulation_steps``."""

    iters: int = knob(1000, "Iterations (batches) to train for.")
    batch_size: int = knob(4, "Rows in a batch.")
    grad_accumulation_steps: int = knob(1, "Batches to an optimizer step; tokens, not batches, weigh equally.")
    max_grad_norm: float | None = knob(None, "Clip the gradient to this global norm.")
    val_batches: int = knob(25, "Validation batches; -1 for the whole set.")
    steps_per_report: int = knob(10, "Iterations between reports of the training loss.")
    steps_per_eval: int = knob(200, "Iterations between validations.")
    save_every: int = knob(100, "Iterations between checkpoints.")
    grad_checkpoint: bool = knob(False, "Recompute activations in the backward pass to save memory.")
    clear_cache_threshold: int | None = knob(
        None,
        "Empty MLX's cache of freed memory after a step that leaves it larger than this; by default it is reused, "
        "up to a quarter of the GPU's working set.",
    )
    max_skipped_steps: int = knob(10, "Stop after so many steps in a row with non-finite gradients.")
    seed: int = knob(0, "Seeds initialisation, dropout and the order of the data.")

    def __post_init__(self):
        check_kinds(self)
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
                faults.append(f"{name} must be a whole number of at least 1, not {value!r}")
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
            faults.append(f"seed must be a whole number from 0 to 2^32 - 1, not {self.seed!r}")
        raise_all(faults, self)


@dataclass(frozen=True)
class GenerateConfig:
    """How to sample from a model."""

    max_tokens: int = knob(256, "Tokens to generate at most.")
    temp: float = knob(0.0, "Sampling temperature; 0 takes the likeliest token.")
    top_p: float = knob(1.0, "Sample from the likeliest tokens that hold this much probability.")
    min_p: float = knob(0.0, "Drop tokens less likely than this share of the likeliest.")
    top_k: int = knob(0, "Sample from this many likeliest tokens; 0 for all.")
    seed: int | None = knob(None, "Seed of the sampling; a fresh one each time by default.")

    def __post_init__(self):
        check_kinds(self)
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


_KINDS = {  # by the first word of a field's annotation
    "dict": (dict, "a mapping"),
    "tuple": ((list, tuple, set, frozenset, str), "a list"),
    "str": (str, "text"),
    "bool": (int, "true or false"),
    "float": ((int, float), "a number"),
}


def check_kinds(config: Any) -> None:
    """Raise a ``ConfigError`` that names every field whose value is of another kind than its annotation says."""
    faults = []
    for known in dataclasses.fields(config):
        kind, value = re.match(r"\w+", known.type)[0], getattr(config, known.name)
        if kind not in _KINDS or (value is None and known.default is None):
            continue
        types, what = _KINDS[kind]
        fits = isinstance(value, types) or (known.name == "layers_to_transform" and isinstance(value, int))
        if not fits or (kind == "float" and isinstance(value, bool)):
            faults.append(f"{known.name} must be {what}, not {value!r}")
        elif kind == "dict" and not all(isinstance(key, str) for key in value):
            faults.append(f"{known.name} must have names for its keys, not {list(value)!r}")
    raise_all(faults, config)


def raise_all(faults: list[str], config: Any) -> None:
    """Raise one ``ConfigError`` naming every fault, or return where there is none.

    Each fault begins with the field of ``config`` that it is about; the hint says what these are and how to do without.
    """
    if faults:
        first = [re.match(r"\w+", fault)[0] for fault in faults]
        raise ConfigError("\n".join(faults), "\n".join(_mend(f) for f in dataclasses.fields(config) if f.name in first))


def _mend(field: dataclasses.Field) -> str:
    told, default = field.metadata["help"], field.default
    if default is None or default is False or default is dataclasses.MISSING:
        return f"{field.name}: {told} Leave it out {'for that' if 'default' in told else 'to do without'}."
    return f"{field.name}: {told} Leave it out for {default}."


def replace(config: Any, **changes: Any) -> Any:
    """``dataclasses.replace`` under a name that callers need not import."""
    return dataclasses.replace(config, **changes)
