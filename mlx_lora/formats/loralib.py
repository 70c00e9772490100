"""microsoft/LoRA's ``loralib``: ``torch.save(lora_state_dict(model))``, one file.

Keys are ``<module>.lora_A`` [r, in] and ``.lora_B`` [out, r], for embeddings [r, vocabulary] and [dim, r]. Neither rank
nor alpha is stored; the multiplier is alpha / r. ``MergedLinear`` adapts some of the n equal blocks of rows of one
matrix (``enable_lora``), such as q and v of GPT-2's c_attn: with k blocks adapted, ``lora_A`` is [r * k, in] and
``lora_B`` [out / n * k, r]. Each adapted block has its own r rows of ``lora_A``.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

from ..adapter import Adapter, raise_faults
from ..errors import FormatError
from .options import MERGE, ReadOptions, WriteOptions
from .state_dicts import has_tensor, low_rank_adapter, only_file, read_state, tensor_names
from .torch.write import write_torch
from .uniform import low_rank_only, uniform

READS, WRITES, SUFFIXES = {"alpha", "enabled"}, {"alpha"}, (".pt", ".pth", ".bin", ".ckpt")
FILES = ("*.pt", "*.bin")
_KEY = re.compile(r"^(?!base_model\.)(?P<path>.+)\.(?P<leaf>lora_A|lora_B)$")
# Tensor names of other formats (AdaLoRA, litgpt, kohya) that end like loralib's.
_OTHERS = re.compile(r"\blora_E\b|^transformer\.h\.\d+\.attn\.(qkv|attn)\.lora|^lora_")
_SAVE = "Save it with loralib.lora_state_dict(model)."


def detect(path: Path) -> bool:
    file = only_file(path, FILES)
    if not has_tensor(file, _KEY) or file.suffix.lower() == ".lora":
        return False
    return tensor_names(file)[0] == "" and not has_tensor(file, _OTHERS)


def read(path: Path, options: ReadOptions) -> Adapter:
    return from_state(read_state(only_file(path, FILES)), path, options)


def from_state(state: dict[str, mx.array], path: Path, options: ReadOptions) -> Adapter:
    """An adapter from loralib's tensors; ``path`` names them in errors."""
    weights, biases, faults = {}, {}, []
    pairs: dict[str, dict[str, mx.array]] = {}
    for name, array in state.items():
        if found := _KEY.match(name):
            pairs.setdefault(found["path"], {})[found["leaf"]] = array
        elif name.endswith(".bias"):
            biases[f"{options.to_mlx(name.removesuffix('.bias'))}.bias"] = array
        else:
            faults.append(f"{path}: {name}: not an array of loralib")
    merged, enabled = {}, None  # merged layers: the rank of one block, by our path
    for name, pair in pairs.items():
        if pair.keys() != {"lora_A", "lora_B"} or any(array.ndim != 2 for array in pair.values()):
            shapes = ", ".join(f"{leaf} {list(array.shape)}" for leaf, array in sorted(pair.items()))
            faults.append(f"{path}: {name}: {shapes}: not a pair of matrices (gather sharded weights before saving)")
            continue
        a, b, module = pair["lora_A"].T, pair["lora_B"].T, options.to_mlx(name)
        if a.shape[1] != b.shape[0]:
            merged[module] = b.shape[0]
            enabled = _enabled(a, b, f"{path}: {name}", options)
            b = _expand(b, enabled) if enabled else mx.zeros((a.shape[1], b.shape[1]), b.dtype)
        weights[f"{module}.lora_a"], weights[f"{module}.lora_b"] = a, b
    raise_faults(faults, _SAVE, FormatError)
    if options.enabled and not merged:
        raise FormatError(f"{path}: has no merged layers", "Leave --enable-lora out.")
    scales = None
    if enabled and options.alpha is not None:  # alpha / r with the r of a block, not of all blocks together
        ranks = {name.removesuffix(".lora_b"): b.shape[0] for name, b in weights.items() if name.endswith(".lora_b")}
        scales = {module: options.alpha / merged.get(module, rank) for module, rank in ranks.items()}
    adapted = {name.rpartition(".")[0] for name in weights}
    bias = "none" if not biases else "lora_only" if all(n[:-5] in adapted for n in biases) else "all"
    adapter = low_rank_adapter({**weights, **biases}, path, options, scales=scales, bias=bias)
    if enabled:
        adapter.metadata["loralib"] = {"enabled": enabled, "merged": list(merged)}
    return adapter


def _enabled(a: mx.array, b: mx.array, layer: str, options: ReadOptions) -> tuple[bool, ...] | None:
    """Which blocks of a merged layer are adapted; a [in, r * k], b [r, rows * k]."""
    rank, columns = b.shape
    count, rest = divmod(a.shape[1], rank) if rank else (0, 0)
    if rest or not count or columns % count:
        raise FormatError(f"{layer}: lora_A {list(a.T.shape)} and lora_B {list(b.T.shape)} do not match", _SAVE)
    if options.enabled is None:
        options.need(
            f"{layer}: adapts {count} blocks of a merged layer, and the file does not store which",
            "Give loralib's enable_lora: --enable-lora 1,0,1 (enabled=(True, False, True)).",
        )
        return None
    if sum(options.enabled) != count:
        raise FormatError(
            f"{layer}: adapts {count} blocks, --enable-lora names {sum(options.enabled)}",
            f"Give --enable-lora as in training: a number for each block, {count} of them 1, such as 1,0,1.",
        )
    return options.enabled


def _expand(b: mx.array, enabled: tuple[bool, ...]) -> mx.array:
    """[r, rows * k] -> the block-diagonal [r * k, rows * n] of the whole layer."""
    groups = iter(mx.split(b, sum(enabled), axis=1))
    zeros, rows = mx.zeros((b.shape[0], b.shape[1] // sum(enabled)), b.dtype), []
    for block in (i for i, flag in enumerate(enabled) if flag):
        group = next(groups)
        rows.append(mx.concatenate([group if i == block else zeros for i in range(len(enabled))], axis=1))
    return mx.concatenate(rows)


def _shrink(b: mx.array, enabled: tuple[bool, ...]) -> mx.array:
    """The inverse of ``_expand``: [r * k, rows * n] -> [r, rows * k]."""
    rank, rows = b.shape[0] // sum(enabled), b.shape[1] // len(enabled)
    blocks = [i for i, flag in enumerate(enabled) if flag]
    return mx.concatenate(
        [b[n * rank : (n + 1) * rank, i * rows : (i + 1) * rows] for n, i in enumerate(blocks)], axis=1
    )


def write(adapter: Adapter, path: Path, options: WriteOptions) -> None:
    experts = [p for p in adapter.modules if adapter.weights.get(f"{p}.lora_a", mx.zeros(0)).ndim == 3]
    raise_faults([f"{p}: loralib has no experts" for p in experts], MERGE, FormatError)
    adapter = low_rank_only(adapter, options, "loralib", keep_biases=True)
    stored = adapter.metadata.get("loralib", {})
    if not stored:
        adapter = uniform(adapter, alpha=options.alpha)
    state = {}
    for module in adapter.modules:
        a, b = adapter.weights[f"{module}.lora_a"], adapter.weights[f"{module}.lora_b"]
        if module in stored.get("merged", ()):
            b = _shrink(b, stored["enabled"])
        state[f"{options.to_hf(module)}.lora_A"], state[f"{options.to_hf(module)}.lora_B"] = a.T, b.T
    state |= {
        f"{options.to_hf(n[:-5])}.bias": array for n, array in adapter.full_parameters.items() if n.endswith(".bias")
    }
    write_torch(path, state)
