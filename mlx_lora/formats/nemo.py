"""NVIDIA NeMo's adapters: NeMo 1's ``.nemo`` and, where they are one file, state dicts of NeMo 2 and Megatron-Bridge.

``.nemo`` is a tar of ``model_config.yaml`` and ``model_weights.ckpt``. Every adapter is ``linear_in`` [r, in] and
``linear_out`` [out, r], multiplier alpha / dim. q, k and v are one matrix whose rows go by groups of heads (the q heads
of a group, its k, its v); gate and up are one, gate first. The fused variant shares ``linear_in`` over the parts, the
canonical one has an adapter for each. NeMo 2 adds DoRA's ``weight_magnitude``. Its checkpoints in shards are refused.
"""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults, split_layer
from ..errors import FormatError
from . import fused_projections as parts
from .files import parse_yaml, read_json
from .options import Reading, Writing
from .state_dicts import low_rank, matching, read_state
from .torch.read import read_torch
from .torch.tars import members, read_member
from .torch.write import write_torch
from .uniform import as_lora, uniform

READS, WRITES, SUFFIXES = {"alpha"}, {"alpha"}, (".nemo", ".pt")
CONFIG, WEIGHTS, METADATA = "model_config.yaml", "model_weights.ckpt", "adapter_metadata.json"
_EXPORT = "Export the adapter from NeMo again, LoRA alone."
_LEAF = r"(?:(?P<leaf>linear_in|linear_out)\.weight|(?P<m>weight_magnitude))$"
_KEY = re.compile(
    r"(?:^|\.)(?:decoder|encoder)\.layers\.(?P<layer>\d+)\.(?P<slot>"
    r"(?:self_attention|mlp)\.(?:adapter_layer\.lora_\w+?_adapter|linear_\w+\.adapter)"
    rf"(?:\.(?:adapter_)?(?:q|k|v|gate|up)(?:_adapter)?)?)\.{_LEAF}"
)
# slot -> what it adapts; NeMo 1's names, then NeMo 2's.
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
_HOME = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
_TARGETS = {"qkv": "attention_qkv", "o_proj": "attention_dense", "gate_up": "mlp_fc1", "down_proj": "mlp_fc2"}
_LEAVES = {"linear_in": "lora_a", "linear_out": "lora_b"}


@dataclass(frozen=True)
class _Heads:
    heads: int
    groups: int


def detect(path: Path) -> bool:
    if path.is_dir():
        return False
    return path.suffix == ".nemo" or matching(path, _KEY)


def files(path: Path) -> list[Path]:
    return [path]


def read(path: Path, options: Reading) -> Adapter:
    alpha, heads, state = _open(path, options)
    weights, faults = {}, []
    for name, array in state.items():
        found = _KEY.search(name)
        what = {**_SLOTS, **_SLOTS_2}.get(found["slot"]) if found else None
        if what is None:
            faults.append(f"{path}: {name}: not an array of NeMo's LoRA or DoRA")
            continue
        if array.ndim != (1 if found["m"] else 2) or not array.size:
            faults.append(f"{path}: {name}: shape {list(array.shape)}")
            continue
        turned = array if found["m"] else array.T
        for module, part in _divide(what, found["leaf"], turned, heads, path, options).items():
            stem = f"model.layers.{found['layer']}.{_HOME.get(module, 'mlp')}.{module}"
            weights[f"{stem}.{_LEAVES.get(found['leaf'], 'm')}"] = part
    raise_faults(faults, _EXPORT, FormatError)
    adapter = low_rank(weights, path, options, alpha=alpha)
    return parts.fused(adapter, options.base) if options.base is not None and options.base.known else adapter


