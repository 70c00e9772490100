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
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults, split_layer
from ..config import AdapterConfig, match_pattern
from ..errors import ConfigError, FormatError
from . import peft_experts as experts
from . import peft_starts
from .files import read_json, read_safetensors, write_json, write_safetensors
from .options import Reading, Writing
from .pickles import read_torch
from .uniform import as_lora, integral, uniform

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
READS, WRITES = {"adapter"}, {"moe", "profile"}

# PEFT's leaf -> (ours, whether the array is transposed).
LEAVES = {
    "lora_A.weight": ("lora_a", True),
    "lora_B.weight": ("lora_b", True),
    "lora_B.bias": ("lora_bias", False),
    "lora_magnitude_vector": ("m", False),
    "lora_embedding_A": ("lora_a", True),
    "lora_embedding_B": ("lora_b", True),
    "vera_lambda_d": ("vera_lambda_d", False),
    "vera_lambda_b": ("vera_lambda_b", False),
    "token_adapter.trainable_tokens_delta": ("trainable_tokens", False),
}
_OTHER_LEAVES = {
    "lora_magnitude_vector.weight": ("m", False),
    "weight_m_wdecomp.weight": ("m", False),  # NVlabs/DoRA
    "trainable_tokens_delta": ("trainable_tokens", False),
}
_SHARED = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}
_OURS = {ours: theirs for theirs, (ours, _) in reversed(LEAVES.items()) if "embedding" not in theirs}
_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
_EMBEDDING_NAME = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*)$")

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
        raise FormatError(f"{path}: holds a {type(state).__name__}, not a state dict")
    other = [f"{path}: {k} is a {type(v).__name__}, not a tensor" for k, v in state.items() if type(v) is not mx.array]
    raise_faults(other, "Save the adapter's state dict alone.", FormatError)
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
        if name in _SHARED:
            put(_SHARED[name], array, name)
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
        raise FormatError(f"{source}: use_dora is {method == 'dora'} but magnitudes are {there}")
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
        raise FormatError(f"{source}: has no peft_type: not a PEFT config", "Is this another system's adapter?")
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
    for theirs, (ours, turned) in {**LEAVES, **_OTHER_LEAVES}.items():
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


def _rules(raw: dict[str, Any], source: Path):
    """PEFT's rank and multiplier by PEFT's module path, as two functions."""

    def guarded(rule):
        def asked(path: str):
            try:
                return rule(path)
            except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
                text = f"{type(error).__name__}: {error}"
                raise FormatError(f"{source / CONFIG}: not a LoRA config of PEFT ({text})") from None

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
                    "It names gate_up_proj, down_proj or both.",
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
    for path in [n[:-7] for n in weights if n.endswith(".lora_a") and _EMBEDDING_NAME.search(n[:-7])]:
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
    back = {path: ours for ours, path in theirs.items()}
    knobs: dict[str, Any] = {"method": method, "num_layers": -1}
    embeddings = [n for n in weights if n.endswith((".lora_a", ".weight")) and _EMBEDDING_NAME.search(n[:-7])]
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
        whole |= {n[:-5] for n in weights if n.endswith(".bias") and (bias == "none" or n[:-5] in whole)}
        if whole:
            knobs["modules_to_save"] = tuple(sorted(whole))
        if any(n.endswith(".trainable_tokens") for n in weights):
            knobs["trainable_token_indices"] = _tokens(raw, weights, back, source)
        return AdapterConfig(**knobs)
    except ConfigError as error:
        raise FormatError(f"{source / CONFIG}: {error}") from None
    except (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, re.error) as error:
        raise FormatError(f"{source / CONFIG}: not a LoRA config of PEFT ({type(error).__name__}: {error})") from None


def _tokens(raw, weights, back, source) -> dict[str, tuple[int, ...]]:
    stated = raw.get("trainable_token_indices", raw.get("token_indices"))
    found = {}
    for path in [n.removesuffix(".trainable_tokens") for n in weights if n.endswith(".trainable_tokens")]:
        ids = stated
        if isinstance(stated, dict):
            ids = next((v for k, v in stated.items() if path == k or path.endswith("." + k)), None)
        if not isinstance(ids, list):
            raise FormatError(
                f"{source / CONFIG}: names no token ids for {path}", "trainable_token_indices holds them."
            )
        found[path] = tuple(ids)
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


