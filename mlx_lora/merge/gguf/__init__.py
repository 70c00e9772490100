"""A merged model as one GGUF file for llama.cpp and Ollama.

``GGUFModel`` checks the model's settings and tokenizer before any weights are loaded, then writes them: its tensors by
``architectures.py``, its tokenizer by ``tokenizer.py``. ``modelfile.py`` writes Ollama's file next to it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ...adapter import Adapter
from ...base.names import BaseModel
from ...errors import ConfigError
from ...formats.files import write_file
from ...formats.gguf_file import TYPES, write_gguf
from ..fuse import FusedLayer
from .architectures import Architecture
from .tokenizer import GGUFTokenizer

_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # general.file_type
BLOCK = 32  # q8_0
# llama.cpp computes with these in float32 only.
_FLOAT32 = ("_norm.weight", ".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "rope_freqs.weight")


class GGUFModel:
    """The checks and settings of a GGUF file that need no weights.

    Args:
        base: a model folder.
        adapter: what will be merged.
        name: the model's name.
        dtype: a name in ``TYPES``, or None for the most common dtype of the model's weights.

    Raises: ConfigError, FormatError: llama.cpp cannot compute or tokenize what this model does.
    """

    def __init__(
        self, base: BaseModel, adapter: Adapter | None, name: str, dtype: str | None, trust_remote_code: bool = False
    ):
        if dtype is not None and dtype not in TYPES:
            raise ConfigError(
                f"dtype must be one of {', '.join(TYPES)}, not {dtype!r}", "Leave dtype out to keep the model's own."
            )
        self.architecture = Architecture(base, adapter)
        self.tokenizer = GGUFTokenizer(base.folder, self.architecture.rows, trust_remote_code)
        self.name, self.dtype = self.tokenizer.name(name), dtype
        self.notes = [*self.architecture.notes, *self.tokenizer.notes]

    def write(self, path: Path, parameters: dict[str, mx.array], dtype: str) -> None:
        """Write the merged model.

        Args:
            parameters: of mlx-lm's model, by name; each is removed from the dict when it is written.
            dtype: of the weights if the caller gave no ``dtype``.

        Raises: FormatError: the file cannot be written, or a number is too large for float16.
        """
        import gguf

        dtype = self.dtype or dtype
        tensors = self.architecture.tensors(parameters)
        parameters.clear()
        types = {name: _type_of(name, array, dtype) for name, array in tensors.items()}
        narrow = [name for name in tensors if dtype == "q8_0" and types[name] == "float16"]
        if narrow:
            self.notes.append(
                f"{len(narrow)} tensors are float16: their row lengths are not multiples of {BLOCK} ({narrow[0]}, ...)"
            )
        pairs = {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            "general.name": self.name,
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "general.file_type": _FILE_TYPES[dtype],
            **self.architecture.pairs,
            **self.tokenizer.pairs,
        }
        write_file(path, lambda temporary: write_gguf(temporary, pairs, tensors, types))


def rounded(report: FusedLayer, weight: mx.array) -> FusedLayer:
    """``report`` of a merged layer, with the rounding error of ``weight`` [.., in] in q8_0 added."""
    blocks = weight.astype(mx.float32).reshape(-1, BLOCK)
    scale = (abs(blocks).max(axis=1, keepdims=True) / 127).astype(mx.float16).astype(mx.float32)
    scale = mx.maximum(scale, 1e-30)
    lost = mx.linalg.norm((mx.round(blocks / scale) * scale - blocks).flatten())
    update = report.update_norm * mx.linalg.norm(blocks.flatten())
    error = math.hypot(report.relative_error, (lost / mx.maximum(update, 1e-30)).item())
    # Rounding errors are perpendicular to the update, as random numbers are.
    return replace(report, storage="q8_0", relative_error=error, cosine=1 / math.hypot(1, error))


def _type_of(name: str, array: mx.array, dtype: str) -> str:
    if array.ndim < 2 or name.endswith(_FLOAT32):
        return "float32"
    return "float16" if dtype == "q8_0" and array.shape[-1] % BLOCK else dtype
