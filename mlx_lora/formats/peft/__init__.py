"""Hugging Face PEFT's adapter folder: ``adapter_config.json`` beside ``adapter_model.safetensors`` (or ``.bin``).

Keys are ``base_model.model.<module path>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r], transposed to ours;
DoRA adds ``lora_magnitude_vector`` [out], embeddings have ``lora_embedding_A`` [r, vocabulary] and ``_B`` [dim, r].
The multiplier is nowhere in the tensors: it is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``, by
module through ``rank_pattern`` and ``alpha_pattern``. Experts are in ``peft_experts.py``. Adapters of other names than
``default`` lie in a sub-folder each. Every tensor is converted or refused by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import Adapter, raise_faults
from ...config import AdapterConfig, match_pattern
from ...errors import ConfigError, FormatError
from ..files import read_json, read_safetensors, wrong_settings
from ..options import Reading
from ..torch.read import read_torch
from . import experts
from . import init as peft_starts
from .names import CONFIG, EMBEDDING_NAME, LEAVES, OTHER_LEAVES, PICKLE, PREFIX, SHARED_KEYS, WEIGHTS
from .write import write as write

READS, WRITES = {"adapter"}, {"moe", "profile"}
_ALONE = "Save the adapter's state dict alone, a dict of names and tensors."

# Settings that change what the tensors mean, and are not converted (values that switch them off aside).
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
_TYPES = ("LORA", "DORA", "VERA", "TRAINABLE_TOKENS")
_TYPES_OF = {
    "target_parameters": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "peft_version": str,
    "base_model_name_or_path": str,
    "token_indices": list,
    "trainable_token_indices": (list, dict),
    "init_lora_weights": (bool, str),
    "modules_to_save": list,
}


# -- finding ---------------------------------------------------------------------------------------------------------


def detect(path: Path) -> bool:
    # torchtune writes a PEFT folder's files beside its own, in part wrongly; its own are the ones to read.
    return path.is_dir() and (_holds(path) or bool(_named(path))) and not (path / "adapter_model.pt").exists()


def files(folder: Path) -> list[Path]:
    """What ``write`` would replace."""
    return [folder / CONFIG, folder / WEIGHTS]


def _holds(folder: Path) -> bool:
    return (folder / WEIGHTS).exists() or (folder / PICKLE).exists()


def _named(folder: Path) -> list[str]:
    """Names of adapters in sub-folders."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and (p / CONFIG).exists() and _holds(p))


def _folder(folder: Path, adapter: str | None) -> Path:
    if adapter is None and _holds(folder):
        return folder
    named = _named(folder)
    if adapter is not None:
        if adapter not in named:
            raise FormatError(f"{folder}: holds no adapter {adapter!r}", f"It holds: {', '.join(named) or 'none'}.")
        return folder / adapter
    if len(named) > 1:
        raise FormatError(f"{folder}: holds the adapters {', '.join(named)}", "Name one: --adapter, or adapter=.")
    return folder / named[0]


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, options: Reading) -> Adapter:
    folder = _folder(path, options.adapter)
    if not (folder / CONFIG).exists():
        raise FormatError(f"{folder}: has no {CONFIG}", "The rank and alpha are in it: copy it beside the weights.")
    raw = read_json(folder / CONFIG)
    _refuse_variants(raw, folder / CONFIG)
    whole = (folder / WEIGHTS).exists()
    tensors = read_safetensors(folder / WEIGHTS) if whole else read_state(folder / PICKLE)
    return from_tensors(tensors, raw, folder, options)


def read_state(path: Path) -> dict[str, mx.array]:
    """A pickled state dict: a dict of tensors and nothing else."""
    state = read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FormatError(f"{path}: holds a {type(state).__name__}, not a state dict", _ALONE)
    other = [f"{path}: {k} is a {type(v).__name__}, not a tensor" for k, v in state.items() if type(v) is not mx.array]
    raise_faults(other, _ALONE, FormatError)
    return state