def _open(path: Path, options: Reading) -> tuple[float | None, _Heads | None, dict[str, mx.array]]:
    """(alpha, heads, tensors)."""
    told: dict[str, Any] = {}
    if path.suffix == ".nemo":
        held = members(path)
        if any(name.endswith(".distcp") or "mp_rank_" in name for name in held):
            raise FormatError(
                f"{path}: is a checkpoint in shards", "Export it with tensor and pipeline parallel size 1."
            )
        missing = [name for name in (CONFIG, WEIGHTS) if name not in held]
        raise_faults(
            [f"{path}: holds no {name}" for name in missing], "Name the .nemo file of an adapter.", FormatError
        )
        told = parse_yaml(read_member(path, held[CONFIG]), f"{path}: {CONFIG}")
        value = read_torch(path, *held[WEIGHTS])
        if not isinstance(value, dict) or not all(isinstance(v, mx.array) for v in value.values()):
            raise FormatError(f"{path}: {WEIGHTS} holds more than tensors", _EXPORT)
        state = value
        tuning = (told.get("peft") or {}).get("lora_tuning") if isinstance(told.get("peft"), dict) else None
        tuning = tuning if isinstance(tuning, dict) else {}
    else:
        state, tuning = read_state(path), {}
        if (path.parent / METADATA).exists():
            tuning = _find(read_json(path.parent / METADATA), "alpha") or {}
    alpha = tuning.get("alpha", tuning.get("adapter_dim") if "alpha" in tuning else None)
    if tuning and alpha is None:
        alpha = tuning.get("adapter_dim", tuning.get("dim"))  # NeMo takes the rank where no alpha is set
    alpha = alpha if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) else None
    if alpha is not None and options.alpha is not None:
        raise FormatError(f"{path}: tells alpha {alpha}", "Leave --alpha out.")
    count, groups = told.get("num_attention_heads"), told.get("num_query_groups")
    if isinstance(count, int) and count > 0:
        return alpha, _Heads(count, groups if isinstance(groups, int) and groups > 0 else count), state
    if not any("kqv_adapter.linear_out" in name or "linear_qkv.adapter.linear_out" in name for name in state):
        return alpha, None, state
    base = options.base_for(f"{path}: the groups of heads in qkv")
    return alpha, _Heads(base.heads, base.kv_heads) if base else None, state


def _find(value: Any, key: str, depth: int = 0) -> dict | None:
    """The first mapping in nested JSON that has ``key``."""
    if not isinstance(value, dict) or depth > 8:
        return None
    return value if key in value else next((f for v in value.values() if (f := _find(v, key, depth + 1))), None)


def _divide(what, leaf, array, heads: _Heads | None, path: Path, options: Reading) -> dict[str, mx.array]:
    """An array of a slot as arrays of transformers' modules; rows last."""
    if what not in ("qkv", "gate_up"):
        return {what: array}
    names = ("q_proj", "k_proj", "v_proj") if what == "qkv" else ("gate_proj", "up_proj")
    if leaf == "linear_in":
        return dict.fromkeys(names, array)
    rows = array.shape[-1]
    if what == "gate_up":
        if rows % 2:
            raise FormatError(f"{path}: {rows} rows of gate and up do not halve", _EXPORT)
        return dict(zip(names, mx.split(array, 2, axis=-1), strict=True))
    if heads is None:  # described only: as many rows in all
        return {"q_proj": array[..., : rows - 2], "k_proj": array[..., -2:-1], "v_proj": array[..., -1:]}
    if heads.heads % heads.groups or rows % (heads.heads + 2 * heads.groups):
        raise FormatError(
            f"{path}: {rows} rows of qkv are not those of {heads.heads} heads in {heads.groups} groups",
            "Name the base that it was trained on (--model, or base=), or export it again.",
        )
    return dict(zip(names, parts.qkv_from_groups(array, heads.heads, heads.groups), strict=True))


