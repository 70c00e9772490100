"""litgpt's adapter folder: ``lit_model.pth.lora``, ``hyperparameters.yaml`` and ``model_config.yaml``.

The file is ``{"model": {...}}`` with keys ``transformer.h.N.attn.qkv.lora_A`` [r * k, in] and ``lora_B`` [rows, r]. q,
k and v are one matrix, rows q | k | v; ``lora_query``, ``lora_key`` and ``lora_value`` say which k of them are adapted.
Each has its own r rows of ``lora_A``, and ``lora_B`` has the rows of the adapted ones. ``attn.proj``, ``mlp.fc_1``
(gate), ``fc_2`` (up), ``proj`` (down) and ``lm_head`` are plain. The multiplier is lora_alpha / lora_r. Rows are in
transformers' order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults, split_layer
from ..base.names import BaseModel
from ..errors import FormatError
from .files import read_yaml, write_yaml
from .fused_projections import Pair, fuse_projections, split_projections
from .options import ReadOptions, WriteOptions, locate_modules
from .state_dicts import low_rank_adapter, read_state, tensor_names
from .torch.write import write_torch
from .uniform import low_rank_only, uniform

WEIGHTS, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
READS, WRITES, FILES = {"alpha"}, {"alpha"}, (WEIGHTS, SETTINGS, MODEL)
_KEY = re.compile(r"^(?P<path>transformer\.h\.\d+\.(?:attn|mlp)\.\w+|lm_head)\.(?P<leaf>lora_A|lora_B)$")
_MODULES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "lm_head": "lm_head",
}
_SWITCHES = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}  # litgpt's setting for each


def _file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def detect(path: Path) -> bool:
    file = _file(path)
    return file.name.endswith(".lora") and any(_KEY.match(name) for name in tensor_names(file)[1])


def read(path: Path, options: ReadOptions) -> Adapter:
    file = _file(path)
    settings = read_yaml(file.parent / SETTINGS) if (file.parent / SETTINGS).exists() else {}
    alpha = options.alpha_from(settings.get("lora_alpha"), file.parent / SETTINGS)
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
        if module == "attn.qkv":
            split = _split_qkv(a, b, settings, file, options)
            found = {f"model.layers.{layer}.self_attn.{leaf}": own for leaf, own in split.items()}
        elif module == "attn.attn":
            raise FormatError(
                f"{file}: {name}: litgpt before 2025 interleaved the rows of q, k and v, which is not converted",
                "Convert the checkpoint with a newer litgpt first.",
            )
        elif module in _MODULES:
            found = {name if layer is None else f"model.layers.{layer}.{_MODULES[module]}": (a, b)}
        else:
            raise FormatError(f"{file}: {name}: has no counterpart in transformers' Llama", "Convert it in litgpt.")
        for path, own in found.items():
            weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = own
    return fuse_projections(low_rank_adapter(weights, file, options, alpha=alpha), options.known_base)


def _split_qkv(a: mx.array, b: mx.array, settings: dict[str, Any], file: Path, options: ReadOptions) -> dict[str, Pair]:
    """A [in, r * k] and B [r, rows] of the fused matrix -> those of the adapted ones of q, k and v."""
    sizes, rank = _stored_sizes(file.parent / MODEL), b.shape[0]
    if sizes is None and (base := options.base_for(f"{file}: the sizes of q, k and v")):
        sizes = _base_sizes(base)
    adapted = [name for name, switch in _SWITCHES.items() if settings.get(switch, name != "k_proj")]
    if sizes is None:  # lenient reading: only the sum of the rows is known
        adapted = adapted[: max(1, a.shape[1] // rank)]
        sizes = dict.fromkeys(adapted, b.shape[1] // len(adapted))
        sizes[adapted[0]] += b.shape[1] % len(adapted)
    if a.shape[1] != rank * len(adapted) or b.shape[1] != sum(sizes[name] for name in adapted):
        raise FormatError(
            f"{file}: qkv: lora_A {list(a.T.shape)} and lora_B {list(b.T.shape)} are not those of "
            f"{', '.join(adapted)} with {sizes} rows",
            f"{SETTINGS} lists which of q, k and v are adapted; {MODEL} or the base gives their sizes.",
        )
    found, start = {}, 0
    for i, name in enumerate(adapted):
        found[name] = a[:, i * rank : (i + 1) * rank], b[:, start : start + sizes[name]]
        start += sizes[name]
    return found


def _stored_sizes(config: Path) -> dict[str, int] | None:
    """Rows of q, k and v by litgpt's model config; None if it does not give them."""
    if not config.exists():
        return None
    settings = read_yaml(config)
    heads, groups = settings.get("n_head"), settings.get("n_query_groups") or settings.get("n_head")
    head, width = settings.get("head_size"), settings.get("n_embd")
    if head is None and isinstance(heads, int) and isinstance(width, int) and heads:
        head = width // heads
    if not all(isinstance(n, int) and n > 0 for n in (heads, groups, head)):
        return None
    return {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}


def _base_sizes(base: BaseModel) -> dict[str, int]:
    """Rows of q, k and v by the base's config."""
    heads = (base.heads, base.kv_heads, base.kv_heads)
    return {name: n * base.head_dim for name, n in zip(_SWITCHES, heads, strict=True)}


def write(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    base = options.base_for("litgpt's model_config.yaml")
    adapter = low_rank_only(adapter, options, "litgpt")
    adapter = uniform(split_projections(adapter, base), alpha=options.alpha)
    weights, rank = adapter.weights, adapter.config.rank
    names = {f"self_attn.{name}": "attn.qkv" for name in _SWITCHES} | {ours: name for name, ours in _MODULES.items()}
    modules = locate_modules(adapter, names, "litgpt")
    names, state = {split_layer(path)[1] for path in modules}, {}
    for path, (layer, name) in modules.items():
        if name != "attn.qkv":
            key = name if layer is None else f"transformer.h.{layer}.{name}"
            state[f"{key}.lora_A"], state[f"{key}.lora_B"] = weights[f"{path}.lora_a"].T, weights[f"{path}.lora_b"].T
    adapted, sizes = [name for name in _SWITCHES if f"self_attn.{name}" in names], _base_sizes(base)
    for layer in sorted({layer for layer, name in modules.values() if name == "attn.qkv"}):
        a, b = [], []
        for name in adapted:
            path = f"model.layers.{layer}.self_attn.{name}"
            # Adapted only in another layer: zeros here.
            a.append(weights.get(f"{path}.lora_a", mx.zeros((base.hidden_size, rank))).T)
            b.append(weights.get(f"{path}.lora_b", mx.zeros((rank, sizes[name]))).T)
        state[f"transformer.h.{layer}.attn.qkv.lora_A"] = mx.concatenate(a)
        state[f"transformer.h.{layer}.attn.qkv.lora_B"] = mx.concatenate(b)
    settings = {
        "lora_r": rank,
        "lora_alpha": adapter.config.scale * rank,
        "lora_dropout": adapter.config.dropout,
        **{switch: name in adapted for name, switch in _SWITCHES.items()},
        "lora_projection": "self_attn.o_proj" in names,
        "lora_mlp": any(name.startswith("mlp.") for name in names),
        "lora_head": "lm_head" in names,
        "checkpoint_dir": adapter.base or base.name,
    }
    model = {"n_head": base.heads, "n_query_groups": base.kv_heads, "head_size": base.head_dim}
    model |= {"n_embd": base.hidden_size, "n_layer": base.size("num_hidden_layers")}
    write_torch(folder / WEIGHTS, {"model": state})
    write_yaml(folder / SETTINGS, settings)
    write_yaml(folder / MODEL, model)