def from_tensors(tensors: dict[str, mx.array], raw: dict[str, Any], source: Path, options: Reading) -> Adapter:
    """An adapter from PEFT's tensors and config; ``source`` names them in errors."""
    method = _method(raw)
    weights, parts, fused, faults = {}, {}, {}, []
    translate = options.base.to_mlx if options.base is not None and options.base.known else lambda path: path
    theirs: dict[str, str] = {}  # our path -> PEFT's, for the patterns

    def put(key: str, array: mx.array, name: str) -> None:
        if key in weights:
            faults.append(f"{name}: a second array for {key}")
        weights[key] = array

    for name, array in tensors.items():
        if name in SHARED_KEYS:
            put(SHARED_KEYS[name], array, name)
            continue
        path, leaf, turned = _split(name)
        if leaf is None:
            faults.append(f"{name}: not an array of LoRA, DoRA or VeRA")
        elif turned and array.ndim != 2:
            faults.append(f"{name}: shape {list(array.shape)}, expected two dimensions")
        elif (found := experts.EXPERT.match(path)) and leaf in ("lora_a", "lora_b"):
            kind = experts.NAMES.get(found["name"], found["name"])
            slot = parts.setdefault((found["block"], kind, leaf), {})
            theirs.setdefault(f"{found['block']}\n{kind}", path)
            if int(found["expert"]) in slot:
                faults.append(f"{name}: a second array for expert {found['expert']}")
            slot[int(found["expert"])] = array
        elif (found := experts.FUSED.match(path)) and leaf in ("lora_a", "lora_b"):
            fused.setdefault(found["block"], {}).setdefault(bool(found["inner"]), {})[leaf] = array
        else:
            ours = translate(path)
            theirs[ours] = path
            array = array.reshape(-1) if leaf in ("m", "vera_lambda_d", "vera_lambda_b") else array
            put(f"{ours}.{leaf}", array.T if turned else array, name)
    raise_faults([f"{source}: {fault}" for fault in faults], "Convert adapters of linear layers.", FormatError)
    rank_of, scale_of = _rules(raw, source)
    metadata = {"peft": {k: raw[k] for k in ("fan_in_fan_out",) if raw.get(k)}}
    ranks, scales = {}, {}
    for (block, kind, leaf), slot in parts.items():
        ours = f"{experts.block_path(block, options.base)}.{kind}"
        path = theirs[f"{block}\n{kind}"]
        ranks[ours], scales[ours] = rank_of(path), scale_of(path)
        weights[f"{ours}.{leaf}"] = experts.stack_experts(slot, f"{source}: {block}.experts.*.{kind}.{leaf}")
        metadata["peft"]["moe"] = "per_expert"
    if fused:
        metadata["peft"]["moe"] = "target_parameters"
        _unpack(fused, raw, source, options, weights, ranks, scales, rank_of, scale_of)
    parameters = raw.get("target_parameters") or []
    for ours, path in theirs.items():
        if f"{ours}.lora_b" in weights and ours not in ranks:
            direct = any(f"{path}.weight" == t or f"{path}.weight".endswith(f".{t}") for t in parameters)
            ranks[ours], scales[ours] = (rank_of(path + ".weight" * direct), scale_of(path + ".weight" * direct))
    if (method == "lora" and any(key.endswith(".m") for key in weights)) or (
        method == "dora" and weights and not any(key.endswith(".m") for key in weights)
    ):
        there = "not" if method == "dora" else "there"
        raise FormatError(
            f"{source}: use_dora is {method == 'dora'} but magnitudes are {there}",
            f"Write use_dora as it was trained into {CONFIG}, or save or download the adapter again.",
        )
    weights = _untie(raw, weights, ranks, scales, options)
    weights, metadata["peft"]["saved"] = _without_base(weights, theirs, options)
    config = _config(raw, method, weights, ranks, scales, theirs, source, options)
    adapter = Adapter(config, weights, base=raw.get("base_model_name_or_path"), metadata=metadata)
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and peft_starts.mutates(start):
        adapter = peft_starts.portable(adapter, start, source, options)
    return adapter


def _method(raw: dict[str, Any]) -> str:
    if raw["peft_type"] == "VERA":
        return "vera"
    return "dora" if raw.get("use_dora") or raw["peft_type"] == "DORA" else "lora"


def _refuse_variants(raw: dict[str, Any], source: Path) -> None:
    kind = raw.get("peft_type")
    if kind is None:
        raise FormatError(
            f"{source}: has no peft_type: not a PEFT config",
            f'Write "peft_type": "LORA" into {CONFIG} if PEFT made it.',
        )
    if kind not in _TYPES:
        raise FormatError(f"{source}: peft_type {kind} is not converted ({', '.join(_TYPES)} are)", "Merge it in PEFT.")
    faults = [f"{source}: {what} ({name}) is not converted" for name, what in _VARIANTS.items() if raw.get(name)]
    if raw.get("bias", "none") not in ("none", "all", "lora_only", "vera_only"):
        faults.append(f"{source}: bias {raw['bias']!r} is not known")
    faults += [
        f"{source}: not a LoRA config of PEFT ({name} is a {type(raw[name]).__name__})"
        for name, kinds in _TYPES_OF.items()
        if raw.get(name) is not None and not isinstance(raw[name], kinds)
    ]
    names = raw.get("target_parameters") or []
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        faults.append(f"{source}: target_parameters must be names")
    raise_faults(faults, "Merge it into the model in PEFT.", FormatError)


