"""torchtune's adapter folder: ``adapter_model.pt`` (or ``adapter_N.pt``) and ``adapter_config.json``.

Keys are ``layers.N.attn.q_proj.lora_a.weight`` [r, in], ``.lora_b.weight`` [out, r], DoRA's ``.magnitude`` [out].
torchtune computes Llama's rotary embeddings on pairs side by side, as Meta does: rows of q and k, of B and of the
magnitudes, are in another order than transformers'. Qwen and Phi-3 keep transformers' order. torchtune's own export to
PEFT leaves the magnitudes of q and k in the wrong order and turns Qwen's rows: read the ``.pt``, not what lies beside.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter, raise_faults, split_layer
from ..base.names import BaseModel
from ..errors import FormatError
from . import fused_projections as parts
from .files import read_json, write_json
from .options import Reading, Writing
from .state_dicts import low_rank, matching, read_state
from .torch.write import write_torch
from .uniform import as_lora, uniform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.pt"
READS, WRITES = {"alpha"}, {"alpha"}
_KEY = re.compile(
    r"^(?:decoder\.)?(?P<path>(?:layers\.\d+\.(?:attn|mlp)\.\w+|output))\.(?P<leaf>lora_a\.weight|lora_b\.weight|magnitude)$"
)
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_THEIRS = {ours: theirs for theirs, ours in _MODULES.items()}
_LEAVES = {"lora_a.weight": "lora_a", "lora_b.weight": "lora_b", "magnitude": "m"}
# Whose rotary embeddings torchtune computes on pairs side by side.
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_PLAIN = ("qwen2", "qwen3", "phi3")


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".pt" else None
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    found = sorted(path.glob("adapter_*.pt"), key=lambda p: (len(p.name), p.name))
    return found[-1] if found else None


def detect(path: Path) -> bool:
    file = _file(path)
    return file is not None and matching(file, _KEY)


def files(folder: Path) -> list[Path]:
    return [folder / CONFIG, folder / WEIGHTS]


def read(path: Path, options: Reading) -> Adapter:
    file = _file(path)
    if file is None:
        raise FormatError(f"{path}: holds no {WEIGHTS}", "Name the folder of one epoch, which holds it, or the file.")
    raw = read_json(file.parent / CONFIG) if (file.parent / CONFIG).exists() else {}
    weights, faults = {}, []
    for name, array in read_state(file).items():
        found = _KEY.match(name)
        module = _module(found["path"]) if found else None
        if module is None:
            faults.append(f"{file}: {name}: not an array of torchtune's LoRA or DoRA")
            continue
        leaf = _LEAVES[found["leaf"]]
        if array.ndim != (1 if leaf == "m" else 2):
            faults.append(f"{file}: {name}: shape {list(array.shape)}")
            continue
        weights[f"{module}.{leaf}"] = array if leaf == "m" else array.T
    raise_faults(
        faults, "Leave vision towers and fusion layers out of the adapter: they are not converted.", FormatError
    )
    base = options.base_for(f"{file}: the order of rows of q and k")
    if base is not None:
        weights = _reorder(weights, base, parts.from_interleaved, file)
    alpha = raw.get("lora_alpha") if isinstance(raw.get("lora_alpha"), (int, float)) else None
    if alpha is not None and options.alpha is not None:
        raise FormatError(f"{file.parent / CONFIG}: tells alpha {alpha}", "Leave --alpha out.")
    adapter = low_rank(weights, file, options, alpha=alpha, base=raw.get("base_model_name_or_path"))
    return parts.fused(adapter, base) if base is not None else adapter


def _module(path: str) -> str | None:
    if path == "output":
        return "lm_head"
    layer, name = split_layer(path)
    return f"model.layers.{layer}.{_MODULES[name]}" if name in _MODULES else None


def _reorder(weights: dict[str, mx.array], base: BaseModel, turn, source: Any) -> dict[str, mx.array]:
    """The rows of q and k in the other order, where the model's family has two."""
    if base.model_type in _PLAIN:
        return weights
    if base.model_type not in _INTERLEAVED:
        raise FormatError(
            f"{source}: torchtune's order of rows for {base.model_type} is not known",
            f"Known: {', '.join(_INTERLEAVED + _PLAIN)}.",
        )
    found = {}
    for name, array in weights.items():
        heads = {"q_proj": base.heads, "k_proj": base.kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2])
        if heads and not name.endswith(".lora_a"):
            if array.shape[-1] % (2 * heads):
                raise FormatError(
                    f"{name}: {array.shape[-1]} rows are not those of {heads} heads",
                    "Name the base that it was trained on: --model, or base=.",
                )
            array = turn(array, heads)
        found[name] = array
    return found


def write(adapter: Adapter, folder: Path, options: Writing) -> None:
    base = options.base_for("torchtune's order of rows of q and k")
    adapter = as_lora(adapter, base)
    if adapter.config.method not in ("lora", "dora"):
        raise FormatError(f"torchtune holds no {adapter.config.method} adapter", "Merge it: convert --to merged.")
    options.lose(
        [f"{n}: torchtune's adapters hold no whole parameters" for n in adapter.full_parameters]
        + [f"{path}: torchtune holds no trained tokens" for path in adapter.tokens]
        + [f"{path}: torchtune has no lora_bias" for path in adapter.modules if adapter.config.lora_bias]
    )
    adapter = uniform(parts.unfused(adapter, base), alpha=options.alpha)
    weights = {n: w for n, w in adapter.weights.items() if n.endswith((".lora_a", ".lora_b", ".m"))}
    weights = _reorder(weights, base, parts.to_interleaved, "this adapter")
    state, faults = {}, []
    turned = {ours: theirs for theirs, ours in _LEAVES.items()}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        layer, module = split_layer(path)
        if path != "lm_head" and (module not in _THEIRS or path != f"model.layers.{layer}.{module}"):
            faults.append(f"{path}: torchtune has no such module")
            continue
        theirs = "output" if path == "lm_head" else f"layers.{layer}.{_THEIRS[module]}"
        state[f"{theirs}.{turned[leaf]}"] = array if leaf == "m" else array.T
    faults = list(dict.fromkeys(faults))
    raise_faults(faults, "Leave those modules out of the adapter, or merge it: convert --to merged.", FormatError)
    config = adapter.config
    rank = next(array.shape[0] for name, array in state.items() if name.endswith("lora_a.weight"))
    raw = {"r": rank, "lora_alpha": config.scale * rank, "target_modules": _leaf_names(adapter), "peft_type": "LORA"}
    raw |= {"base_model_name_or_path": adapter.base, "use_dora": config.method == "dora"}
    write_torch(folder / WEIGHTS, state)
    write_json(folder / CONFIG, raw)


def _leaf_names(adapter: Adapter) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in adapter.modules})
