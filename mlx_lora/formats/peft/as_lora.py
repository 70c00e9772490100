"""PEFT's methods whose update is LoRA in another form, rewritten as PEFT's LoRA: the same numbers, exactly.

    AdaLoRA (arXiv:2303.10512)   scale B diag(E) A, scale = lora_alpha / init_r for any remaining rank; E goes into A
    LoHa (arXiv:2108.06098)      scale (B1 A1) * (B2 A2), elementwise: rank r^2; each column of B is a column of B1
                                 times a column of B2, and each row of A likewise
    LoKr (arXiv:2309.14859)      scale kron(W1, W2): the Kronecker products of their factors

The rank of the result is at most the smaller side of the layer: otherwise the product itself is factored.
Convolutions are refused. Dropout of LoHa and LoKr (of whole ranks and modules) acts in training only and has no
counterpart in LoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...adapter import raise_faults
from ...config import match_pattern
from ...errors import FormatError
from ..files import wrong_settings
from .names import CONFIG, PREFIX, without_adapter_name

Factors = tuple[mx.array, mx.array]  # B [out, r], A [r, in]


def _adalora(t: dict[str, mx.array]) -> Factors:
    _check_equal("rank", t["lora_A"].shape[0], t["lora_B"].shape[1], t["lora_E"].size, t["lora_E"].shape[0])
    return t["lora_B"], t["lora_A"] * t["lora_E"]


def _loha(t: dict[str, mx.array]) -> Factors:
    b1, a1, b2, a2 = (t[f"hada_w{name}"] for name in ("1_a", "1_b", "2_a", "2_b"))
    _check_equal("output size", b1.shape[0], b2.shape[0])
    _check_equal("input size", a1.shape[1], a2.shape[1])
    for b, a in ((b1, a1), (b2, a2)):
        _check_equal("rank", b.shape[1], a.shape[0])
    b = (b1[:, :, None] * b2[:, None, :]).reshape(b1.shape[0], -1)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
    return _shortest(b, a) if b.shape[1] > min(b.shape[0], a.shape[1]) else (b, a)


def _check_equal(what: str, *sizes: int) -> None:
    """Raise a ``ValueError`` if sizes differ, because MLX would broadcast a single row or column."""
    if len(set(sizes)) > 1:
        raise ValueError(f"their {what} differs: {', '.join(map(str, dict.fromkeys(sizes)))}")


def _lokr(t: dict[str, mx.array]) -> Factors:
    (b1, a1), (b2, a2) = (_factors(t, f"lokr_w{i}") for i in (1, 2))
    return mx.kron(b1, b2), mx.kron(a1, a2)


def _factors(t: dict[str, mx.array], name: str) -> Factors:
    if name in t:
        return _split(t[name])
    b, a = t[f"{name}_a"], t[f"{name}_b"]
    return _shortest(b, a) if b.shape[1] > min(b.shape[0], a.shape[1]) else (b, a)


def _shortest(b: mx.array, a: mx.array) -> Factors:
    return _split(b @ a)


def _split(w: mx.array) -> Factors:
    """A matrix as the product of itself and an identity, of the smaller rank."""
    rows, columns = w.shape
    return (mx.eye(rows), w) if rows <= columns else (w, mx.eye(columns))


def _positive(rank: int) -> int:
    if rank <= 0:
        raise ValueError(f"a rank of {rank}")
    return rank


def _adalora_scale(raw: dict[str, Any], path: str) -> float:
    rank, alpha = raw.get("init_r", 12), raw.get("lora_alpha", 8)
    return (alpha if alpha > 0 else _positive(rank)) / (_positive(rank) + 1e-5)  # PEFT adds 1e-5


def _lycoris_scale(raw: dict[str, Any], path: str) -> float:
    rank = _positive(match_pattern(raw.get("rank_pattern") or {}, path, raw.get("r", 8)))
    return match_pattern(raw.get("alpha_pattern") or {}, path, raw.get("alpha", 8)) / rank


# peft_type: (a module's arrays -> its factors; the config and a module's path -> its multiplier; the arrays' names)
_METHODS: dict[str, tuple[Callable, Callable, str]] = {
    "ADALORA": (_adalora, _adalora_scale, r"lora_[ABE]"),
    "LOHA": (_loha, _lycoris_scale, r"hada_\w+"),
    "LOKR": (_lokr, _lycoris_scale, r"lokr_\w+"),
}
TYPES = tuple(_METHODS)
_OF_A_METHOD = re.compile(r"\.(lora|vera|hada|lokr|ia3)_\w+(\.weight)?$")


def as_lora(
    tensors: dict[str, mx.array], raw: dict[str, Any], source: Path
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """(tensors, config) as LoRA for the types above; unchanged for other types."""
    kind = raw["peft_type"]
    if kind not in _METHODS:
        return tensors, raw
    factors, scale_of, names = _METHODS[kind]
    pattern = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<leaf>{names})")
    modules: dict[str, dict[str, mx.array]] = {}
    found: dict[str, mx.array] = {}
    for name, array in tensors.items():
        if match := pattern.fullmatch(without_adapter_name(name)):
            modules.setdefault(match["path"], {})[match["leaf"]] = array
        elif not name.endswith(".ranknum"):  # AdaLoRA's counter, which older versions saved
            found[name] = array
    ranks, alphas = {}, {}
    faults = [f"{source}: {name}: not an array of {kind}" for name in found if _OF_A_METHOD.search(name)]
    if not modules:
        faults = [f"{source}: peft_type {kind}, but it has no arrays of this method"]
    for path, arrays in modules.items():
        if any(array.ndim != 2 for array in arrays.values()):
            faults.append(f"{source}: {path}: a {kind} of a convolution")
            continue
        try:
            b, a = factors({leaf: array.astype(mx.float32) for leaf, array in arrays.items()})
        except (KeyError, ValueError) as error:
            faults.append(f"{source}: {path}: {', '.join(sorted(arrays))} are not a complete {kind} ({error})")
            continue
        if not a.shape[0]:  # AdaLoRA gave the module rank 0: no update
            continue
        try:
            scale = scale_of(raw, path)
        except (TypeError, ValueError, re.error) as error:
            raise wrong_settings(source / CONFIG, f"not a config of {kind} ({type(error).__name__}: {error})") from None
        found[f"{PREFIX}{path}.lora_A.weight"], found[f"{PREFIX}{path}.lora_B.weight"] = a, b
        ranks[f"^{re.escape(path)}"], alphas[f"^{re.escape(path)}"] = a.shape[0], scale * a.shape[0]
    raise_faults(faults, "Save or download the adapter again, or merge it in PEFT.", FormatError)
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = next((alphas[path] for path, own in ranks.items() if own == rank), 1)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    settings |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    return found, {**raw, **settings, "use_rslora": False, "init_lora_weights": True}