def write(adapter: Adapter, folder: Path, options: Writing) -> None:
    if adapter.config.method == "full":
        fault = "fully trained weights are no adapter in PEFT"
        raise FormatError(fault, "Save it as mlx-lm, or merge it into a model: convert --to merged.")
    if not adapter.modules:
        return _write_tokens(adapter, folder, options)
    if options.profile == "serving":
        adapter = _for_serving(adapter, options)
    layout = options.moe or ("per_expert" if options.profile else adapter.metadata.get("peft", {}).get("moe"))
    base = options.base if options.base is not None and options.base.known else None
    switches = [p for p in adapter.modules if f"{p}.lora_a" in adapter.weights and _is_switch(adapter, p)]
    if switches and adapter.config.method != "lora":
        raise FormatError(f"{switches[0]}: PEFT has no DoRA on experts", "Merge it: convert --to merged.")
    if adapter.config.method == "vera" and any(adapter.weights[f"{p}.vera_lambda_d"].ndim > 1 for p in adapter.modules):
        raise FormatError("PEFT has no VeRA on experts", "Leave the experts out, or merge: convert --to merged.")
    exact = adapter.exact_config()
    if switches and layout == "per_expert":
        adapter = _for_experts(adapter, switches)
        switches = [path for path in adapter.modules if _is_switch(adapter, path)]
        exact = adapter.config
    hf = base.to_hf if base else _guess_hf
    names = {path: hf(path) for path in adapter.modules}
    writer = _Writer(adapter, names)
    for path in adapter.modules:
        if path not in switches:
            writer.module(path, base)
    if switches:
        writer.experts(switches, layout or "target_parameters", base)
    writer.beside(hf)
    raw = writer.config(exact, base)
    write_safetensors(folder / WEIGHTS, writer.tensors, {"format": "pt"})
    write_json(folder / CONFIG, raw)


def _write_tokens(adapter: Adapter, folder: Path, options: Writing) -> None:
    """Trained rows of one embedding and nothing else."""
    if len(adapter.tokens) != 1 or adapter.whole or options.profile or options.moe:
        fault = "PEFT has no adapter of whole modules alone, nor of rows of several embeddings"
        raise FormatError(fault, "Merge it into the model instead: convert --to merged.")
    (path, (ids, rows)) = next(iter(adapter.tokens.items()))
    name = options.base.to_hf(path) if options.base is not None and options.base.known else _guess_hf(path)
    raw = {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "target_modules": [name],
        "token_indices": list(ids),
        "inference_mode": True,
        "init_weights": True,
    }
    tensors = {f"{PREFIX}{name}.trainable_tokens_delta": rows}
    if options.base is not None and options.base.known and options.base.tied:
        tensors[f"{PREFIX}lm_head.trainable_tokens_delta"] = rows
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, raw)


def _is_switch(adapter: Adapter, path: str) -> bool:
    return adapter.weights[f"{path}.lora_a"].ndim == 3


def _guess_hf(path: str) -> str:
    """Without a base: mlx-lm's GPT-2 is told by its names, others are called alike."""
    if re.match(r"model\.(h\.\d+\.(attn\.c_|mlp\.c_)|wte$|wpe$)", path):
        return "transformer." + path.removeprefix("model.")
    return path


def _for_serving(adapter: Adapter, options: Writing) -> Adapter:
    config, faults = adapter.config, []
    if config.method == "dora":
        faults.append("DoRA: vLLM and its like take LoRA only")
    if adapter.whole:
        faults.append(f"{len(adapter.whole)} fully trained parameters (modules_to_save or bias)")
    if adapter.tokens:
        faults.append("trained rows of embeddings (trainable_token_indices)")
    if config.lora_bias:
        faults.append("lora_bias: vLLM refuses it")
    raise_faults(faults, "Merge it into the model instead: convert --to merged.", FormatError)
    return uniform(as_lora(adapter, options.base), integer=True)


