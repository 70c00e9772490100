"""PEFT's adapter folder, written.

The config is short on purpose: older versions of PEFT refuse settings that they do not know. It names exactly the
modules that have an adapter, and always has ``init_lora_weights: true``, because PEFT would apply another
initialisation to the base again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import Adapter, raise_faults, split_layer
from ...base.names import BaseModel
from ...config import UNSCALED, AdapterConfig
from ...errors import FormatError
from ..files import fingerprint_text, write_json, write_safetensors
from ..options import MERGE, NAME_BASE, WriteOptions, is_embedding
from ..uniform import integral, uniform, vera_as_lora
from . import experts
from .fields import kept_fields
from .names import CONFIG, EMBEDDING, LINEAR, PREFIX, SHARED_KEYS, WEIGHTS


def write(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    if (method := adapter.config.method) not in _PEFT_TYPES:
        fault = (
            "PEFT has no adapters of fully trained weights" if method == "full" else f"PEFT has no {method} adapters"
        )
        raise FormatError(fault, "Save it as mlx-lm, or merge it into a model: convert --to merged.")
    if not adapter.modules:
        write_alone = _write_tokens if adapter.tokens else _write_modules
        return write_alone(adapter, folder, options)
    if options.profile == "serving":
        adapter = _for_serving(adapter, options)
    layout = options.moe or ("per_expert" if options.profile else adapter.metadata.get("peft", {}).get("moe"))
    base = options.known_base
    stacks = _expert_stacks(adapter)
    if stacks and adapter.config.method != "lora":
        raise FormatError(f"{stacks[0]}: PEFT has no DoRA on experts", MERGE)
    if adapter.config.method == "vera" and any(adapter.weights[f"{p}.vera_lambda_d"].ndim > 1 for p in adapter.modules):
        raise FormatError("PEFT has no VeRA on experts", "Leave the experts out, or merge: convert --to merged.")
    exact = adapter.exact_config()
    if stacks and layout == "per_expert":
        adapter = _for_single_experts(adapter, stacks)
        stacks, exact = _expert_stacks(adapter), adapter.config
    writer = _Writer(adapter, base)
    for path in adapter.modules:
        if path not in stacks:
            writer.module(path)
    writer.experts(stacks, layout or "target_parameters")
    writer.extras()
    _write_files(adapter, folder, writer.tensors, writer.config(exact))


_PEFT_TYPES = {"lora": "LORA", "dora": "LORA", "vera": "VERA", "ia3": "IA3"}  # by our method


def _write_files(adapter: Adapter, folder: Path, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    # The fingerprint is among the metadata of the weights: PEFT warns of unknown entries in its config.
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt", **fingerprint_text(adapter)})
    write_json(folder / CONFIG, config)


def _to_hf(path: str, base: BaseModel | None) -> str:
    """transformers' path. Without a base, GPT-2 is recognised by mlx-lm's names; other paths stay unchanged."""
    if base is not None:
        return base.to_hf(path)
    if re.match(r"model\.(h\.\d+\.(attn\.c_|mlp\.c_)|wte$|wpe$)", path):
        return "transformer." + path.removeprefix("model.")
    return path


def _expert_stacks(adapter: Adapter) -> list[str]:
    """The paths of the modules that hold the matrices of all experts."""
    return [p for p in adapter.modules if (a := adapter.weights.get(f"{p}.lora_a")) is not None and a.ndim == 3]


def _write_tokens(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write an adapter that has only trained rows of one embedding."""
    if len(adapter.tokens) != 1 or adapter.full_parameters or options.profile or options.moe:
        fault = "PEFT has no adapters with only the rows of several embeddings, or with rows and full modules"
        raise FormatError(fault, MERGE)
    (path, (ids, rows)) = next(iter(adapter.tokens.items()))
    base = options.known_base
    name = _to_hf(path, base)
    raw = {
        **kept_fields(adapter, "TRAINABLE_TOKENS"),
        "peft_type": "TRAINABLE_TOKENS",
        "base_model_name_or_path": adapter.base,
        "target_modules": [name],
        "token_indices": list(ids),
        "inference_mode": True,
        "init_weights": True,
    }
    tensors = {f"{PREFIX}{name}.trainable_tokens_delta": rows}
    if base is not None and base.tied:
        tensors[f"{PREFIX}lm_head.trainable_tokens_delta"] = rows
    _write_files(adapter, folder, tensors, raw)


