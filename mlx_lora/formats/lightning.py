"""PyTorch Lightning's checkpoints, read: ``{"state_dict": ...}``, with the module's prefix before every name.

Lightning has no LoRA of its own: the names below the prefix are PEFT's or loralib's. The frozen model in the
checkpoint, the optimizer and the loops are left where they are. Alpha is taken from ``hyper_parameters`` where it is
there.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from . import loralib, peft
from .options import Reading
from .state_dicts import names, read_checkpoint

READS = {"alpha", "enabled"}
_PEFT = re.compile(r"^(?P<prefix>.*?)base_model\.model\.")
_PLAIN = re.compile(r"\.lora_[AB]$")
_PEFT_LEAF = re.compile(r"\.(lora_|vera_|token_adapter|modules_to_save)")


def detect(path: Path) -> bool:
    if not path.is_file():
        return False
    container, held = names(path)
    return container == "state_dict" and any(_PEFT_LEAF.search(name) for name in held)


def read(path: Path, options: Reading) -> Adapter:
    state, checkpoint = read_checkpoint(path)
    told = checkpoint.get("hyper_parameters")
    told = told if isinstance(told, dict) else {}
    wrapped = [name for name in state if _PEFT.match(name)]
    if wrapped:
        return _peft(state, told, path, options)
    adapter = {name: array for name, array in state.items() if _PLAIN.search(name)}
    prefix = _prefix(list(adapter))
    if options.alpha is None and isinstance(told.get("lora_alpha"), (int, float)):
        options = Reading(options.base, told["lora_alpha"], None, None, options.enabled, options.lenient, options.open)
    return loralib.from_state({name[len(prefix) :]: array for name, array in adapter.items()}, path, options)


def _prefix(found: list[str]) -> str:
    """What LightningModules put before the model's own names: the attribute the model hangs on, mostly ``model.``.

    A transformer's own ``model.layers`` is no such prefix.
    """
    for prefix in ("model.model.", "model.transformer.", "model.gpt_neox.", "model.lm_head."):
        if any(name.startswith(prefix) for name in found):
            return "model."
    if all(re.match(r"model\.(layers|h|embed_tokens|wte)\b", name) for name in found):
        return ""
    first = {name.partition(".")[0] for name in found}
    known = {"model", "transformer", "gpt_neox", "lm_head", "layers", "h"}
    return f"{first.pop()}." if len(first) == 1 and not first & known else ""


def _peft(state, told, path: Path, options: Reading) -> Adapter:
    tensors = {}
    for name, array in state.items():
        bare = _PEFT.sub(peft.PREFIX, name)
        if bare.startswith(peft.PREFIX) and _PEFT_LEAF.search(bare):
            tensors[re.sub(r"\.default(?=\.|$)", "", bare, count=1)] = array
    ranks = {n: a.shape[0] for n, a in tensors.items() if re.search(r"\.lora_(embedding_)?A(\.weight)?$", n)}
    alpha = told.get("lora_alpha", options.alpha) if options.alpha is None else options.alpha
    if not isinstance(alpha, (int, float)):
        options.need(f"{path}: does not tell the adapter's alpha", "Give it: --alpha, or alpha=.")
    if not ranks or not all(ranks.values()):
        raise FormatError(
            f"{path}: holds no adapter of PEFT's LoRA",
            "Name a checkpoint of a run that trained a PEFT model with LoRA.",
        )
    rank = max(ranks.values())
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank, "use_rslora": bool(told.get("use_rslora"))}
    raw["use_dora"] = any("lora_magnitude_vector" in n for n in tensors)
    raw["rank_pattern"] = {
        f"^{re.escape(n[len(peft.PREFIX) :].partition('.lora_')[0])}": r for n, r in ranks.items() if r != rank
    }
    adapter = peft.from_tensors(tensors, raw, path, options)
    if not isinstance(alpha, (int, float)):
        adapter.metadata["open"] = ["scale"]
    return adapter
