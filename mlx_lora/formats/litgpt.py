"""litgpt's adapter folder: ``lit_model.pth.lora``, ``hyperparameters.yaml`` and ``model_config.yaml``.

The file holds ``{"model": {...}}`` with keys ``transformer.h.N.attn.qkv.lora_A`` [r * parts on, in] and ``lora_B``
[rows of the parts on, r]: q, k and v are one matrix, rows q | k | v, with a group of ranks for each part that is on
(``lora_query``, ``lora_key``, ``lora_value``). ``attn.proj``, ``mlp.fc_1`` (gate), ``fc_2`` (up), ``proj`` (down) and
``lm_head`` are plain. The multiplier is lora_alpha / lora_r. Rows are in transformers' order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults, split_layer
from ..errors import FormatError
from . import fused_projections as parts
from .files import read_yaml, write_yaml
from .options import Reading, Writing
from .state_dicts import low_rank, names, read_state
from .torch.write import write_torch
from .uniform import as_lora, uniform

WEIGHTS, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
READS, WRITES = {"alpha"}, {"alpha"}
_KEY = re.compile(r"^(?P<path>transformer\.h\.\d+\.(?:attn|mlp)\.\w+|lm_head)\.(?P<leaf>lora_A|lora_B)$")
_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_THEIRS = {ours: theirs for theirs, ours in _MODULES.items()}
_PARTS = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}


def _file(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.is_file() else None


def detect(path: Path) -> bool:
    file = _file(path)
    if file is None or not file.name.endswith(".lora"):
        return False
    return any(_KEY.match(name) for name in names(file)[1])


def files(folder: Path) -> list[Path]:
    return [folder / WEIGHTS, folder / SETTINGS, folder / MODEL]


def read(path: Path, options: Reading) -> Adapter:
    file = _file(path)
    settings = read_yaml(file.parent / SETTINGS) if (file.parent / SETTINGS).exists() else {}
    alpha = settings.get("lora_alpha") if isinstance(settings.get("lora_alpha"), (int, float)) else None
    if alpha is not None and options.alpha is not None:
        raise FormatError(f"{file.parent / SETTINGS}: tells lora_alpha {alpha}", "Leave --alpha out.")
    weights, faults, pairs = {}, [], {}
    for name, array in read_state(file).items():
        found = _KEY.match(name)
        if not found or array.ndim != 2 or not array.size:
            faults.append(f"{file}: {name}: not a matrix of litgpt's LoRA")
            continue
        pairs.setdefault(found["path"], {})[found["leaf"]] = array
    faults += [f"{file}: {name}: lora_A or lora_B is missing" for name, pair in pairs.items() if len(pair) < 2]
    raise_faults(faults, f"Name the {WEIGHTS} of litgpt finetune_lora as it was saved.", FormatError)
    for name, pair in pairs.items():
        layer, module = split_layer(name)
        a, b = pair["lora_A"].T, pair["lora_B"].T
        if name == "lm_head":
            weights[f"{name}.lora_a"], weights[f"{name}.lora_b"] = a, b
        elif module in ("attn.qkv", "attn.attn"):
            if module == "attn.attn":
                raise FormatError(f"{file}: {name}: litgpt of before 2025 interleaved these rows", "Convert it there.")
            for part, (part_a, part_b) in _split_qkv(a, b, settings, file, options).items():
                stem = f"model.layers.{layer}.self_attn.{part}"
                weights[f"{stem}.lora_a"], weights[f"{stem}.lora_b"] = part_a, part_b
        elif module in _MODULES:
            stem = f"model.layers.{layer}.{_MODULES[module]}"
            weights[f"{stem}.lora_a"], weights[f"{stem}.lora_b"] = a, b
        else:
            raise FormatError(f"{file}: {name}: has no counterpart in transformers' Llama", "Convert it in litgpt.")
    adapter = low_rank(weights, file, options, alpha=alpha)
    return parts.fused(adapter, options.base) if options.base is not None and options.base.known else adapter


def _split_qkv(a, b, settings: dict[str, Any], file: Path, options: Reading) -> dict[str, tuple[mx.array, mx.array]]:
    """A [in, r * on] and B [r, rows on] -> the parts that are on."""
    sizes = _sizes(file, options)
    on = [part for part, flag in _PARTS.items() if settings.get(flag, part != "k_proj")]
    rank = b.shape[0]
    if sizes is None:  # described only: A's groups, and rows in proportion
        sizes = dict.fromkeys(_PARTS, b.shape[1] // max(len(on), 1))
        on = on if sum(sizes[p] for p in on) == b.shape[1] else on[:1]
        sizes[on[0]] = b.shape[1] - sum(sizes[p] for p in on[1:])
    if a.shape[1] != rank * len(on) or b.shape[1] != sum(sizes[part] for part in on):
        raise FormatError(
            f"{file}: qkv: lora_A {list(a.T.shape)} and lora_B {list(b.T.shape)} are not those of {', '.join(on)} "
            f"with {sizes}",
            f"{SETTINGS} tells which parts are on, {MODEL} or the base their sizes.",
        )
    found, at = {}, 0
    for i, part in enumerate(on):
        found[part] = a[:, i * rank : (i + 1) * rank], b[:, at : at + sizes[part]]
        at += sizes[part]
    return found


def _sizes(file: Path, options: Reading) -> dict[str, int] | None:
    """Rows of q, k and v, by litgpt's model config or the base's."""
    if (file.parent / MODEL).exists():
        raw = read_yaml(file.parent / MODEL)
        heads, groups = raw.get("n_head"), raw.get("n_query_groups") or raw.get("n_head")
        head = raw.get("head_size")
        if head is None and isinstance(heads, int) and isinstance(raw.get("n_embd"), int) and heads:
            head = raw["n_embd"] // heads
        if all(isinstance(n, int) and n > 0 for n in (heads, groups, head)):
            return {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
    base = options.base_for(f"{file}: the sizes of q, k and v")
    if base is None:
        return None
    return {part: n * base.head_dim for part, n in zip(_PARTS, (base.heads, base.kv_heads, base.kv_heads), strict=True)}


def write(adapter: Adapter, folder: Path, options: Writing) -> None:
    base = options.base_for("litgpt's model_config.yaml")
    adapter = as_lora(adapter, base)
    faults = []
    if adapter.config.method != "lora":
        raise FormatError(f"litgpt holds no {adapter.config.method} adapter", "Merge it: convert --to merged.")
    options.lose(
        [f"{n}: litgpt's adapters hold no whole parameters" for n in adapter.full_parameters]
        + [f"{path}: litgpt holds no trained tokens" for path in adapter.tokens]
        + [f"{path}: litgpt has no lora_bias" for path in adapter.modules if adapter.config.lora_bias]
    )
    adapter = uniform(parts.unfused(adapter, base), alpha=options.alpha)
    weights, rank = adapter.weights, adapter.config.rank
    split = {path: split_layer(path) for path in adapter.modules}
    on = sorted({n.rpartition(".")[2] for _, n in split.values() if n.startswith("self_attn.") and n[10:] in _PARTS})
    on = [part for part in _PARTS if part in on]
    heads = dict(zip(_PARTS, (base.heads, base.kv_heads, base.kv_heads), strict=True))
    state: dict[str, mx.array] = {}
    for path, (layer, name) in split.items():
        if path == "lm_head":
            theirs = path
        elif name in _THEIRS and path == f"model.layers.{layer}.{name}":
            theirs = f"transformer.h.{layer}.{_THEIRS[name]}"
        elif name[10:] in _PARTS and path == f"model.layers.{layer}.{name}":
            continue
        else:
            faults.append(f"{path}: litgpt has no such module")
            continue
        state[f"{theirs}.lora_A"] = weights[f"{path}.lora_a"].T
        state[f"{theirs}.lora_B"] = weights[f"{path}.lora_b"].T
    raise_faults(faults, "Leave those modules out of the adapter, or merge it: convert --to merged.", FormatError)
    for layer in sorted({layer for layer, name in split.values() if name[10:] in _PARTS}):
        a, b = [], []
        for part in on:
            stem, size = f"model.layers.{layer}.self_attn.{part}", heads[part] * base.head_dim
            if f"{stem}.lora_a" in weights:
                a.append(weights[f"{stem}.lora_a"].T), b.append(weights[f"{stem}.lora_b"].T)
            else:  # on in another layer only: here it does nothing
                a.append(mx.zeros((rank, base.hidden_size))), b.append(mx.zeros((size, rank)))
        state[f"transformer.h.{layer}.attn.qkv.lora_A"] = mx.concatenate(a)
        state[f"transformer.h.{layer}.attn.qkv.lora_B"] = mx.concatenate(b)
    names_on = {name for _, name in split.values()}
    settings = {
        "lora_r": rank,
        "lora_alpha": adapter.config.scale * rank,
        "lora_dropout": adapter.config.dropout,
        **{flag: part in on for part, flag in _PARTS.items()},
        "lora_projection": "self_attn.o_proj" in names_on,
        "lora_mlp": any(name.startswith("mlp.") for name in names_on),
        "lora_head": "lm_head" in split,
        "checkpoint_dir": adapter.base or base.name,
    }
    model = {"n_head": base.heads, "n_query_groups": base.kv_heads, "head_size": base.head_dim}
    model |= {"n_embd": base.hidden_size, "n_layer": base.size("num_hidden_layers")}
    write_torch(folder / WEIGHTS, {"model": state})
    write_yaml(folder / SETTINGS, settings)
    write_yaml(folder / MODEL, model)
