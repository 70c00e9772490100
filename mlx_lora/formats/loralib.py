"""microsoft/LoRA's ``loralib``: ``torch.save(lora_state_dict(model))``, one file.

Keys are ``<module>.lora_A`` [r, in] and ``.lora_B`` [out, r], of embeddings [r, vocabulary] and [dim, r]. Neither rank
nor alpha is stored; the multiplier is alpha / r. ``MergedLinear`` adapts some of the equal parts of one matrix, such as
q and v of GPT-2's c_attn: ``lora_A`` [r * parts on, in], ``lora_B`` [out / parts * parts on, r], a group a part.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

from ..adapter import Adapter, raise_faults
from ..errors import FormatError
from .options import Reading, Writing
from .state_dicts import low_rank, matching, names, read_state, sole_file, translator
from .torch.write import write_torch
from .uniform import as_lora, uniform

READS, WRITES, SUFFIXES = {"alpha", "enabled"}, {"alpha"}, (".pt", ".pth", ".bin", ".ckpt")
_KEY = re.compile(r"^(?!base_model\.)(?P<path>.+)\.(?P<leaf>lora_A|lora_B)$")
_SAVE = "Save it with loralib.lora_state_dict(model)."


def detect(path: Path) -> bool:
    file = sole_file(path, "*.pt", "*.bin")
    if file is None or file.suffix == ".lora" or not matching(file, _KEY):
        return False
    container, held = names(file)
    strange = re.compile(r"\blora_E\b|^transformer\.h\.\d+\.attn\.(qkv|attn)\.lora|^lora_")
    return container == "" and not any(strange.search(name) for name in held)


def files(path: Path) -> list[Path]:
    return [path]


def read(path: Path, options: Reading) -> Adapter:
    return from_state(read_state(sole_file(path, "*.pt", "*.bin")), path, options)


def from_state(state: dict[str, mx.array], path: Path, options: Reading) -> Adapter:
    """An adapter from loralib's tensors; ``path`` names them in errors."""
    translate, weights, biases, faults = translator(options.base), {}, {}, []
    pairs: dict[str, dict[str, mx.array]] = {}
    for name, array in state.items():
        if found := _KEY.match(name):
            pairs.setdefault(found["path"], {})[found["leaf"]] = array
        elif name.endswith(".bias"):
            biases[f"{translate(name.removesuffix('.bias'))}.bias"] = array
        else:
            faults.append(f"{path}: {name}: not an array of loralib")
    enabled = None
    for name, pair in pairs.items():
        if pair.keys() != {"lora_A", "lora_B"} or any(array.ndim != 2 for array in pair.values()):
            shapes = ", ".join(f"{leaf} {list(array.shape)}" for leaf, array in sorted(pair.items()))
            faults.append(f"{path}: {name}: {shapes} are no pair of matrices (gather sharded weights before saving)")
            continue
        a, b, ours = pair["lora_A"].T, pair["lora_B"].T, translate(name)
        if a.shape[1] != b.shape[0]:
            enabled = _enabled(a, b, f"{path}: {name}", options)
            b = _merge(b, enabled) if enabled else mx.zeros((a.shape[1], b.shape[1]), b.dtype)
        weights[f"{ours}.lora_a"], weights[f"{ours}.lora_b"] = a, b
    raise_faults(faults, _SAVE, FormatError)
    if options.enabled and enabled is None:
        raise FormatError(f"{path}: holds no merged layers", "Leave --enable-lora out.")
    scales = _scales(pairs, translate, path, options) if enabled else None
    adapted = {name.rpartition(".")[0] for name in weights}
    bias = "none" if not biases else "lora_only" if all(n[:-5] in adapted for n in biases) else "all"
    adapter = low_rank({**weights, **biases}, path, options, scales=scales, bias=bias)
    if enabled:
        adapter.metadata["loralib"] = {"enabled": enabled, "merged": [translate(n) for n in pairs if _merged(pairs[n])]}
    return adapter


def _merged(pair: dict[str, mx.array]) -> bool:
    return pair["lora_A"].shape[0] != pair["lora_B"].shape[1]


