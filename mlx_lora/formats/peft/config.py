"""PEFT's ``adapter_config.json``, checked and read as an ``AdapterConfig``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import raise_faults
from ...config import AdapterConfig, match_pattern
from ...errors import ConfigError, FormatError
from ..files import AGAIN, wrong_settings
from ..options import ReadOptions
from . import as_lora
from .names import CONFIG

_TYPES = ("LORA", "DORA", "VERA", "IA3", "TRAINABLE_TOKENS", "LN_TUNING", *as_lora.TYPES)
# Methods that do not update weights: PEFT cannot merge them either.
_PROMPTS = (
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
_ROUTED = ("XLORA", "POLY", "MIXED")  # several adapters, chosen for every input
_MERGE = "Merge it in PEFT (model.merge_and_unload(), then model.save_pretrained) and use the merged model."
_NOT_MERGED = "It depends on the input, so it cannot be merged either: use it in PEFT."
# Settings that change the meaning of the tensors and are not converted, unless their value turns them off, and what
# to do. (VeLoRA only changes the backward pass.)
_VARIANTS = {
    "layer_replication": ("layer replication, which makes a model of more layers", _MERGE),
    "use_qalora": ("QA-LoRA, which averages the inputs of groups", _MERGE),
    "use_bdlora": ("BD-LoRA, whose matrices are block-diagonal", _MERGE),
    "kasa_config": ("KaSA, which truncates the base's weights", _MERGE),
    "monteclora_config": ("MonteCLoRA, which samples the update", _MERGE),
    "alora_invocation_tokens": ("activated LoRA, which acts only after its invocation tokens", _NOT_MERGED),
    "arrow_config": ("Arrow, which chooses among several adapters", _NOT_MERGED),
}
_TYPES_OF = {
    **dict.fromkeys(("target_parameters", "token_indices", "modules_to_save"), list),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict),
    **dict.fromkeys(("peft_version", "base_model_name_or_path"), str),
    "trainable_token_indices": (list, dict),
    "init_lora_weights": (bool, str),
}


def check_config(raw: dict[str, Any], source: Path) -> None:
    """Raise a ``FormatError`` for a config that is not PEFT's, or of a method that is not converted."""
    kind = raw.get("peft_type")
    if kind is None:
        raise FormatError(
            f"{source}: has no peft_type, so it is not a PEFT config",
            f'If PEFT made it, write "peft_type": "LORA" into {CONFIG}.',
        )
    if kind not in _TYPES:
        hint, why = _MERGE, f"({', '.join(_TYPES)} are)"
        if kind in (*_PROMPTS, *_ROUTED):
            hint = _NOT_MERGED
            why = "(it adds vectors to the prompt)" if kind in _PROMPTS else "(it chooses among several adapters)"
        raise FormatError(f"{source}: peft_type {kind} is not converted {why}", hint)
    given = {name: variant for name, variant in _VARIANTS.items() if raw.get(name)}
    faults = [f"{source}: {what} ({name}), is not converted" for name, (what, _) in given.items()]
    hints = [hint for _, hint in given.values()]
    hint = _NOT_MERGED if _NOT_MERGED in hints else _MERGE if hints else AGAIN
    if raw.get("bias", "none") not in ("none", "all", "lora_only", "vera_only"):
        faults.append(f"{source}: unknown bias {raw['bias']!r}")
    faults += [
        f"{source}: not a LoRA config of PEFT ({name} is a {type(raw[name]).__name__})"
        for name, kinds in _TYPES_OF.items()
        if raw.get(name) is not None and not isinstance(raw[name], kinds)
    ]
    names = raw.get("target_parameters") or []
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        faults.append(f"{source}: target_parameters must be names")
    raise_faults(faults, hint, FormatError)


def method_of(raw: dict[str, Any]) -> str:
    if raw["peft_type"] in ("VERA", "IA3"):
        return raw["peft_type"].lower()
    return "dora" if raw.get("use_dora") or raw["peft_type"] == "DORA" else "lora"


@contextmanager
def config_errors(source: Path) -> Iterator[None]:
    """Turn the errors that wrong settings cause into a ``FormatError`` that names the config."""
    try:
        yield
    except ConfigError as error:
        raise wrong_settings(source / CONFIG, error) from None
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
        fault = f"not a LoRA config of PEFT ({type(error).__name__}: {error})"
        raise wrong_settings(source / CONFIG, fault) from None