def _for_experts(adapter: Adapter, switches: list[str]) -> Adapter:
    """PEFT converts keys for each expert, and the router's, by the config's one rank and alpha: they must have them."""
    blocks = {path.rpartition(".")[0] for path in switches}
    same = [p for p in adapter.modules if p in switches or p in {f"{b.rpartition('.')[0]}.gate" for b in blocks}]
    part = replace(adapter, weights={n: w for n, w in adapter.weights.items() if n.rpartition(".")[0] in set(same)})
    folded = uniform(part)
    weights = {**adapter.weights, **folded.weights}
    for block in blocks:
        _complete(block, weights)
        a, b = f"{block}.gate_proj.lora_a", f"{block}.gate_proj.lora_b"
        if a in weights and f"{block}.down_proj.lora_a" not in weights:  # PEFT takes it that both are there
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
    """gate and up are one parameter in transformers 5: where one alone has an adapter, the other gets one of zeros."""
    pair = [f"{block}.gate_proj", f"{block}.up_proj"]
    there = [path for path in pair if f"{path}.lora_a" in weights]
    if len(there) == 1:
        other = pair[1 - pair.index(there[0])]
        for leaf in ("lora_a", "lora_b"):
            weights[f"{other}.{leaf}"] = mx.zeros_like(weights[f"{there[0]}.{leaf}"])


