"""mlx-lm's adapter folder, the native format: ``adapters.safetensors`` and ``adapter_config.json``.

mlx-lm has one rank and one scale for all modules. If modules differ, smaller ranks are padded with zeros and the
scales are folded into ``lora_b``, so that mlx-lm computes the same function. ``rank_pattern`` and ``scale_pattern``,
which mlx-lm ignores, let this reader undo that.

What mlx-lm cannot express (VeRA, biases, full parameters, rows of embeddings, an embedding's update on the input side
only) is written unchanged, with the whole config in an entry ``mlx_lora``, and with ``lora_parameters`` null: every
version of mlx-lm then stops with an error, instead of silently computing something else.
"""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import FINGERPRINT, Adapter, raise_faults, split_layer
from ..config import DEFAULT_LAYERS, LEAVES, AdapterConfig, ignored_alpha
from ..errors import ConfigError, FormatError
from .files import read_json, read_npz, read_safetensors, write_json, write_safetensors, wrong_settings
from .options import EMBEDDINGS, ReadOptions, WriteOptions, is_embedding
from .state_dicts import low_rank_adapter
from .uniform import fold, unfold

CONFIG, WEIGHTS, ARCHIVE = "adapter_config.json", "adapters.safetensors", "adapters.npz"
READS, WRITES, FILES = {"alpha", "legacy_scale"}, set(), (CONFIG, WEIGHTS, ARCHIVE)
OWN = "mlx_lora"  # the entry for what mlx-lm cannot express
_NO_CONFIG = (
    f"Copy the adapter's {CONFIG} into the folder, or give alpha = scale * rank with --alpha "
    "(mlx-lm's scale was 20: --alpha 160 at rank 8)."
)
_AS_TRAINED = 'Write there how it was trained, such as "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}.'
PEFT = "peft"  # the entry for what only a PEFT folder needs: fields of its config without meaning here
_FILE = re.compile(rf"(\d+_)?{re.escape(WEIGHTS)}")  # the weights, or a numbered checkpoint's weights
_WRITTEN = {"checkpoint", "fine_tune_type", "num_layers", "lora_parameters", "model", OWN, PEFT, FINGERPRINT}


def detect(path: Path) -> bool:
    if path.is_file():
        return bool(_FILE.fullmatch(path.name))
    return (path / WEIGHTS).exists() or (path / ARCHIVE).exists()


def read(path: Path, options: ReadOptions) -> Adapter:
    """For a file of weights, such as a numbered checkpoint, the config is in the same folder."""
    folder, file = (path.parent, path) if path.is_file() else (path, path / WEIGHTS)
    weights = read_safetensors(file) if file.exists() else read_npz(folder / ARCHIVE)
    if not (folder / CONFIG).exists():  # mlx-lm before March 2024 wrote none
        return low_rank_adapter(weights, folder, options, alpha_hint=_NO_CONFIG)
    raw = read_json(folder / CONFIG)
    if options.alpha is not None:
        raise ConfigError(f"--alpha: {folder / CONFIG} already stores the scale", "Leave --alpha out.")
    if not raw.keys() & {OWN, "fine_tune_type", "full_state_modules"} and weights and not _has_updates(weights):
        # mlx-lm-lora writes train_type or nothing, and gives a rank in any case
        raw = {**raw, "fine_tune_type": "full"}
    config = parse_config(raw, folder / CONFIG, options)
    weights = {name: _unflatten(name, array, weights) for name, array in weights.items()}
    metadata = {"mlx-lm": {k: v for k, v in raw.items() if k not in _WRITTEN and not k.startswith("unsloth_")}}
    if isinstance(peft := raw.get(PEFT), dict):
        metadata |= {PEFT: {k: v for k, v in peft.items() if k != EMBEDDINGS}}
        metadata |= {EMBEDDINGS: peft[EMBEDDINGS]} if isinstance(peft.get(EMBEDDINGS), list) else {}
    metadata |= {FINGERPRINT: raw[FINGERPRINT]} if FINGERPRINT in raw else {}
    adapter = Adapter(config, weights, base=raw.get("model") or raw.get("base_model_name_or_path"), metadata=metadata)
    folded = (config.rank_pattern or config.scale_pattern) and OWN not in raw
    return unfold(adapter) if folded else adapter


def _has_updates(weights: dict[str, mx.array]) -> bool:
    """Whether an array belongs to an update, not to parameters of the model itself."""
    leaves = {leaf for method in LEAVES.values() for leaf in method}
    return any(name.rpartition(".")[2] in leaves for name in weights)


def _unflatten(name: str, a: mx.array, weights: dict[str, mx.array]) -> mx.array:
    """Before mlx-lm 0.28.3, experts had lora_a [experts * r, in] with lora_b [experts, out, r]."""
    b = weights.get(name.removesuffix("lora_a") + "lora_b") if name.endswith(".lora_a") else None
    if b is None or b.ndim != 3 or a.ndim != 2 or a.shape[0] != b.shape[0] * b.shape[2]:
        return a
    return a.reshape(b.shape[0], b.shape[2], -1)


