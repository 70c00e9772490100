"""Check that a model folder's weight files are present and complete before they are read.

Only names and headers are read. One error covers all files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as A; '
    "A.from_pretrained('{0}').save_pretrained('{0}-safetensors')\""
)


def check_weight_files(name: Any, folder: Path) -> None:
    """Refuse a folder whose ``model*.safetensors`` files are absent or incomplete. Raises: ModelError."""
    files = sorted(folder.glob("model*.safetensors"))
    listed = _listed(folder / _INDEX)
    if not files and not listed:
        raise _no_weights(name, folder)
    absent = [file for file in listed if not (folder / file).exists()]
    faults = [f"{', '.join(absent[:4])}{' ...' if len(absent) > 4 else ''}: missing, but {_INDEX} lists it"] * bool(
        absent
    )
    pointers = [file for file in files if _is_pointer(file)]
    faults += [f"{file.name}: is a pointer of Git LFS, not the file itself" for file in pointers]
    faults += [f"{file.name}: {fault}" for file in files if file not in pointers and (fault := _damage(file))]
    if faults:
        again = "Run `git lfs pull` in the folder." if pointers else f"Download these files of {name} again."
        raise ModelError(f"{name}: its weights are incomplete\n" + "\n".join(faults), again)


def _listed(index: Path) -> list[str]:
    """The files that a checkpoint's index names; none if there is no index."""
    if not index.exists():
        return []
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: cannot be read ({error})", "Download the file again.") from None


def _no_weights(name: Any, folder: Path) -> ModelError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    fault, hint = "has no weights (model*.safetensors)", "Download the model again with its *.safetensors files."
    if any(file.startswith("adapter") for file in (*others, *pickles)):
        fault, hint = "holds an adapter, not a model", "Give its base model, and this folder as the adapter."
    elif others:
        fault = f"its weights are not named model*.safetensors, as mlx-lm reads them: {', '.join(others[:4])}"
        hint = "Rename the file to model.safetensors, or save the model again with transformers."
    elif pickles:
        fault = f"has weights only as pickles ({', '.join(pickles[:4])}), which can run code when they are read"
        hint = f"Convert it once, if you trust it: {_CONVERT.format(name)}"
    elif ggufs:
        fault = f"has weights only as GGUF ({', '.join(ggufs[:4])}), which mlx-lm does not read"
        hint = "Use the original model, which the GGUF file was made from."
    return ModelError(f"{name}: {fault}", hint)


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(30).startswith(b"version https://git-lfs")


def _damage(file: Path) -> str | None:
    """Why a safetensors file cannot be read; None if its header and size are right."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        return f"is cut off or damaged ({size} bytes; {str(error).removeprefix('Error while deserializing header: ')})"