def write(adapter: Adapter, path: Path, options: Writing) -> None:
    base = options.base_for("NeMo's order of rows of qkv")
    adapter = as_lora(adapter, base)
    config, one = adapter.config, path.suffix == ".nemo"
    if config.method not in ("lora",) + (() if one else ("dora",)):
        raise FormatError(f"{path.suffix} of NeMo holds no {config.method} adapter", "Merge it: convert --to merged.")
    options.lose(
        [f"{n}: NeMo's adapters hold no whole parameters" for n in adapter.full_parameters]
        + [f"{p}: NeMo holds no trained tokens" for p in adapter.tokens]
        + [f"{p}: NeMo has no lora_bias" for p in adapter.modules if config.lora_bias]
    )
    adapter = uniform(parts.unfused(adapter, base), alpha=options.alpha)
    weights, faults, layers = adapter.weights, [], {}
    for stem in adapter.modules:
        layer, name = split_layer(stem)
        leaf = name.rpartition(".")[2]
        if stem != f"model.layers.{layer}.{_HOME.get(leaf, 'mlp')}.{leaf}" or leaf not in _NAMES:
            faults.append(f"{stem}: NeMo has no such module")
        layers.setdefault(layer, {})[leaf] = stem
    raise_faults(faults, "Leave those modules out of the adapter, or merge it: convert --to merged.", FormatError)
    canonical = any(not _shares(stems, group, weights) for stems in layers.values() for group in _GROUPS.values())
    slots = {what: slot for slot, what in (_SLOTS if one else _SLOTS_2).items()}
    prefix, state, used = "model.decoder.layers" if one else "decoder.layers", {}, set()
    for layer, stems in layers.items():
        for what, arrays in _join(stems, weights, canonical, base.kv_heads).items():
            used.add(next((group for group, names in _GROUPS.items() if what in names), what))
            for leaf, array in arrays.items():
                theirs = {"lora_a": "linear_in.weight", "lora_b": "linear_out.weight", "m": "weight_magnitude"}[leaf]
                state[f"{prefix}.{layer}.{slots[what]}.{theirs}"] = array if leaf == "m" else array.T
    if not one:
        write_torch(path, state)
        return
    config = adapter.config
    tuning = {
        "adapter_dim": config.rank,
        "alpha": config.scale * config.rank,
        "adapter_dropout": config.dropout,
        "variant": "canonical" if canonical else "nemo",
        "target_modules": [_TARGETS[what] for what in _TARGETS if what in used],
    }
    told = {
        "peft": {"peft_scheme": "lora", "lora_tuning": tuning},
        "num_attention_heads": base.heads,
        "num_query_groups": base.kv_heads,
        "hidden_size": base.hidden_size,
        "kv_channels": base.head_dim,
        "num_layers": base.size("num_hidden_layers", "n_layer"),
    }
    _write_tar(path, told, state)


_GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _shares(stems: dict[str, str], group: tuple[str, ...], weights: dict[str, mx.array]) -> bool:
    """Whether the parts of a fused matrix are all adapted, with one A (or none is)."""
    there = [stems[name] for name in group if name in stems]
    first = weights[f"{there[0]}.lora_a"] if there else None
    return not there or (
        len(there) == len(group)
        and all(
            weights[f"{stem}.lora_a"].shape == first.shape and mx.array_equal(weights[f"{stem}.lora_a"], first).item()
            for stem in there[1:]
        )
    )


def _join(stems, weights, canonical: bool, groups: int) -> dict[str, dict[str, mx.array]]:
    """Arrays by slot of one layer."""
    found = {}
    for name, stem in stems.items():
        group = next((g for g, names in _GROUPS.items() if name in names), None)
        arrays = {leaf: weights[f"{stem}.{leaf}"] for leaf in ("lora_a", "lora_b", "m") if f"{stem}.{leaf}" in weights}
        if group is None or canonical:
            found[name] = arrays
            continue
        if group in found:
            continue
        every = [stems[n] for n in _GROUPS[group]]
        fused = {"lora_a": arrays["lora_a"]}
        for leaf in ("lora_b", "m"):
            if leaf in arrays:
                pieces = [weights[f"{s}.{leaf}"] for s in every]
                fused[leaf] = (
                    parts.qkv_to_groups(*pieces, groups) if group == "qkv" else mx.concatenate(pieces, axis=-1)
                )
        found[group] = fused
    return found


def _write_tar(path: Path, told: dict[str, Any], state: dict[str, mx.array]) -> None:
    import yaml

    weights = path.with_name(WEIGHTS)
    write_torch(weights, state)
    try:
        with tarfile.open(path, "w:", format=tarfile.GNU_FORMAT) as archive:
            text = yaml.safe_dump(told).encode()
            info = tarfile.TarInfo(CONFIG)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
            info = tarfile.TarInfo(WEIGHTS)
            info.size = weights.stat().st_size
            with weights.open("rb") as file:
                archive.addfile(info, file)
    finally:
        weights.unlink()