def _split(name: str) -> tuple[str, str | None, bool]:
    """A PEFT tensor name -> (module path, our leaf, transposed?); leaf None for one that has no place."""
    if not name.startswith(PREFIX):
        return name, None, False
    bare = name[len(PREFIX) :]
    for theirs, (ours, turned) in {**LEAVES, **OTHER_LEAVES}.items():
        # An adapter's name, stripped by PEFT on saving, is tolerated as PEFT tolerates it.
        head, _, tail = theirs.rpartition(".") if theirs.startswith("token") else theirs.partition(".")
        named = (
            f".{theirs}.default" if theirs.startswith("token") else f".{head}.default" + (f".{tail}" if tail else "")
        )
        for suffix in (f".{theirs}", named):
            if bare.endswith(suffix):
                return bare[: -len(suffix)], ours, turned
    path, _, leaf = bare.replace(".modules_to_save.default.", ".").rpartition(".")
    if path and leaf in ("weight", "bias") and not re.search(r"\.(lora|vera|ia3|hada|lokr|oft|boft|token)_", bare):
        return path.removesuffix(".base_layer").removesuffix(".original_module"), leaf, False
    return name, None, False


def _not_peft(source: Path, error: Exception) -> FormatError:
    return wrong_settings(source / CONFIG, f"not a LoRA config of PEFT ({type(error).__name__}: {error})")


def _rules(raw: dict[str, Any], source: Path):
    """PEFT's rank and multiplier by PEFT's module path, as two functions."""

    def guarded(rule):
        def asked(path: str):
            try:
                return rule(path)
            except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
                raise _not_peft(source, error) from None

        return asked

    def rank(path: str) -> int:
        return match_pattern(raw.get("rank_pattern") or {}, path, raw["r"])

    def scale(path: str) -> float:
        alpha = match_pattern(raw.get("alpha_pattern") or {}, path, raw.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank(path)) if raw.get("use_rslora") else float(rank(path)))

    return guarded(rank), guarded(scale)


def _unpack(fused, raw, source, options, weights, ranks, scales, rank_of, scale_of) -> None:
    """Matrices over parameters of experts -> gate_proj, up_proj and down_proj in ``weights``."""
    base = options.base if options.base is not None and options.base.known else None
    names = raw.get("target_parameters") or []
    order = [n for n in ("gate_up_proj", "down_proj") if any(t == n or t.endswith("." + n) for t in names)]
    hidden = base.hidden_size if base else _hidden_size(weights)
    for block, layers in fused.items():
        # PEFT wraps in the order of registration: the last parameter is outermost, the others below base_layer.
        here = [n for n in order if _covers(names, f"{block}.experts.{n}")] or order
        kinds = {True: "gate_up_proj", False: "down_proj"} if len(layers) == 2 else {False: here[0] if here else None}
        packed = {}
        for inner, pair in layers.items():
            kind = kinds.get(inner)
            if kind is None or (len(layers) == 1 and len(here) > 1) or pair.keys() != {"lora_a", "lora_b"}:
                raise FormatError(
                    f"{source}: {block}.experts: target_parameters does not tell what its matrices belong to",
                    "Write there what was trained: mlp.experts.gate_up_proj, mlp.experts.down_proj or both.",
                )
            path = f"{block}.experts.{kind}"
            packed[kind] = experts.Packed(pair["lora_a"], pair["lora_b"], rank_of(path))
            if fault := packed[kind].fault():
                raise FormatError(f"{source}: {path}: {fault}", "Gather sharded weights before saving.")
        in_out = bool(base and base.experts_in_out)
        turned = experts.exchanged(
            packed.get("gate_up_proj"), packed.get("down_proj"), hidden, raw.get("peft_version"), in_out
        )
        interleaved = bool(base and base.model_type == "gpt_oss")
        for kind, matrices in packed.items():
            path = f"{block}.experts.{kind}"
            a, b = matrices.unpack(turned)
            modules = experts.split_gate_up(a, b, interleaved) if kind == "gate_up_proj" else {kind: (a, b)}
            for name, (part_a, part_b) in modules.items():
                ours = f"{experts.block_path(block, options.base)}.{name}"
                weights[f"{ours}.lora_a"], weights[f"{ours}.lora_b"] = part_a, part_b
                ranks[ours], scales[ours] = part_a.shape[1], scale_of(path)


def _covers(names: list[str], path: str) -> bool:
    return any(path == name or path.endswith("." + name) for name in names)


def _hidden_size(weights: dict[str, mx.array]) -> int | None:
    """What the attention of the same adapter reads."""
    found = {w.shape[0] for n, w in weights.items() if n.endswith(("q_proj.lora_a", "k_proj.lora_a", "v_proj.lora_a"))}
    return found.pop() if len(found) == 1 else None


