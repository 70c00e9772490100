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
from ..files import wrong_settings
from ..options import ReadOptions
from .names import CONFIG, EMBEDDING_NAME

_TYPES = ("LORA", "DORA", "VERA", "TRAINABLE_TOKENS")
# Settings that change what the tensors mean, and are not converted, unless their value switches them off.
_VARIANTS = {
    "layer_replication": "layer replication",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
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
        raise FormatError(f"{source}: peft_type {kind} is not converted ({', '.join(_TYPES)} are)", "Merge it in PEFT.")
    faults = [f"{source}: {variant} ({name}) is not converted" for name, variant in _VARIANTS.items() if raw.get(name)]
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
    raise_faults(faults, "Merge it into the model in PEFT.", FormatError)


def method_of(raw: dict[str, Any]) -> str:
    if raw["peft_type"] == "VERA":
        return "vera"
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
) -> AdapterConfig:
    """``raw`` as an ``AdapterConfig`` for the arrays ``weights``.

    Args:
        ranks, scales: by our module path.
        peft_paths: PEFT's module path by ours.
        source: the folder, for errors.
    """
    method = method_of(raw)
    settings: dict[str, Any] = {"method": method, "num_layers": -1}
    with config_errors(source):
        if method == "vera":
            settings |= {"rank": raw["r"], "dropout": raw.get("vera_dropout", 0.0)}
            settings |= {k: raw[k] for k in ("projection_prng_key", "save_projection", "d_initial") if k in raw}
        elif raw["peft_type"] != "TRAINABLE_TOKENS":
            rank, alpha = raw["r"], raw.get("lora_alpha", 8)
            scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else float(rank))
            settings |= {"rank": rank, "scale": scale, "dropout": raw.get("lora_dropout", 0.0)}
            settings["rank_pattern"] = {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != rank}
            settings["scale_pattern"] = {f"^{re.escape(p)}": s for p, s in sorted(scales.items()) if s != scale}
            settings["lora_bias"] = bool(raw.get("lora_bias"))
        if any(n.endswith((".lora_a", ".weight")) and EMBEDDING_NAME.search(n[:-7]) for n in weights):
            tied = raw.get("ensure_weight_tying") and not any(n.endswith("lm_head.lora_a") for n in weights)
            untied = options.known_base is not None and not options.known_base.tied
            settings["embedding_side"] = "both" if tied or untied else "input"
        bias = raw.get("bias", "none")
        settings["bias"] = "lora_only" if bias == "vera_only" else bias
        full = _full_modules(raw, weights, peft_paths, source)
        if full:
            settings["modules_to_save"] = full
        if any(n.endswith(".trainable_tokens") for n in weights):
            settings["trainable_token_indices"] = _token_ids(raw, weights, source)
        return AdapterConfig(**settings)


def _full_modules(raw, weights, peft_paths, source: Path) -> tuple[str, ...]:
    """The modules whose own parameters are saved: ``modules_to_save``, and those with a bias where ``bias`` is none."""
    paths = {n.rpartition(".")[0] for n in weights if n.endswith((".weight", ".bias"))}
    theirs = {peft_paths.get(path, path) for path in paths}
    absent = [n for n in raw.get("modules_to_save") or [] if not any(f".{n}." in f".{path}." for path in theirs)]
    if absent:
        raise FormatError(
            f"{source / CONFIG}: modules_to_save names {', '.join(absent)}, which the weights do not contain",
            "Save or download the adapter again.",
        )
    if raw.get("bias", "none") == "none":
        return tuple(sorted(paths))
    return tuple(sorted({n.rpartition(".")[0] for n in weights if n.endswith(".weight")}))


def _token_ids(raw, weights, source: Path) -> dict[str, tuple[int, ...]]:
    """The ids of trained rows, by our path of the embedding."""
    stated = raw.get("trainable_token_indices", raw.get("token_indices"))
    found = {}
    for path in [n.removesuffix(".trainable_tokens") for n in weights if n.endswith(".trainable_tokens")]:
        ids = stated
        if isinstance(stated, dict):
            ids = next((v for k, v in stated.items() if path == k or path.endswith("." + k)), None)
        if not isinstance(ids, list):
            raise FormatError(
                f"{source / CONFIG}: names no token ids for {path}",
                "Write them into trainable_token_indices, in the order of the rows.",
            )
        found[path] = tuple(ids)
    return found
