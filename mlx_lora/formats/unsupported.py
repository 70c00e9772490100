"""Adapters that are recognised only to name them in an error: adapters of image models and unsupported methods."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FormatError
from .files import read_json
from .state_dicts import tensor_names

# Patterns of tensor names.
_TENSORS = (
    (r"^lora_(unet|te\d?|transformer)_|\.lora_(down|up)\.weight$", "a kohya or diffusers LoRA, for image models"),
    (r"^(unet|text_encoder)\..*lora", "a diffusers LoRA, for image models"),
    (r"\bhada_w[12]_[ab]\b", "a LoHa adapter without PEFT's adapter_config.json"),
    (r"\blokr_w[12]", "a LoKr adapter without PEFT's adapter_config.json"),
    (r"\bia3_l\b", "an (IA)3 adapter without PEFT's adapter_config.json"),
    (r"\blora_E\b", "an AdaLoRA adapter without PEFT's adapter_config.json"),
    (r"\blora_diag\b", "a KaSA adapter"),
    (r"\b(boft|oft)_", "an OFT or BOFT adapter"),
    (r"\bvblora_", "a VB-LoRA adapter"),
    (r"\bfourierft_", "a FourierFT adapter"),
    (r"\bprompt_embeddings\b|\badaption_prompt\b", "a prompt (prefix or prompt tuning)"),
    (r"xlora", "an X-LoRA adapter"),
    (r"\.adapter_(down|up)\.|\.(down|up)_proj_adapter\b", "a bottleneck adapter"),
)


def unsupported_kind(path: Path) -> str | None:
    """The kind of the unsupported adapter at ``path``, a file or a folder; None if it is not recognised."""
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.is_file()]
    if any(f.name == "xlora_config.json" for f in files):
        return "an X-LoRA adapter"
    if path.is_dir():
        if (path / "zero_to_fp32.py").exists() or any(path.glob("global_step*")):
            return "a sharded DeepSpeed checkpoint (gather it with its zero_to_fp32.py)"
        if any(path.glob("*.distcp")) or any(path.glob("*/*.distcp")):
            return "a sharded PyTorch distributed checkpoint (export it to one file)"
        if kind := _peft_type(path / "adapter_config.json"):
            return f"a PEFT config of {kind} without its weights"
    for file in files:
        held = "\n".join(sorted(tensor_names(file)[1])[:20000])
        for pattern, kind in _TENSORS:
            if re.search(pattern, held, re.MULTILINE):
                return kind
    return None


def _peft_type(config: Path) -> str | None:
    try:
        kind = read_json(config).get("peft_type")
    except FormatError:
        return None
    return kind if isinstance(kind, str) else None
