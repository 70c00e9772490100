"""torchtune's adapter folder: ``adapter_model.pt`` (or ``adapter_N.pt``) and ``adapter_config.json``.

Keys are ``layers.N.attn.q_proj.lora_a.weight`` [r, in], ``.lora_b.weight`` [out, r], DoRA's ``.magnitude`` [out].
torchtune rotates adjacent pairs in Llama's rotary embeddings, as Meta does: the rows of q and k, of B and of the
magnitudes, are in another order than transformers'. Qwen and Phi-3 keep transformers' order. The PEFT files that
torchtune writes next to the ``.pt`` are partly wrong (the order of q's and k's magnitudes, Qwen's rows) and are not
read.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter import Adapter, raise_faults, split_layer
from ..base.names import BaseModel
from ..errors import FormatError
from .files import read_json, write_json
from .fused_projections import from_interleaved, fuse_projections, reorder_q_and_k, split_projections, to_interleaved
from .options import ReadOptions, WriteOptions, locate_modules
from .state_dicts import has_tensor, low_rank_adapter, read_state
from .torch.write import write_torch
from .uniform import low_rank_only, uniform

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.pt"
READS, WRITES, FILES = {"alpha"}, {"alpha"}, (CONFIG, WEIGHTS)
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
    "output": "lm_head",
}
_LEAVES = {"lora_a.weight": "lora_a", "lora_b.weight": "lora_b", "magnitude": "m"}
# Families whose rows torchtune orders as Meta does, and as transformers does.
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_TRANSFORMERS_ORDER = ("qwen2", "qwen3", "phi3")


def _file(path: Path) -> Path | None:
    """The file of the weights; with several epochs, the last one's."""
    if path.is_file():
        return path if path.suffix.lower() == ".pt" else None
    if (path / WEIGHTS).exists():
        return path / WEIGHTS
    found = sorted(path.glob("adapter_*.pt"), key=lambda p: (len(p.name), p.name))
    return found[-1] if found else None


def detect(path: Path) -> bool:
    return has_tensor(_file(path), _KEY)


def read(path: Path, options: ReadOptions) -> Adapter:
    file = _file(path)
    if file is None:
        raise FormatError(f"{path}: has no {WEIGHTS}", "Name the folder of one epoch, or its file adapter_N.pt.")
    config = read_json(file.parent / CONFIG) if (file.parent / CONFIG).exists() else {}
    weights, faults = {}, []
    for name, array in read_state(file).items():
        found = _KEY.match(name)
        layer, module = split_layer(found["path"]) if found else (None, "")
        if module not in _MODULES:
            faults.append(f"{file}: {name}: not an array of torchtune's LoRA or DoRA")
            continue
        path = _MODULES[module] if layer is None else f"model.layers.{layer}.{_MODULES[module]}"
        leaf = _LEAVES[found["leaf"]]
        if array.ndim != (1 if leaf == "m" else 2):
            faults.append(f"{file}: {name}: shape {list(array.shape)}")
            continue
        weights[f"{path}.{leaf}"] = array if leaf == "m" else array.T
    raise_faults(
        faults, "Leave vision towers and fusion layers out of the adapter: they are not converted.", FormatError
    )
    base = options.base_for(f"{file}: the order of rows of q and k")
    if base is not None and _is_interleaved(base, file):
        weights = reorder_q_and_k(weights, base, from_interleaved)
    alpha = options.alpha_from(config.get("lora_alpha"), file.parent / CONFIG)
    adapter = low_rank_adapter(weights, file, options, alpha=alpha, base=config.get("base_model_name_or_path"))
    return fuse_projections(adapter, base)


def _is_interleaved(base: BaseModel, source: Path | str) -> bool:
    """Whether torchtune stores the rows of q and k in Meta's order for this family."""
    if base.model_type not in _INTERLEAVED + _TRANSFORMERS_ORDER:
        raise FormatError(
            f"{source}: torchtune's order of rows is unknown for {base.model_type}",
            f"The order is known for {', '.join(_INTERLEAVED + _TRANSFORMERS_ORDER)}.",
        )
    return base.model_type in _INTERLEAVED


def write(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    base = options.base_for("torchtune's order of rows of q and k")
    adapter = low_rank_only(adapter, options, "torchtune", ("lora", "dora"))
    adapter = uniform(split_projections(adapter, base), alpha=options.alpha)
    weights = {n: w for n, w in adapter.weights.items() if n.endswith((".lora_a", ".lora_b", ".m"))}
    if _is_interleaved(base, "this adapter"):
        weights = reorder_q_and_k(weights, base, to_interleaved)
    modules = locate_modules(adapter, {ours: theirs for theirs, ours in _MODULES.items()}, "torchtune")
    leaves, state = {ours: theirs for theirs, ours in _LEAVES.items()}, {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        layer, module = modules[path]
        key = module if layer is None else f"layers.{layer}.{module}"
        state[f"{key}.{leaves[leaf]}"] = array if leaf == "m" else array.T
    config = adapter.config
    settings = {
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.modules}),
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "use_dora": config.method == "dora",
    }
    write_torch(folder / WEIGHTS, state)
    write_json(folder / CONFIG, settings)