class _Writer:
    """Gathers PEFT's tensors and what the config must say of them."""

    def __init__(self, adapter: Adapter, names: dict[str, str]):
        self.adapter, self.names = adapter, names
        self.tensors: dict[str, mx.array] = {}
        self.targets: list[str] = []  # transformers' paths of target modules
        self.parameters: list[str] = []  # transformers' paths of target parameters
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.extra: dict[str, Any] = {}

    def _size(self, name: str, rank: int, scale: float) -> None:
        self.ranks[name], self.alphas[name] = rank, integral(scale * rank)

    def module(self, path: str, base) -> None:
        """One linear layer or embedding."""
        adapter, name = self.adapter, self.names[path]
        embedding = bool(_EMBEDDING_NAME.search(path))
        if embedding and adapter.config.method != "lora":
            raise FormatError(
                f"{path}: {adapter.config.method} of embeddings has magnitudes by token, which PEFT has not",
                "Leave the embedding out of the adapter, or merge it: convert --to merged.",
            )
        prefix = f"{PREFIX}{name}."
        for leaf in ("lora_a", "lora_b", "m", "lora_bias", "vera_lambda_d", "vera_lambda_b"):
            array = adapter.weights.get(f"{path}.{leaf}")
            if array is not None:
                theirs = _EMBEDDING.get(leaf, _OURS[leaf]) if embedding else _OURS[leaf]
                self.tensors[prefix + theirs] = array.T if leaf in ("lora_a", "lora_b") else array
        self.targets.append(name)
        if adapter.config.method == "vera":
            return
        rank, scale = adapter.rank_of(path), adapter.config.scale_of(path)
        self._size(name, rank, scale)
        if embedding and adapter.config.embedding_side == "both" and self._tied(base, path):
            head = "lm_head"
            self.tensors[f"{PREFIX}{head}.lora_A.weight"] = adapter.weights[f"{path}.lora_b"]
            self.tensors[f"{PREFIX}{head}.lora_B.weight"] = adapter.weights[f"{path}.lora_a"]
            self.targets.append(head)
            self._size(head, rank, scale)
            self.extra["ensure_weight_tying"] = True

    def _tied(self, base, path: str) -> bool:
        if base is None:
            raise FormatError(
                f"{path}: whether the model ties its output to this embedding is not known", "Name the base: --model."
            )
        return base.tied

    def experts(self, switches: list[str], layout: str, base) -> None:
        """Experts, as ``layout`` has them."""
        weights = self.adapter.weights
        blocks = dict.fromkeys(path.rpartition(".")[0] for path in switches)
        for block in blocks:
            parent = block.rpartition(".")[0]
            kinds = [k for k in ("gate_proj", "up_proj", "down_proj") if f"{block}.{k}.lora_a" in weights]
            strange = [p for p in switches if p.rpartition(".")[0] == block and p.rpartition(".")[2] not in kinds]
            raise_faults([f"{p}: PEFT has no such experts" for p in strange], "", FormatError)
            if layout == "per_expert":
                mixtral = (base.model_type in ("mixtral", "minimax")) if base else parent.endswith("block_sparse_moe")
                name = parent if parent.endswith("block_sparse_moe") else (base.to_hf(parent) if base else parent)
                for kind in kinds:
                    theirs = experts.MIXTRAL[kind] if mixtral else kind
                    self.targets.append(f"{name}.experts.{{}}.{theirs}")
                    for leaf in ("lora_a", "lora_b"):
                        for number, array in enumerate(weights[f"{block}.{kind}.{leaf}"]):
                            key = f"{PREFIX}{name}.experts.{number}.{theirs}.{_OURS[leaf]}"
                            self.tensors[key] = array
                continue
            name = base.to_hf(parent) if base else parent.replace("block_sparse_moe", "mlp")
            self._parameters(block, name, kinds, base)

    def _parameters(self, block: str, name: str, kinds: list[str], base) -> None:
        adapter, found = self.adapter, {}
        interleaved = bool(base and base.model_type == "gpt_oss")
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
            packed = experts.pack(a, b)
            for leaf, array in zip(("lora_A", "lora_B"), packed, strict=True):
                self.tensors[f"{PREFIX}{name}.experts{inner}.{leaf}.weight"] = array
            self.parameters.append(f"{name}.experts.{kind}")
            self._size(f"{name}.experts.{kind}", a.shape[1], scale)

    def beside(self, hf) -> None:
        """Whole parameters, trained rows of embeddings, VeRA's projections."""
        adapter = self.adapter
        adapted, saved = set(adapter.modules), set()
        for name, array in {**adapter.whole, **adapter.metadata.get("peft", {}).get("saved", {})}.items():
            path, _, leaf = name.rpartition(".")
            inside = ".base_layer" if path in adapted else ""
            self.tensors[f"{PREFIX}{hf(path)}{inside}.{leaf}"] = array
            if inside and "ensure_weight_tying" in self.extra and _EMBEDDING_NAME.search(path):
                self.tensors[f"{PREFIX}lm_head.base_layer.{leaf}"] = array
            if leaf != "bias" or adapter.config.bias == "none":
                saved.update([hf(path)] if not inside else [])
        if saved:
            self.extra["modules_to_save"] = sorted(saved)
        if adapter.config.bias != "none":
            bias = adapter.config.bias
            self.extra["bias"] = "vera_only" if adapter.config.method == "vera" and bias == "lora_only" else bias
        for path, (ids, rows) in adapter.tokens.items():
            self.tensors[f"{PREFIX}{hf(path)}.token_adapter.trainable_tokens_delta"] = rows
            self.extra.setdefault("trainable_token_indices", {})[hf(path)] = list(ids)
        for theirs, ours in _SHARED.items():
            if ours in adapter.weights:
                self.tensors[theirs] = adapter.weights[ours]

    def config(self, exact: AdapterConfig, base) -> dict[str, Any]:
        adapter = self.adapter
        method = adapter.config.method
        raw: dict[str, Any] = {
            "peft_type": "VERA" if method == "vera" else "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": adapter.base,
            "r": exact.rank,
            "bias": "none",
            "fan_in_fan_out": bool(adapter.metadata.get("peft", {}).get("fan_in_fan_out"))
            or bool(base and base.model_type == "gpt2"),
            "inference_mode": True,
        }
        router = [t for t in self.targets if self._is_router(t, base)] if self.parameters else []
        modules = [t for t in self.targets if "{}" not in t and t not in router]
        per_expert = sorted({t.rpartition(".")[2] for t in self.targets if "{}" in t})
        targets, layers = _targets(modules) if modules and not per_expert and not self.parameters else (modules, None)
        raw["target_modules"] = sorted(targets) + per_expert
        if layers is not None:
            raw["layers_to_transform"] = layers
        if self.parameters:
            for name in router:
                self.ranks[f"{name}.weight"], self.alphas[f"{name}.weight"] = (
                    self.ranks.pop(name),
                    self.alphas.pop(name),
                )
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
        alpha = integral(exact.scale * exact.rank)
        raw |= {
            "lora_alpha": alpha,
            "lora_dropout": exact.dropout,
            "use_dora": method == "dora",
            "init_lora_weights": True,  # whatever the start was: PEFT would apply it to the base again
        }
        if exact.lora_bias:
            raw["lora_bias"] = True
        if ranks := {f"^{re.escape(n)}": r for n, r in self.ranks.items() if r != exact.rank}:
            raw["rank_pattern"] = ranks
        if alphas := {f"^{re.escape(n)}": a for n, a in self.alphas.items() if a != alpha}:
            raw["alpha_pattern"] = alphas
        return {**raw, **self.extra}

    def _is_router(self, name: str, base) -> bool:
        block, _, leaf = name.rpartition(".")
        return leaf == "gate" and any(p.startswith(f"{block}.experts.") for p in self.parameters)


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
