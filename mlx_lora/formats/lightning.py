"""Checkpoints of PyTorch Lightning, read only: ``{"state_dict": ...}``, with the module's prefix before every name.

Lightning has no LoRA of its own: the names after the prefix are PEFT's or loralib's. The frozen model, the optimizer
and the loops in the checkpoint are not read. Alpha is taken from ``hyper_parameters`` if it is stored.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter
from ..errors import FormatError
from . import loralib
from .options import ReadOptions
from .peft.names import PREFIX
from .peft.read import from_tensors
from .state_dicts import read_checkpoint, tensor_names

READS, FILES = {"alpha", "enabled"}, ()
_PEFT = re.compile(r"^(?P<prefix>.*?)base_model\.model\.")
_LORALIB = re.compile(r"\.lora_[AB]$")
_PEFT_LEAF = re.compile(r"\.(lora_|vera_|token_adapter|modules_to_save)")


def detect(path: Path) -> bool:
    if not path.is_file():
        return False
    container, names = tensor_names(path)
    return container == "state_dict" and any(_PEFT_LEAF.search(name) for name in names)


def read(path: Path, options: ReadOptions) -> Adapter:
    state, checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters")
    settings = settings if isinstance(settings, dict) else {}
    options = replace(options, alpha=options.alpha_from(settings.get("lora_alpha"), f"{path}: hyper_parameters"))
    if any(_PEFT.match(name) for name in state):
        return _read_peft(state, settings, path, options)
    adapter = {name: array for name, array in state.items() if _LORALIB.search(name)}
    prefix = _prefix(list(adapter))
    return loralib.from_state({name[len(prefix) :]: array for name, array in adapter.items()}, path, options)


def _prefix(names: list[str]) -> str:
    """The prefix that a LightningModule puts before the model's names: the attribute that holds it, mostly ``model.``.

    A transformer's own ``model.layers`` does not count as a prefix.
    """
    for prefix in ("model.model.", "model.transformer.", "model.gpt_neox.", "model.lm_head."):
        if any(name.startswith(prefix) for name in names):
            return "model."
    if all(re.match(r"model\.(layers|h|embed_tokens|wte)\b", name) for name in names):
        return ""
    first = {name.partition(".")[0] for name in names}
    known = {"model", "transformer", "gpt_neox", "lm_head", "layers", "h"}
    return f"{first.pop()}." if len(first) == 1 and not first & known else ""


def _read_peft(state: dict[str, mx.array], settings: dict[str, Any], path: Path, options: ReadOptions) -> Adapter:
    """PEFT's tensors, with a config made from their shapes and the checkpoint's hyper_parameters."""
    renamed = {_PEFT.sub(PREFIX, name): array for name, array in state.items()}
    tensors = {n: array for n, array in renamed.items() if n.startswith(PREFIX) and _PEFT_LEAF.search(n)}
    if options.alpha is None:
        options.need(f"{path}: does not store the adapter's alpha", "Give it: --alpha, or alpha=.")
    a_matrix = re.compile(rf"^{re.escape(PREFIX)}(.+)\.lora_(?:embedding_)?A\b")
    ranks = {found[1]: array.shape[0] for n, array in tensors.items() if (found := a_matrix.match(n))}
    if not ranks or not all(ranks.values()):
        raise FormatError(
            f"{path}: has no LoRA of PEFT's", "Name a checkpoint of a run that trained a PEFT model with LoRA."
        )
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": options.alpha or rank,
        "use_rslora": bool(settings.get("use_rslora")),
        "use_dora": any("lora_magnitude_vector" in n for n in tensors),
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
    }
    adapter = from_tensors(tensors, config, path, options)
    if options.alpha is None:
        adapter.metadata["unknown"] = ["scale"]
    return adapter
