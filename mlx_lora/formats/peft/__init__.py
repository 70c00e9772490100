"""Hugging Face PEFT's adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

Keys are ``base_model.model.<module path>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r], the transposes of
ours. DoRA adds ``lora_magnitude_vector`` [out]. Embeddings have ``lora_embedding_A`` [r, vocabulary] and ``_B`` [dim,
r]. The tensors do not contain the multiplier: it is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
``use_rslora``, and by module through ``rank_pattern`` and ``alpha_pattern``. Adapters with other names than ``default``
are in a subfolder each. Every tensor is converted or refused by name.

names.py    what PEFT calls files and tensors    read.py     a folder, or its tensors, as an adapter
config.py   adapter_config.json, read            write.py    an adapter as a folder
experts.py  PEFT's two layouts of experts        init.py     initialisations that changed the base (PiSSA, OLoRA)
"""

from __future__ import annotations

from pathlib import Path

from .names import CONFIG, PICKLE, WEIGHTS
from .read import has_weights, named_adapters
from .read import read as read
from .write import write as write

READS, WRITES, FILES = {"adapter"}, {"moe", "profile"}, (CONFIG, WEIGHTS, PICKLE)


def detect(path: Path) -> bool:
    # torchtune also writes a PEFT folder's files, which are partly wrong; its own files are the ones to read.
    torchtune = (path / "adapter_model.pt").exists()
    return path.is_dir() and not torchtune and (has_weights(path) or bool(named_adapters(path)))
