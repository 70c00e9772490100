"""mlx-lm's adapter folder, the native format: ``adapters.safetensors`` and ``adapter_config.json``.

mlx-lm knows one rank and one scale. Where modules differ, the smaller ranks are padded with zeros and the scales folded
into ``lora_b``, so that mlx-lm computes the same function; ``rank_pattern`` and ``scale_pattern``, which mlx-lm passes
over, let this reader undo it.

What mlx-lm has no words for (VeRA, biases, whole modules, rows of embeddings, an embedding's update on the input side
alone) is written as it is, with the whole config in an entry ``mlx_lora`` and ``lora_parameters`` null, at which every
version of mlx-lm stops: it must not compute something else in silence.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, split_layer
from ..config import AdapterConfig
from ..errors import ConfigError, FormatError
from .files import read_json, read_safetensors, write_json, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
OWN = "mlx_lora"  # the entry that holds what mlx-lm does not know
_OURS = {"fine_tune_type", "num_layers", "lora_parameters", "model", OWN}


def detect(folder: Path) -> bool:
    return (folder / WEIGHTS).exists()


def files(folder: Path) -> list[Path]:
    """What ``write`` would replace."""
    return [folder / CONFIG, folder / WEIGHTS]


def read(folder: Path) -> Adapter:
    raw = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    if raw is None:
        raise FormatError(f"{folder}: has {WEIGHTS} but no {CONFIG}", "The rank and scale are in it: copy it beside.")
    config = parse_config(raw, folder / CONFIG)
    weights = read_safetensors(folder / WEIGHTS)
    adapter = Adapter(
        config, weights, base=raw.get("model"), metadata={"mlx-lm": {k: v for k, v in raw.items() if k not in _OURS}}
    )
    folded = (config.rank_pattern or config.scale_pattern) and OWN not in raw
    return unfold(adapter) if folded else adapter


def parse_config(raw: dict[str, Any], source: Path) -> AdapterConfig:
    """mlx-lm's ``adapter_config.json`` as an ``AdapterConfig``; ``source`` names it in errors."""
    if "peft_type" in raw:
        raise FormatError(f"{source}: is a PEFT config beside mlx-lm weights", "Keep the two formats in two folders.")
    if OWN in raw:
        return _own_config(raw[OWN], source)
    method = raw.get("fine_tune_type") or ("dora" if raw.get("use_dora") else "lora")
    if method not in ("lora", "dora", "full"):
        raise FormatError(f"{source}: fine_tune_type {method!r} is not known")
    layers = raw.get("num_layers", raw.get("lora_layers", -1))
    if method == "full":
        return _config(source, method=method, num_layers=layers)
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(f"{source}: lora_parameters is missing", "It holds the rank and scale of the adapter.")
    parameters = {**parameters}
    if "alpha" in parameters and "lora_layers" in raw:
        # From 2024-01 to 2024-06 mlx-lm multiplied by scale * alpha / rank, before and after by scale alone.
        raise FormatError(
            f"{source}: lora_layers with alpha: mlx-lm's meaning of scale changed between versions that wrote this",
            "Delete alpha if the adapter was made before 2024-01-24 or after 2024-06-02; else set scale to "
            "scale * alpha / rank and delete alpha.",
        )
    parameters.pop("alpha", None)  # written but never read by later versions
    known = {"rank", "scale", "dropout", "keys", "rank_pattern", "scale_pattern"}
    if missing := sorted({"rank", "scale"} - parameters.keys()):
        raise FormatError(f"{source}: lora_parameters has no {' and no '.join(missing)}")
    if unknown := sorted(parameters.keys() - known):
        raise FormatError(f"{source}: lora_parameters has unknown entries: {', '.join(unknown)}")
    return _config(source, method=method, num_layers=layers, **parameters)


def _config(source: Path, **knobs: Any) -> AdapterConfig:
    try:
        return AdapterConfig(**knobs)
    except (ConfigError, TypeError, AttributeError) as error:  # what a foreign file holds may have any type
        raise FormatError(f"{source}: {error}") from None


def _own_config(own: Any, source: Path) -> AdapterConfig:
    known = {f.name for f in fields(AdapterConfig)}
    if not isinstance(own, dict) or (unknown := sorted(own.keys() - known)):
        what = f"unknown entries: {', '.join(unknown)}" if isinstance(own, dict) else "no settings"
        raise FormatError(f"{source}: {OWN} has {what}", "It may be of a newer mlx-lora: pip install -U mlx-lora.")
    return _config(source, **own)


def expressible(adapter: Adapter) -> bool:
    """Whether mlx-lm computes the same from this adapter."""
    config = adapter.config
    if config.method == "full":
        return True
    plain = config.method in ("lora", "dora") and not config.lora_bias and adapter.modules
    two_sided = config.embedding_side == "both" or not any("embed" in path or "wte" in path for path in adapter.modules)
    return bool(plain) and two_sided and not adapter.whole and not adapter.tokens


def stored_weights(adapter: Adapter) -> dict[str, mx.array]:
    """The arrays as ``write`` stores them."""
    if adapter.config.method == "full" or not expressible(adapter):
        return adapter.weights
    return fold(adapter, _stored_config(adapter))


def _stored_config(adapter: Adapter) -> AdapterConfig:
    return adapter.exact_config(rank=max(adapter.rank_of(path) for path in adapter.modules))


def write(adapter: Adapter, folder: Path) -> None:
    config = adapter.config
    raw = {**adapter.metadata.get("mlx-lm", {}), "fine_tune_type": config.method, "num_layers": config.num_layers}
    if adapter.base:
        raw["model"] = adapter.base
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


def fold(adapter: Adapter, config: AdapterConfig) -> dict[str, mx.array]:
    """The weights with ``config.rank`` and ``config.scale`` for all modules, computing the same function."""
    weights = dict(adapter.weights)
    for path in adapter.modules:
        a, b = f"{path}.lora_a", f"{path}.lora_b"
        if (factor := config.scale_of(path) / config.scale) != 1:
            weights[b] = weights[b].astype(mx.float32) * factor  # stays so: half precision would round it
        if (more := config.rank - config.rank_of(path)) > 0:
            weights[a] = _pad(weights[a], more, axis=1)  # [in, r] and, for experts, [experts, r, in]
            weights[b] = _pad(weights[b], more, axis=weights[b].ndim - 1 if weights[b].ndim == 3 else 0)
    return weights


def unfold(adapter: Adapter) -> Adapter:
    """The inverse of ``fold``: ranks exactly, scales to a rounding in float32, which half precision does not see."""
    weights, config = dict(adapter.weights), adapter.config
    for path in adapter.modules:
        a, b = f"{path}.lora_a", f"{path}.lora_b"
        if a not in weights or b not in weights:
            continue  # ``check`` names what is missing
        rank = config.rank_of(path)
        if weights[a].ndim == 3:
            weights[a], weights[b] = weights[a][:, :rank], weights[b][..., :rank]
        else:
            weights[a], weights[b] = weights[a][:, :rank], weights[b][:rank]
        if (factor := config.scale_of(path) / config.scale) != 1:
            weights[b] = (weights[b].astype(mx.float32) / factor).astype(weights[a].dtype)
    return replace(adapter, weights=weights)


def _pad(array: mx.array, more: int, axis: int) -> mx.array:
    return mx.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])