def rank_and_scale_rules(raw: dict[str, Any], source: Path) -> tuple[Callable[[str], int], Callable[[str], float]]:
    """Two functions: the rank and the multiplier of the module at PEFT's path."""

    def rank(path: str) -> int:
        with config_errors(source):
            return match_pattern(raw.get("rank_pattern") or {}, path, raw["r"])

    def scale(path: str) -> float:
        with config_errors(source):
            alpha = match_pattern(raw.get("alpha_pattern") or {}, path, raw.get("lora_alpha", 8))
            return alpha / (math.sqrt(rank(path)) if raw.get("use_rslora") else float(rank(path)))

    return rank, scale


def adapter_config(
    raw: dict[str, Any],
    weights: dict[str, mx.array],
    ranks: dict[str, int],
    scales: dict[str, float],
    peft_paths: dict[str, str],
    source: Path,
    options: ReadOptions,
    sides: str,
) -> AdapterConfig:
    """``raw`` as an ``AdapterConfig`` for the arrays ``weights``.

    Args:
        ranks, scales: keyed by our module path.
        peft_paths: {our module path: PEFT's}, including tensors that repeat others.
        source: the folder, for errors.
        sides: the ``embedding_side``.
    """
    method = method_of(raw)
    settings: dict[str, Any] = {"method": method, "num_layers": -1, "embedding_side": sides}
    with config_errors(source):
        if method == "vera":
            settings |= {"rank": raw["r"], "dropout": raw.get("vera_dropout", 0.0)}
            settings |= {k: raw[k] for k in ("projection_prng_key", "save_projection", "d_initial") if k in raw}
        elif method == "ia3":
            vectors = {n.removesuffix(".ia3_l"): w for n, w in weights.items() if n.endswith(".ia3_l")}
            settings["feedforward_modules"] = sorted(path for path, w in vectors.items() if w.shape[0] == 1)
        elif raw["peft_type"] not in ("TRAINABLE_TOKENS", "LN_TUNING"):  # which have no rank
            rank, alpha = raw["r"], raw.get("lora_alpha", 8)
            scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else float(rank))
            settings |= {"rank": rank, "scale": scale, "dropout": raw.get("lora_dropout", 0.0)}
            settings["rank_pattern"] = {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != rank}
            settings["scale_pattern"] = {f"^{re.escape(p)}": s for p, s in sorted(scales.items()) if s != scale}
            settings["lora_bias"] = bool(raw.get("lora_bias"))
        bias = raw.get("bias", "none")
        settings["bias"] = "lora_only" if bias == "vera_only" else bias
        full = _full_modules(raw, weights, peft_paths, source)
        if full:
            settings["modules_to_save"] = full
        if any(n.endswith(".trainable_tokens") for n in weights):
            settings["trainable_token_indices"] = _token_ids(raw, weights, peft_paths, source)
        return AdapterConfig(**settings)


def _full_modules(raw, weights, peft_paths, source: Path) -> tuple[str, ...]:
    """The modules whose own parameters are saved: ``modules_to_save``, and modules with a bias if ``bias`` is none."""
    paths = {n.rpartition(".")[0] for n in weights if n.endswith((".weight", ".bias"))}
    theirs = set(peft_paths.values())
    absent = [n for n in raw.get("modules_to_save") or [] if not any(f".{n}." in f".{path}." for path in theirs)]
    if absent:
        raise FormatError(
            f"{source / CONFIG}: modules_to_save names {', '.join(absent)}, which the weights do not contain",
            "Save or download the adapter again.",
        )
    if raw.get("bias", "none") == "none":
        return tuple(sorted(paths))
    return tuple(sorted({n.rpartition(".")[0] for n in weights if n.endswith(".weight")}))


def _token_ids(raw, weights, peft_paths, source: Path) -> dict[str, tuple[int, ...]]:
    """The ids of trained rows, by our path of the embedding."""
    stated = raw.get("trainable_token_indices", raw.get("token_indices"))
    found = {}
    for path in [n.removesuffix(".trainable_tokens") for n in weights if n.endswith(".trainable_tokens")]:
        ids = stated
        if isinstance(stated, dict):
            names = (peft_paths.get(path, path), path)
            ids = next((v for k, v in stated.items() if any(f".{name}".endswith(f".{k}") for name in names)), None)
        if not isinstance(ids, list):
            raise FormatError(
                f"{source / CONFIG}: names no token ids for {path}",
                "Write them into trainable_token_indices, in the order of the rows.",
            )
        found[path] = tuple(ids)
    return found