def _write_modules(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write an adapter of only full modules as LN_TUNING (arXiv:2312.11420), which holds copies of any modules."""
    base = options.known_base
    paths = sorted({name.rpartition(".")[0] for name in adapter.full_parameters})
    faults = [
        f"{path}: PEFT trains an embedding in full only together with LoRA"
        for path in paths
        if is_embedding(path, adapter, base)
    ]
    faults += ["PEFT has no adapters of biases alone"] if adapter.config.bias != "none" else []
    faults += ["servers such as vLLM take LoRA only"] if options.profile or options.moe else []
    raise_faults(faults, MERGE, FormatError)
    raw = {
        **kept_fields(adapter, "LN_TUNING"),
        "peft_type": "LN_TUNING",
        "base_model_name_or_path": adapter.base,
        "target_modules": [_to_hf(path, base) for path in paths],
        "inference_mode": True,
    }
    tensors = {}
    for name, array in adapter.full_parameters.items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{_to_hf(path, base)}.ln_tuning_layers.{leaf}"] = array
    _write_files(adapter, folder, tensors, raw)


def _for_serving(adapter: Adapter, options: WriteOptions) -> Adapter:
    """Convert ``adapter`` for vLLM and similar servers: LoRA only, one rank, one integer alpha."""
    config, faults = adapter.config, []
    if config.method in ("dora", "ia3"):
        faults.append(f"{config.method}: vLLM and similar servers take LoRA only")
    if adapter.full_parameters:
        faults.append(f"{len(adapter.full_parameters)} fully trained parameters (modules_to_save or bias)")
    if adapter.tokens:
        faults.append("trained rows of embeddings (trainable_token_indices)")
    if config.lora_bias:
        faults.append("lora_bias: vLLM refuses it")
    raise_faults(faults, MERGE, FormatError)
    return uniform(vera_as_lora(adapter, options.base), integer=True)


def _for_single_experts(adapter: Adapter, stacks: list[str]) -> Adapter:
    """``adapter`` with one rank and alpha for experts and routers.

    PEFT converts keys for single experts and the router's keys with the config's ``r`` and ``lora_alpha``, and ignores
    the patterns.
    """
    blocks = {path.rpartition(".")[0] for path in stacks}
    same = [p for p in adapter.modules if p in stacks or p in {f"{b.rpartition('.')[0]}.gate" for b in blocks}]
    part = replace(adapter, weights={n: w for n, w in adapter.weights.items() if n.rpartition(".")[0] in set(same)})
    folded = uniform(part)
    weights = {**adapter.weights, **folded.weights}
    for block in blocks:
        _complete(block, weights)
        a, b = f"{block}.gate_proj.lora_a", f"{block}.gate_proj.lora_b"
        if a in weights and f"{block}.down_proj.lora_a" not in weights:  # PEFT requires both
            count, rank, hidden = weights[a].shape
            weights[f"{block}.down_proj.lora_a"] = mx.zeros((count, rank, weights[b].shape[1]), weights[a].dtype)
            weights[f"{block}.down_proj.lora_b"] = mx.zeros((count, hidden, rank), weights[b].dtype)
    rank, scale = folded.config.rank, folded.config.scale
    others = {p: (adapter.rank_of(p), adapter.config.scale_of(p)) for p in adapter.modules if p not in same}
    config = replace(
        folded.config,
        rank_pattern={f"^{re.escape(p)}": r for p, (r, _) in others.items() if r != rank},
        scale_pattern={f"^{re.escape(p)}": s for p, (_, s) in others.items() if s != scale},
    )
    return replace(adapter, weights=weights, config=config)


def _complete(block: str, weights: dict[str, mx.array]) -> None:
    """Give gate or up an adapter of zeros if only the other has one: they are one parameter in transformers 5."""
    pair = [f"{block}.gate_proj", f"{block}.up_proj"]
    present = [path for path in pair if f"{path}.lora_a" in weights]
    if len(present) == 1:
        other = pair[1 - pair.index(present[0])]
        for leaf in ("lora_a", "lora_b"):
            weights[f"{other}.{leaf}"] = mx.zeros_like(weights[f"{present[0]}.{leaf}"])


class _Writer:
    """Collects PEFT's tensors and the settings that describe them."""

    def __init__(self, adapter: Adapter, base: BaseModel | None):
        self.adapter, self.base = adapter, base
        self.tensors: dict[str, mx.array] = {}
        self.targets: list[str] = []  # transformers' paths of target modules; {} stands for the number of an expert
        self.parameters: list[str] = []  # transformers' paths of target parameters
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.extra: dict[str, Any] = {}

    def _size(self, name: str, rank: int, scale: float) -> None:
        self.ranks[name], self.alphas[name] = rank, integral(scale * rank)

    def module(self, path: str) -> None:
        """Add one linear layer or embedding."""
        adapter, name = self.adapter, _to_hf(path, self.base)
        embedding = is_embedding(path, adapter, self.base)
        if embedding and adapter.config.method != "lora":
            raise FormatError(
                f"{path}: {adapter.config.method} of an embedding has magnitudes by token, which PEFT does not support",
                "Leave the embedding out of the adapter, or merge it: convert --to merged.",
            )
        for leaf, theirs in (EMBEDDING if embedding else LINEAR).items():
            array = adapter.weights.get(f"{path}.{leaf}") if leaf != "trainable_tokens" else None
            if array is not None:
                self.tensors[f"{PREFIX}{name}.{theirs}"] = array.T if leaf in ("lora_a", "lora_b") else array
        self.targets.append(name)
        if adapter.config.method in UNSCALED:
            return
        rank, scale = adapter.rank_of(path), adapter.config.scale_of(path)
        self._size(name, rank, scale)
        if embedding and self._trained_on_both_sides(path):
            head = "lm_head"
            self.tensors[f"{PREFIX}{head}.lora_A.weight"] = adapter.weights[f"{path}.lora_b"]
            self.tensors[f"{PREFIX}{head}.lora_B.weight"] = adapter.weights[f"{path}.lora_a"]
            self.targets.append(head)
            self._size(head, rank, scale)
            self.extra["ensure_weight_tying"] = True

    def _trained_on_both_sides(self, path: str) -> bool:
        """Whether PEFT needs ``ensure_weight_tying`` for the embedding at ``path`` and the head to stay one matrix."""
        return self.adapter.config.embedding_side == "both" and self._tied(path)

    def _tied(self, path: str) -> bool:
        if self.base is None:
            raise FormatError(
                f"{path}: PEFT's files depend on whether the model ties its output to this embedding", NAME_BASE
            )
        return self.base.tied

    def experts(self, stacks: list[str], layout: str) -> None:
        """Add the experts, ``per_expert`` or as ``target_parameters``."""
        weights, base = self.adapter.weights, self.base
        blocks = dict.fromkeys(path.rpartition(".")[0] for path in stacks)
        for block in blocks:
            parent = block.rpartition(".")[0]
            kinds = [k for k in ("gate_proj", "up_proj", "down_proj") if f"{block}.{k}.lora_a" in weights]
            unknown = [p for p in stacks if p.rpartition(".")[0] == block and p.rpartition(".")[2] not in kinds]
            raise_faults([f"{p}: PEFT has no such experts" for p in unknown], MERGE, FormatError)
            if layout == "per_expert":
                mixtral = (base.model_type in ("mixtral", "minimax")) if base else parent.endswith("block_sparse_moe")
                name = parent if parent.endswith("block_sparse_moe") else (base.to_hf(parent) if base else parent)
                for kind in kinds:
                    theirs = experts.MIXTRAL[kind] if mixtral else kind
                    self.targets.append(f"{name}.experts.{{}}.{theirs}")
                    for leaf in ("lora_a", "lora_b"):
                        for number, array in enumerate(weights[f"{block}.{kind}.{leaf}"]):
                            key = f"{PREFIX}{name}.experts.{number}.{theirs}.{LINEAR[leaf]}"
                            self.tensors[key] = array
                continue
            name = base.to_hf(parent) if base else parent.replace("block_sparse_moe", "mlp")
            self._target_parameters(block, name, kinds)

    def _target_parameters(self, block: str, name: str, kinds: list[str]) -> None:
        adapter, found = self.adapter, {}
        interleaved = bool(self.base and self.base.model_type == "gpt_oss")
        if {"gate_proj", "up_proj"} & set(kinds):
            weights = dict(adapter.weights)
            _complete(block, weights)
            gate, up = (
                tuple(weights[f"{block}.{k}.{leaf}"] for leaf in ("lora_a", "lora_b")) for k in ("gate_proj", "up_proj")
            )
            scales = [adapter.config.scale_of(f"{block}.{k}") for k in ("gate_proj", "up_proj") if k in kinds]
            if len(scales) == 2 and scales[0] != scales[1]:
                up = (up[0], up[1].astype(mx.float32) * (scales[1] / scales[0]))
            found["gate_up_proj"] = (*experts.fuse_gate_up(gate, up, interleaved), scales[0])
        if "down_proj" in kinds:
            path = f"{block}.down_proj"
            a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
            found["down_proj"] = (a, b, adapter.config.scale_of(path))
        for kind, (a, b, scale) in found.items():
            inner = ".base_layer" if kind == "gate_up_proj" and len(found) == 2 else ""
            exchanged = self.base is not None and self.base.experts_exchanged
            packed = experts.pack(*(x.swapaxes(1, 2) for x in (b, a))) if exchanged else experts.pack(a, b)
            for leaf, array in zip(("lora_A", "lora_B"), packed, strict=True):
                self.tensors[f"{PREFIX}{name}.experts{inner}.{leaf}.weight"] = array
            self.parameters.append(f"{name}.experts.{kind}")
            self._size(f"{name}.experts.{kind}", a.shape[1], scale)

    def extras(self) -> None:
        """Add full parameters, trained rows of embeddings, VeRA's projections."""
        adapter = self.adapter
        adapted, saved = set(adapter.modules), set()
        for name, array in {**adapter.full_parameters, **adapter.metadata.get("peft", {}).get("saved", {})}.items():
            path, _, leaf = name.rpartition(".")
            theirs = _to_hf(path, self.base)
            inside = ".base_layer" if path in adapted else ""
            self.tensors[f"{PREFIX}{theirs}{inside}.{leaf}"] = array
            if leaf == "weight" and is_embedding(path, adapter, self.base) and self._trained_on_both_sides(path):
                self.tensors[f"{PREFIX}lm_head{inside}.{leaf}"] = array
                self.extra["ensure_weight_tying"] = True
            if leaf != "bias" or adapter.config.bias == "none":
                saved.update([path] if not inside else [])
        if saved:
            self.extra["modules_to_save"] = self._named("modules_to_save", saved)
        if adapter.config.bias != "none":
            bias = adapter.config.bias
            self.extra["bias"] = "vera_only" if adapter.config.method == "vera" and bias == "lora_only" else bias
        for path, (ids, rows) in adapter.tokens.items():
            theirs = _to_hf(path, self.base)
            self.tensors[f"{PREFIX}{theirs}.token_adapter.trainable_tokens_delta"] = rows
            self.extra.setdefault("trainable_token_indices", {})[theirs] = list(ids)
        for theirs, ours in SHARED_KEYS.items():
            if ours in adapter.weights:
                self.tensors[theirs] = adapter.weights[ours]

    def _named(self, field: str, paths: Iterable[str]) -> list[str] | str:
        """The modules at our ``paths`` for ``field``: by the original file's names if they mean the same modules."""
        names, selected = self.adapter.metadata.get("peft", {}).get("names", {}).get(field, (None, None))
        return names if selected == sorted(paths) else sorted(_to_hf(path, self.base) for path in paths)

    def config(self, exact: AdapterConfig) -> dict[str, Any]:
        """The config, with ``exact`` for the rank and scale of most modules."""
        adapter = self.adapter
        method = adapter.config.method
        raw: dict[str, Any] = {
            **kept_fields(adapter, _PEFT_TYPES[method]),
            "peft_type": _PEFT_TYPES[method],
            "base_model_name_or_path": adapter.base,
            "r": exact.rank,
            "bias": "none",
            "fan_in_fan_out": bool(adapter.metadata.get("peft", {}).get("fan_in_fan_out"))
            or bool(self.base and self.base.model_type == "gpt2"),
            "inference_mode": True,
        }
        router = [t for t in self.targets if self._is_router(t)] if self.parameters else []
        modules = [t for t in self.targets if "{}" not in t and t not in router]
        per_expert = sorted({t.rpartition(".")[2] for t in self.targets if "{}" in t})
        short = (
            modules and not per_expert and not self.parameters and method != "ia3"
        )  # which has no layers_to_transform
        targets, layers = _targets(modules) if short else (modules, None)
        raw["target_modules"] = sorted(targets) + per_expert
        if layers is not None:
            raw["layers_to_transform"] = layers
        if self.parameters:
            for name in router:  # a target parameter in PEFT, matched with .weight
                for sizes in (self.ranks, self.alphas):
                    sizes[f"{name}.weight"] = sizes.pop(name)
            raw["target_parameters"] = sorted(self.parameters + [f"{name}.weight" for name in router])
        if method == "vera":
            raw |= {
                "projection_prng_key": exact.projection_prng_key,
                "save_projection": "vera_a" in adapter.weights,
                "vera_dropout": exact.dropout,
                "d_initial": exact.d_initial,
                "init_weights": True,
            }
            return {**raw, **self.extra}
        if method == "ia3":
            inputs = [p for p in adapter.modules if adapter.weights[f"{p}.ia3_l"].shape[0] == 1]
            raw = {name: value for name, value in raw.items() if name not in ("r", "bias")}
            targets, inner = self._named("target_modules", adapter.modules), self._named("feedforward_modules", inputs)
            if isinstance(targets, list) and isinstance(inner, list) and not set(inner) <= set(targets):  # PEFT refuses
                targets, inner = ([_to_hf(p, self.base) for p in paths] for paths in (adapter.modules, inputs))
            raw |= {"target_modules": targets, "feedforward_modules": inner, "init_ia3_weights": True}
            return {**raw, **self.extra}
        alpha = integral(exact.scale * exact.rank)
        raw |= {"lora_alpha": alpha, "lora_dropout": exact.dropout, "use_dora": method == "dora"}
        raw["init_lora_weights"] = True
        if exact.lora_bias:
            raw["lora_bias"] = True
        if ranks := {f"^{re.escape(n)}": r for n, r in self.ranks.items() if r != exact.rank}:
            raw["rank_pattern"] = ranks
        if alphas := {f"^{re.escape(n)}": a for n, a in self.alphas.items() if a != alpha}:
            raw["alpha_pattern"] = alphas
        return {**raw, **self.extra}

    def _is_router(self, name: str) -> bool:
        block, _, leaf = name.rpartition(".")
        return leaf == "gate" and any(p.startswith(f"{block}.experts.") for p in self.parameters)


def _targets(modules: list[str]) -> tuple[list[str], list[int] | None]:
    """``target_modules`` and ``layers_to_transform`` that select exactly ``modules`` in any base.

    These are names relative to a layer if every adapted layer has the same ones, else full paths. PEFT would put an
    adapter on every further match and warn about missing keys.
    """
    split = [split_layer(path) for path in modules]
    layers = sorted({layer for layer, _ in split if layer is not None})
    names = sorted({name for _, name in split})
    stems = {path.removesuffix(f".{layer}.{name}") for path, (layer, name) in zip(modules, split, strict=True)}
    if len(stems) == 1 and None not in {layer for layer, _ in split} and len(modules) == len(layers) * len(names):
        return names, layers
    return sorted(modules), None