def _scales(pairs, translate, path, options) -> dict[str, float] | None:
    """alpha / r, where r is that of a part; ``low_rank`` would divide by the rank of all parts together."""
    if options.alpha is None:
        options.need(f"{path}: does not tell the adapter's alpha", "Give it: --alpha, or alpha=.")
        return {translate(name): 1.0 for name in pairs}
    return {translate(name): options.alpha / pair["lora_B"].shape[1] for name, pair in pairs.items()}


def _enabled(a: mx.array, b: mx.array, what: str, options: Reading) -> tuple[bool, ...] | None:
    """Which parts of a merged layer are adapted; a [in, r * on], b [r, rows * on]."""
    rank, columns = b.shape
    on, rest = divmod(a.shape[1], rank)
    if rest or not on or columns % on:
        raise FormatError(
            f"{what}: lora_A {list(a.T.shape)} and lora_B {list(b.T.shape)} do not belong together", _SAVE
        )
    if options.enabled is None:
        options.need(
            f"{what}: adapts {on} parts of a merged layer, and does not tell which",
            "Give loralib's enable_lora: --enable-lora 1,0,1 (enabled=(True, False, True)).",
        )
        return None
    if sum(options.enabled) != on:
        raise FormatError(
            f"{what}: adapts {on} parts, --enable-lora names {sum(options.enabled)}",
            f"Give --enable-lora as in training, a number a part, {on} of them 1: such as 1,0,1.",
        )
    return options.enabled


def _merge(b: mx.array, enabled: tuple[bool, ...]) -> mx.array:
    """[r, rows * on] -> the block-diagonal [r * on, rows * parts] of the whole layer."""
    groups = mx.split(b, sum(enabled), axis=1)
    zeros, blocks = mx.zeros_like(groups[0]), []
    for place, part in enumerate(i for i, flag in enumerate(enabled) if flag):
        blocks.append(mx.concatenate([groups[place] if i == part else zeros for i in range(len(enabled))], axis=1))
    return mx.concatenate(blocks)


def write(adapter: Adapter, path: Path, options: Writing) -> None:
    adapter = as_lora(adapter, options.base)
    config, faults = adapter.config, []
    if config.method != "lora":
        faults.append(f"{config.method}: loralib holds LoRA only")
    faults += [f"{p}: loralib has no experts" for p in adapter.modules if adapter.weights[f"{p}.lora_a"].ndim == 3]
    raise_faults(faults, "Merge it into the model instead: convert --to merged.", FormatError)
    left = [f"{n}: loralib holds no whole parameters" for n in adapter.full_parameters if not n.endswith(".bias")]
    left += [f"{path}: loralib holds no trained tokens" for path in adapter.tokens]
    left += [f"{path}: loralib has no lora_bias" for path in adapter.modules if config.lora_bias]
    options.lose(left)
    merged = adapter.metadata.get("loralib", {})
    if not merged:
        adapter = uniform(adapter, alpha=options.alpha)
    to_hf = options.base.to_hf if options.base is not None and options.base.known else lambda name: name
    state = {}
    for name in adapter.modules:
        a, b = adapter.weights[f"{name}.lora_a"].T, adapter.weights[f"{name}.lora_b"].T
        if name in merged.get("merged", ()):
            b = _part(b, merged["enabled"])
        state[f"{to_hf(name)}.lora_A"], state[f"{to_hf(name)}.lora_B"] = a, b
    state |= {f"{to_hf(n[:-5])}.bias": array for n, array in adapter.full_parameters.items() if n.endswith(".bias")}
    write_torch(path, state)


def _part(b: mx.array, enabled: tuple[bool, ...]) -> mx.array:
    """The inverse of ``_merge``, both turned: [rows * parts, r * on] -> [rows * on, r]."""
    rows, rank = b.shape[0] // len(enabled), b.shape[1] // sum(enabled)
    parts = [i for i, flag in enumerate(enabled) if flag]
    return mx.concatenate(
        [b[i * rows : (i + 1) * rows, n * rank : (n + 1) * rank] for n, i in enumerate(parts)], axis=0
    )