def parse_config(raw: dict[str, Any], source: Path, options: ReadOptions | None = None) -> AdapterConfig:
    """mlx-lm's ``adapter_config.json`` as an ``AdapterConfig``; ``source`` names it in errors.

    mlx-lm-lora, mlx-tune and Unsloth write the same file with additional entries.
    """
    options = options or ReadOptions()
    if "peft_type" in raw and not isinstance(raw.get("lora_parameters"), dict):
        raise FormatError(f"{source}: is a PEFT config, but the weights are mlx-lm's", "Use a folder for each format.")
    if OWN in raw:
        return _own_config(raw[OWN], source)
    inner = raw.get("lora_parameters") if isinstance(raw.get("lora_parameters"), dict) else {}
    dora = raw.get("use_dora") or inner.get("use_dora")  # the latter is mlx-lm-lora's
    method = raw.get("fine_tune_type") or ("dora" if dora else "lora")
    if method not in ("lora", "dora", "full"):
        raise FormatError(
            f"{source}: unknown fine_tune_type {method!r}", "Write there how it was trained: lora, dora or full."
        )
    layers = raw.get("num_layers", raw.get("lora_layers", -1))
    if method == "full":
        return _config(source, method=method, num_layers=layers)
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(f"{source}: lora_parameters is missing", _AS_TRAINED)
    parameters, alpha = ignored_alpha({**parameters})
    if alpha is not None and "lora_layers" in raw:
        if options.legacy_scale is None:
            options.need(
                f"{source}: lora_layers with alpha: the mlx-lm versions that wrote this give scale different meanings",
                "Give --legacy-scale alpha if the adapter was made from 2024-01-24 to 2024-06-02 (scale * alpha / "
                "rank), else --legacy-scale scale.",
            )
        elif options.legacy_scale == "alpha":
            try:
                parameters["scale"] = parameters["scale"] * alpha / parameters["rank"]
            except (KeyError, TypeError, ZeroDivisionError):
                raise FormatError(
                    f"{source}: lora_parameters has no numbers for scale, alpha and rank", _AS_TRAINED
                ) from None
    elif options.legacy_scale is not None:
        raise ConfigError("--legacy-scale: the scale of this adapter has one meaning only", "Leave it out.")
    parameters.pop("use_dora", None)
    if isinstance(parameters.get("num_layers"), int):
        layers = raw.get("num_layers", parameters.pop("num_layers"))
    parameters.pop("num_layers", None)
    if raw.get("full_state_modules"):  # modules that Unsloth trained in full
        parameters["modules_to_save"] = raw["full_state_modules"]
    known = {"rank", "scale", "dropout", "keys", "rank_pattern", "scale_pattern", "modules_to_save"}
    faults = []
    if missing := sorted({"rank", "scale"} - parameters.keys()):
        faults.append(f"{source}: lora_parameters has no {' and no '.join(missing)}")
    if unknown := sorted(parameters.keys() - known):
        faults.append(f"{source}: lora_parameters has unknown entries: {', '.join(unknown)}")
    raise_faults(faults, _AS_TRAINED, FormatError)
    return _config(source, method=method, num_layers=layers, **parameters)


def _config(source: Path, **knobs: Any) -> AdapterConfig:
    try:
        return AdapterConfig(**knobs)
    except (ConfigError, TypeError, AttributeError) as error:  # values in a file may have any type
        raise wrong_settings(source, error) from None


def _own_config(own: Any, source: Path) -> AdapterConfig:
    known = {f.name for f in fields(AdapterConfig)}
    if not isinstance(own, dict) or (unknown := sorted(own.keys() - known)):
        what = f"unknown entries: {', '.join(unknown)}" if isinstance(own, dict) else "no settings"
        raise FormatError(f"{source}: {OWN} has {what}", "Install the mlx-lora that wrote it, or a newer one.")
    return _config(source, **own)


def expressible(adapter: Adapter) -> bool:
    """Whether mlx-lm can compute what this adapter does."""
    config = adapter.config
    if config.method == "full":
        return True
    plain = config.method in ("lora", "dora") and not config.lora_bias and adapter.modules
    both_sides = config.embedding_side == "both" or not any(
        path.rpartition(".")[2] == "lm_head" or is_embedding(path, adapter) for path in adapter.modules
    )
    return bool(plain) and both_sides and not adapter.full_parameters and not adapter.tokens


def stored_weights(adapter: Adapter) -> dict[str, mx.array]:
    """The arrays as ``write`` stores them."""
    if adapter.config.method == "full" or not expressible(adapter):
        return adapter.weights
    return fold(adapter, _stored_config(adapter))


def _for_peft(adapter: Adapter) -> dict[str, Any]:
    """What a PEFT folder made from this one needs: other config fields, and embeddings that names do not reveal."""
    found = {k: v for k, v in adapter.metadata.get(PEFT, {}).items() if k != "saved"}  # arrays, equal to the base's
    said = adapter.metadata.get(EMBEDDINGS)
    if said is not None and any(
        (path in said) != is_embedding(path, replace(adapter, metadata={})) for path in adapter.modules
    ):
        found[EMBEDDINGS] = sorted(said)
    return found


def _stored_config(adapter: Adapter) -> AdapterConfig:
    return adapter.exact_config(rank=max(adapter.rank_of(path) for path in adapter.modules))


def write(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    config = adapter.config
    raw = {**adapter.metadata.get("mlx-lm", {}), "fine_tune_type": config.method}
    raw["num_layers"] = DEFAULT_LAYERS if config.num_layers is None else config.num_layers
    if adapter.base:
        raw["model"] = adapter.base
    if peft := _for_peft(adapter):
        raw[PEFT] = peft
    if fingerprint := adapter.metadata.get(FINGERPRINT):
        raw[FINGERPRINT] = fingerprint
    if config.method == "full":
        raw["lora_parameters"] = None
    elif not expressible(adapter):
        raw["lora_parameters"] = None
        exact = adapter.exact_config()
        raw[OWN] = {k: v for k, v in asdict(exact).items() if v is not None and v != {}}
    else:
        config = _stored_config(adapter)
        raw["lora_parameters"] = {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": sorted({split_layer(path)[1] for path in adapter.modules}),
        }
        for name in ("rank_pattern", "scale_pattern"):
            if pattern := getattr(config, name):
                raw["lora_parameters"][name] = pattern
    write_safetensors(folder / WEIGHTS, stored_weights(adapter))
    write_json(folder / CONFIG, raw)
