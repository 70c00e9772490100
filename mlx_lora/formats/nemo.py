"""NVIDIA NeMo's adapters: NeMo 1's ``.nemo``, and single-file state dicts of NeMo 2 and Megatron-Bridge.

``.nemo`` is a tar of ``model_config.yaml`` and ``model_weights.ckpt``. Every adapter is ``linear_in`` [r, in] and
``linear_out`` [out, r], multiplier alpha / dim. q, k and v are one matrix, whose rows go by groups of heads: a group's
q heads, its k, its v. gate and up are one matrix, gate first. In the fused variant q, k and v share ``linear_in``, and
so do gate and up; in the canonical variant each has its own adapter. NeMo 2 adds DoRA's ``weight_magnitude``. Its
sharded checkpoints are refused.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults
from ..errors import FormatError
from .files import parse_yaml, read_json
from .fused_projections import (
    GATE_UP,
    QKV,
    fuse_projections,
    qkv_from_groups,
    qkv_to_groups,
    same_array,
    split_projections,
)
from .options import ReadOptions, WriteOptions, locate_modules
from .state_dicts import has_tensor, low_rank_adapter, read_state
from .torch.read import read_torch
from .torch.tars import members, read_member
from .torch.write import write_torch
from .uniform import low_rank_only, uniform

READS, WRITES, SUFFIXES, FILES = {"alpha"}, {"alpha"}, (".nemo", ".pt"), ()
CONFIG, WEIGHTS, METADATA = "model_config.yaml", "model_weights.ckpt", "adapter_metadata.json"
_EXPORT = "Export only the LoRA adapter from NeMo again."
_KEY = re.compile(
    r"(?:^|\.)(?:decoder|encoder)\.layers\.(?P<layer>\d+)\.(?P<slot>"
    r"(?:self_attention|mlp)\.(?:adapter_layer\.lora_\w+?_adapter|linear_\w+\.adapter)"
    r"(?:\.(?:adapter_)?(?:q|k|v|gate|up)(?:_adapter)?)?)\.(?P<leaf>linear_in\.weight|linear_out\.weight|weight_magnitude)$"
)
_FUSED = {"qkv": QKV, "gate_up": GATE_UP}
# The projection that an adapter belongs to, by NeMo 1's names and by NeMo 2's.
_SLOTS = {
    "self_attention.adapter_layer.lora_kqv_adapter": "qkv",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "o_proj",
    "mlp.adapter_layer.lora_hto4h_adapter": "gate_up",
    "mlp.adapter_layer.lora_4htoh_adapter": "down_proj",
    **{f"self_attention.adapter_layer.lora_unfused_kqv_adapter.{p}_adapter": f"{p}_proj" for p in "qkv"},
    **{f"mlp.adapter_layer.lora_unfused_hto4h_adapter.{p}_adapter": f"{p}_proj" for p in ("gate", "up")},
}
_SLOTS_2 = {
    "self_attention.linear_qkv.adapter": "qkv",
    "self_attention.linear_proj.adapter": "o_proj",
    "mlp.linear_fc1.adapter": "gate_up",
    "mlp.linear_fc2.adapter": "down_proj",
    **{f"self_attention.linear_qkv.adapter.adapter_{p}": f"{p}_proj" for p in "qkv"},
    **{f"mlp.linear_fc1.adapter.adapter_{p}": f"{p}_proj" for p in ("gate", "up")},
}
_TARGETS = {"qkv": "attention_qkv", "o_proj": "attention_dense", "gate_up": "mlp_fc1", "down_proj": "mlp_fc2"}
_PARENTS = {**dict.fromkeys((*QKV, "o_proj"), "self_attn"), **dict.fromkeys((*GATE_UP, "down_proj"), "mlp")}
_LEAVES = {"linear_in.weight": "lora_a", "linear_out.weight": "lora_b", "weight_magnitude": "m"}
Heads = tuple[int, int]  # heads, groups of heads


def detect(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == ".nemo" or has_tensor(path, _KEY))


def read(path: Path, options: ReadOptions) -> Adapter:
    if path.suffix.lower() == ".nemo":
        config, tuning, state = _read_tar(path)
    else:
        config, state = {}, read_state(path)
        metadata = path.parent / METADATA
        tuning = _find(read_json(metadata), "alpha") if metadata.exists() else {}
    alpha = tuning.get("alpha")
    if tuning and alpha is None:
        alpha = tuning.get("adapter_dim", tuning.get("dim"))  # without an alpha, NeMo uses the rank
    alpha = options.alpha_from(alpha, path)
    heads = _heads(config, state, path, options)
    weights, faults = {}, []
    for name, array in state.items():
        found = _KEY.search(name)
        projection = {**_SLOTS, **_SLOTS_2}.get(found["slot"]) if found else None
        if projection is None:
            faults.append(f"{path}: {name}: not an array of NeMo's LoRA or DoRA")
            continue
        leaf = _LEAVES[found["leaf"]]
        if array.ndim != (1 if leaf == "m" else 2) or not array.size:
            faults.append(f"{path}: {name}: shape {list(array.shape)}")
            continue
        for module, part in _split(projection, leaf, array if leaf == "m" else array.T, heads, path).items():
            weights[f"model.layers.{found['layer']}.{_PARENTS[module]}.{module}.{leaf}"] = part
    raise_faults(faults, _EXPORT, FormatError)
    return fuse_projections(low_rank_adapter(weights, path, options, alpha=alpha), options.known_base)


def _read_tar(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, mx.array]]:
    """(the model's config, the adapter's settings in it, tensors) of a ``.nemo``."""
    files = members(path)
    if any(name.endswith(".distcp") or "mp_rank_" in name for name in files):
        raise FormatError(f"{path}: is a sharded checkpoint", "Export it with tensor and pipeline parallel size 1.")
    missing = [f"{path}: has no {name}" for name in (CONFIG, WEIGHTS) if name not in files]
    raise_faults(missing, "Name the .nemo file of an adapter.", FormatError)
    config = parse_yaml(read_member(path, files[CONFIG]), f"{path}: {CONFIG}")
    state = read_torch(path, *files[WEIGHTS])
    if not isinstance(state, dict) or not all(isinstance(v, mx.array) for v in state.values()):
        raise FormatError(f"{path}: {WEIGHTS} holds more than tensors", _EXPORT)
    tuning = config["peft"].get("lora_tuning") if isinstance(config.get("peft"), dict) else None
    return config, tuning if isinstance(tuning, dict) else {}, state


def _heads(config: dict[str, Any], state: dict[str, mx.array], path: Path, options: ReadOptions) -> Heads | None:
    """The heads by the file's config or, if a fused qkv needs them, the base's; None in lenient reading."""
    count, groups = config.get("num_attention_heads"), config.get("num_query_groups")
    if isinstance(count, int) and count > 0:
        return count, groups if isinstance(groups, int) and groups > 0 else count
    if not any("kqv_adapter.linear_out" in name or "linear_qkv.adapter.linear_out" in name for name in state):
        return None
    base = options.base_for(f"{path}: the groups of heads in qkv")
    return (base.heads, base.kv_heads) if base else None


def _find(value: Any, key: str, depth: int = 0) -> dict[str, Any]:
    """The first mapping in nested JSON that has ``key``; empty if there is none."""
    if not isinstance(value, dict) or depth > 8:
        return {}
    return value if key in value else next((f for v in value.values() if (f := _find(v, key, depth + 1))), {})


def _split(projection: str, leaf: str, array: mx.array, heads: Heads | None, path: Path) -> dict[str, mx.array]:
    """An array of one of NeMo's projections, rows last, as arrays of transformers' modules."""
    if projection not in _FUSED:
        return {projection: array}
    names, rows = _FUSED[projection], array.shape[-1]
    if leaf == "lora_a":
        return dict.fromkeys(names, array)
    if projection == "gate_up":
        if rows % 2:
            raise FormatError(f"{path}: {rows} rows of gate and up cannot be halved", _EXPORT)
        return dict(zip(names, mx.split(array, 2, axis=-1), strict=True))
    if heads is None:  # lenient reading: only the sum of the rows is known
        return dict(zip(names, mx.split(array, [rows - 2, rows - 1], axis=-1), strict=True))
    count, groups = heads
    if count % groups or rows % (count + 2 * groups):
        raise FormatError(
            f"{path}: {rows} rows of qkv do not divide into {count} heads in {groups} groups",
            "Name the base that it was trained on (--model, or base=), or export it again.",
        )
    return dict(zip(names, qkv_from_groups(array, count, groups), strict=True))


def write(adapter: Adapter, path: Path, options: WriteOptions) -> None:
    base = options.base_for("NeMo's order of rows of qkv")
    archive = path.suffix.lower() == ".nemo"
    adapter = low_rank_only(adapter, options, f"NeMo's {path.suffix}", ("lora",) if archive else ("lora", "dora"))
    adapter = uniform(split_projections(adapter, base), alpha=options.alpha)
    weights, layers = adapter.weights, {}  # layers: {layer: {projection: path}}
    names = {f"{parent}.{name}": name for name, parent in _PARENTS.items()}
    for module, (layer, name) in locate_modules(adapter, names, "NeMo").items():
        layers.setdefault(layer, {})[name] = module
    fused = all(_can_fuse(paths, names, weights) for paths in layers.values() for names in _FUSED.values())
    slots = {projection: slot for slot, projection in (_SLOTS if archive else _SLOTS_2).items()}
    leaves = {ours: theirs for theirs, ours in _LEAVES.items()}
    prefix, state, targets = "model.decoder.layers" if archive else "decoder.layers", {}, set()
    for layer, paths in layers.items():
        for projection, arrays in _join(paths, weights, fused, base.kv_heads).items():
            targets.add(next((group for group, names in _FUSED.items() if projection in names), projection))
            for leaf, array in arrays.items():
                key = f"{prefix}.{layer}.{slots[projection]}.{leaves[leaf]}"
                state[key] = array if leaf == "m" else array.T
    if not archive:
        write_torch(path, state)
        return
    tuning = {
        "adapter_dim": adapter.config.rank,
        "alpha": adapter.config.scale * adapter.config.rank,
        "adapter_dropout": adapter.config.dropout,
        "variant": "nemo" if fused else "canonical",
        "target_modules": [name for projection, name in _TARGETS.items() if projection in targets],
    }
    config = {
        "peft": {"peft_scheme": "lora", "lora_tuning": tuning},
        "num_attention_heads": base.heads,
        "num_query_groups": base.kv_heads,
        "hidden_size": base.hidden_size,
        "kv_channels": base.head_dim,
        "num_layers": base.size("num_hidden_layers", "n_layer"),
    }
    _write_tar(path, config, state)


def _can_fuse(paths: dict[str, str], names: tuple[str, ...], weights: dict[str, mx.array]) -> bool:
    """Whether the modules ``names`` of a layer all have an adapter with one A, or none has an adapter."""
    present = [weights[f"{paths[name]}.lora_a"] for name in names if name in paths]
    return not present or (len(present) == len(names) and all(same_array(a, present[0]) for a in present[1:]))


def _join(paths: dict[str, str], weights: dict[str, mx.array], fused: bool, groups: int):
    """The arrays of one layer, {NeMo's projection: {leaf: array}}."""
    found = {}
    for name, path in paths.items():
        group = next((g for g, names in _FUSED.items() if name in names), None) if fused else None
        if group in found:
            continue
        arrays = {leaf: weights[f"{path}.{leaf}"] for leaf in _LEAVES.values() if f"{path}.{leaf}" in weights}
        for leaf in arrays if group else ():
            if leaf != "lora_a":
                parts = [weights[f"{paths[n]}.{leaf}"] for n in _FUSED[group]]
                arrays[leaf] = qkv_to_groups(*parts, groups) if group == "qkv" else mx.concatenate(parts, axis=-1)
        found[group or name] = arrays
    return found


def _write_tar(path: Path, config: dict[str, Any], state: dict[str, mx.array]) -> None:
    import yaml

    weights = path.with_name(WEIGHTS)
    write_torch(weights, state)
    try:
        with tarfile.open(path, "w:", format=tarfile.GNU_FORMAT) as archive:
            text = yaml.safe_dump(config).encode()
            info = tarfile.TarInfo(CONFIG)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
            info = tarfile.TarInfo(WEIGHTS)
            info.size = weights.stat().st_size
            with weights.open("rb") as file:
                archive.addfile(info, file)
    finally:
        weights.unlink()
