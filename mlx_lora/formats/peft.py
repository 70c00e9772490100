"""Hugging Face PEFT's adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

Keys are ``base_model.model.<module path>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r], transposed to ours;
DoRA adds ``lora_magnitude_vector`` [out]. The multiplier is nowhere in the tensors: it is ``lora_alpha / r``, or
``lora_alpha / sqrt(r)`` with ``use_rslora``, by module through ``rank_pattern`` and ``alpha_pattern``. What this file
does not convert it refuses by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ..adapter import Adapter, raise_faults, split_layer
from ..config import AdapterConfig, match_pattern
from ..errors import ConfigError, FormatError
from .files import read_json, read_safetensors, write_json, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Our leaf -> PEFT's, and how the array turns.
LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_OURS = {**{theirs: ours for ours, theirs in LEAVES.items()}, "lora_magnitude_vector.weight": "m"}

# Settings that change what the tensors mean, and are not converted (values that switch them off aside).
_VARIANTS = {
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on parameters (mixtures of experts)",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "LoRA biases",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_EXPERTS = re.compile(r"\.experts(\.|$)")
# Initialisations after which the base is no longer the one on disk.
_MUTATES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def detect(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / "adapter_model.bin").exists()


def files(folder: Path) -> list[Path]:
    """What ``write`` would replace."""
    return [folder / CONFIG, folder / WEIGHTS]


def read(folder: Path) -> Adapter:
    if not (folder / CONFIG).exists():
        raise FormatError(f"{folder}: has no {CONFIG}", "The rank and alpha are in it: copy it beside the weights.")
    raw = read_json(folder / CONFIG)
    _refuse_variants(raw, folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        raise FormatError(
            f"{folder}: adapter_model.bin is a pickle, which this reader does not open",
            "Save it as safetensors: model.save_pretrained(folder, safe_serialization=True).",
        )
    tensors = read_safetensors(folder / WEIGHTS)
    weights, faults = {}, []
    for name, array in tensors.items():
        path, ours = _split(name)
        if ours is None:
            faults.append(f"{name}: not an array of linear LoRA or DoRA")
            continue
        if _EXPERTS.search(path):
            faults.append(f"{name}: adapters of experts are not converted")
        key = f"{path}.{ours}"
        if key in weights:
            faults.append(f"{name}: a second array for {key}")
        if array.ndim != 2 and ours != "m":
            faults.append(f"{name}: shape {list(array.shape)}, expected two dimensions")
        weights[key] = array.reshape(-1) if ours == "m" else array.T
    method = "dora" if raw.get("use_dora") else "lora"
    has_magnitude = any(key.endswith(".m") for key in weights)
    if has_magnitude != (method == "dora") and weights:
        faults.append(
            f"use_dora is {bool(raw.get('use_dora'))} but magnitudes are {'there' if has_magnitude else 'not'}"
        )
    raise_faults([f"{folder}: {fault}" for fault in faults], "Convert adapters of plain linear layers.", FormatError)
    paths = {key.rpartition(".")[0] for key in weights}
    return Adapter(_config(raw, method, paths, folder / CONFIG), weights, base=raw.get("base_model_name_or_path"))


def write(adapter: Adapter, folder: Path) -> None:
    config = adapter.config
    faults = []
    if config.method == "full":
        faults.append("fully trained weights are no adapter in PEFT; fuse them into a model instead")
    for path in adapter.modules if config.method != "full" else []:
        if adapter.weights[f"{path}.lora_a"].ndim == 3:
            faults.append(f"{path}: adapters of experts are not converted")
        if re.search(r"(^|\.)(wte|wpe|\w*embed\w*)$", path):
            faults.append(f"{path}: adapters of embeddings are not converted")
    raise_faults(faults, "Leave those modules out of the adapter, or fuse it.", FormatError)
    exact = adapter.exact_config()
    alpha = _integral(exact.scale * exact.rank)
    alphas = {path: _integral(exact.scale_of(path) * exact.rank_of(path)) for path in adapter.modules}
    targets, layers = _targets(adapter.modules)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": exact.rank,
        "lora_alpha": alpha,
        "lora_dropout": exact.dropout,
        "target_modules": targets,
        "use_dora": config.method == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # whatever the start was: PEFT would apply it to the base again
    }
    if layers is not None:
        raw["layers_to_transform"] = layers
    if exact.rank_pattern:
        raw["rank_pattern"] = exact.rank_pattern
    if pattern := {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha}:
        raw["alpha_pattern"] = pattern
    tensors = {}
    for name, array in adapter.weights.items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{path}.{LEAVES[leaf]}"] = array if leaf == "m" else array.T
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, raw)


def _refuse_variants(raw: dict[str, Any], source: Path) -> None:
    kind = raw.get("peft_type")
    if kind is None:
        raise FormatError(f"{source}: has no peft_type: not a PEFT config", "Is this another system's adapter?")
    if kind != "LORA":
        raise FormatError(f"{source}: peft_type {kind} is not converted (LORA is)")
    faults = [f"{source}: {what} ({name}) is not converted" for name, what in _VARIANTS.items() if raw.get(name)]
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MUTATES_BASE):
        faults.append(f"{source}: init_lora_weights {start!r} changed the base model, which is not in this folder")
    if raw.get("bias", "none") != "none":
        faults.append(f"{source}: trained biases (bias: {raw['bias']!r}) are not converted")
    raise_faults(
        faults,
        "Save it from PEFT as a plain LoRA (path_initial_model_for_weight_conversion=...), or merge it there.",
        FormatError,
    )


def _split(name: str) -> tuple[str, str | None]:
    """A PEFT tensor name -> (module path, our leaf), or (name, None) for one that is not linear LoRA or DoRA."""
    for theirs, ours in _OURS.items():
        # An adapter's name, stripped by PEFT on saving, is tolerated as PEFT tolerates it.
        head, _, tail = theirs.partition(".")
        named = f".{head}.default" + (f".{tail}" if tail else "")
        for suffix in (f".{theirs}", named):
            if name.startswith(PREFIX) and name.endswith(suffix):
                return name[len(PREFIX) : -len(suffix)], ours
    return name, None


def _config(raw: dict[str, Any], method: str, paths: set[str], source: Path) -> AdapterConfig:
    try:
        rank, alpha = raw["r"], raw.get("lora_alpha", 8)
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        rank_of = {path: match_pattern(ranks, path, rank) for path in paths}
        root = math.sqrt if raw.get("use_rslora") else float
        scales = {path: match_pattern(alphas, path, alpha) / root(rank_of[path]) for path in paths}
        default = alpha / root(rank)
        return AdapterConfig(
            method=method,
            rank=rank,
            scale=default,
            dropout=raw.get("lora_dropout", 0.0),
            num_layers=-1,
            rank_pattern={f"^{re.escape(path)}": r for path, r in sorted(rank_of.items()) if r != rank},
            scale_pattern={f"^{re.escape(path)}": s for path, s in sorted(scales.items()) if s != default},
        )
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
        raise FormatError(f"{source}: not a LoRA config of PEFT ({type(error).__name__}: {error})") from None


def _targets(modules: list[str]) -> tuple[list[str], list[int] | None]:
    """``target_modules`` and ``layers_to_transform`` that select precisely ``modules`` in any base.

    Names relative to a layer where every adapted layer has the same ones, else full paths: PEFT would put adapters
    on every other match too, and warn of missing keys.
    """
    split = [split_layer(path) for path in modules]
    layers = sorted({layer for layer, _ in split if layer is not None})
    names = sorted({name for _, name in split})
    stems = {path.removesuffix(f".{layer}.{name}") for path, (layer, name) in zip(modules, split, strict=True)}
    if len(stems) == 1 and None not in {layer for layer, _ in split} and len(modules) == len(layers) * len(names):
        return names, layers
    return sorted(modules), None


def _integral(alpha: float) -> int | float:
    """16.000000001 -> 16: alpha is scale * rank, and readers in Go and C want an integer."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