def _untie(raw, weights, ranks, scales, options):
    """What PEFT repeats on an output that is tied to the embedding, ours says once: rows of tokens, and, turned round,
    the matrices of an embedding with ``ensure_weight_tying``."""
    gone = set()
    rows = [n for n in weights if n.endswith(".trainable_tokens")]
    for head in [n for n in rows if "lm_head" in n]:
        if any(n != head and mx.array_equal(weights[n], weights[head]).item() for n in rows):
            gone.add(head)
    heads = [n[:-7] for n in weights if n.endswith("lm_head.lora_a")] if raw.get("ensure_weight_tying") else []
    for path in [n[:-7] for n in weights if n.endswith(".lora_a") and EMBEDDING_NAME.search(n[:-7])]:
        for head in heads:
            a, b = weights[f"{path}.lora_a"], weights[f"{path}.lora_b"]
            if mx.array_equal(weights[f"{head}.lora_a"], b.T) and mx.array_equal(weights[f"{head}.lora_b"], a.T):
                ranks.pop(head, None), scales.pop(head, None)
                gone |= {n for n in weights if n.startswith(head + ".")}
    return {n: w for n, w in weights.items() if n not in gone}


def _without_base(weights, theirs, options):
    """PEFT saves an adapted embedding itself too. Where the base is at hand and holds the same, it is no change: it is
    kept for the way back to PEFT alone."""
    saved = {}
    if options.base is None or options.base.folder is None:
        return weights, saved
    for name in [n for n in weights if n.endswith(".weight") and f"{n[:-7]}.lora_a" in weights]:
        own = options.base.tensor(f"{theirs[name[:-7]]}.weight")
        if own is not None and mx.array_equal(own, weights[name].astype(own.dtype)).item():
            saved[name] = weights[name]
    return {n: w for n, w in weights.items() if n not in saved}, saved


def _config(raw, method, weights, ranks, scales, theirs, source, options) -> AdapterConfig:
    knobs: dict[str, Any] = {"method": method, "num_layers": -1}
    embeddings = [n for n in weights if n.endswith((".lora_a", ".weight")) and EMBEDDING_NAME.search(n[:-7])]
    try:
        if method == "vera":
            knobs |= {"rank": raw["r"], "dropout": raw.get("vera_dropout", 0.0)}
            knobs |= {k: raw[k] for k in ("projection_prng_key", "save_projection", "d_initial") if k in raw}
        elif raw["peft_type"] != "TRAINABLE_TOKENS":
            rank, alpha = raw["r"], raw.get("lora_alpha", 8)
            default = alpha / (math.sqrt(rank) if raw.get("use_rslora") else float(rank))
            knobs |= {"rank": rank, "scale": default, "dropout": raw.get("lora_dropout", 0.0)}
            knobs["rank_pattern"] = {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != rank}
            knobs["scale_pattern"] = {f"^{re.escape(p)}": s for p, s in sorted(scales.items()) if s != default}
            knobs["lora_bias"] = bool(raw.get("lora_bias"))
        if embeddings:
            tied = raw.get("ensure_weight_tying") and not any(n.endswith("lm_head.lora_a") for n in weights)
            untied = options.base is not None and options.base.known and not options.base.tied
            knobs["embedding_side"] = "both" if tied or untied else "input"
        bias = raw.get("bias", "none")
        knobs["bias"] = "lora_only" if bias == "vera_only" else bias
        whole = {n.rpartition(".")[0] for n in weights if n.endswith(".weight")}
        whole_theirs = {theirs.get(n.rpartition(".")[0], n) for n in weights if n.endswith((".weight", ".bias"))}
        whole |= {n[:-5] for n in weights if n.endswith(".bias") and (bias == "none" or n[:-5] in whole)}
        promised = raw.get("modules_to_save") or []
        absent = [n for n in promised if not any(f".{n}." in f".{path}." for path in whole_theirs)]
        if absent:
            raise FormatError(
                f"{source / CONFIG}: modules_to_save names {', '.join(absent)}, and the weights hold none of it",
                "Save or download the adapter again.",
            )
        if whole:
            knobs["modules_to_save"] = tuple(sorted(whole))
        if any(n.endswith(".trainable_tokens") for n in weights):
            knobs["trainable_token_indices"] = _tokens(raw, weights, source)
        return AdapterConfig(**knobs)
    except ConfigError as error:
        raise wrong_settings(source / CONFIG, error) from None
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
        raise _not_peft(source, error) from None


def _tokens(raw, weights, source) -> dict[str, tuple[int, ...]]:
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
