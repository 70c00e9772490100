"""Check whether an adapter can be mounted on a model: one sentence per incompatibility, and a hint.

Changes nothing. ``bare`` maps paths to the model's modules without adapters.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..adapter import FINGERPRINT, Adapter, split_layer
from ..base.fingerprint import Fingerprint
from ..base.modules import dense_weight, dims, is_quantized, kind
from ..base.names import BaseModel
from ..base.origin import Base, base_of
from ..config import LEAVES
from ..errors import MLXLoRAWarning
from ..formats.options import MERGE
from ..layers import METHODS
from .state import HEAD, bare_modules


def incompatibilities(model: nn.Module, adapter: Adapter) -> tuple[list[str], str]:
    """(incompatibilities of ``adapter``, which must be valid itself, with ``model``; a hint)."""
    bare = bare_modules(model)
    layers = [] if adapter.config.method == "full" else _in_layers(bare, adapter)
    faults = [*layers, *_in_tokens(bare, adapter), *_in_full_parameters(bare, adapter)]
    if not faults:
        return [], ""
    base = base_of(model)
    facts = BaseModel(base.folder) if base else None
    if facts and any(path not in bare and facts.to_mlx(path) in bare for path in _paths(adapter)):
        return faults, f"These are transformers' names: read the adapter with load_adapter(path, base={base.name!r})."
    missing = only_in_checkpoint(bare, adapter, facts) if facts else []
    if missing:
        kind = base.config["model_type"]
        what = f"mlx-lm splits or joins the weights of these {len(missing)} modules when it loads a {kind} checkpoint"
        if not any(_layer_exists(path, bare, facts) for path in missing):
            what = f"mlx-lm's {kind} models lack the part of the model that these {len(missing)} modules belong to"
        gone = tuple(f"{path}{end}" for path in missing for end in (":", "."))
        rest = [fault for fault in faults if not fault.startswith(gone)]
        return [*rest, f"{', '.join(missing[:2])}{', ...' * (len(missing) > 2)}: {what}"], MERGE
    return faults, _why(base, adapter)


def _why(base: Base | None, adapter: Adapter) -> str:
    """The hint for an adapter that is not for this model, from what is known about both."""
    trained, task = adapter.base, adapter.metadata.get("peft", {}).get("fields", {}).get("task_type")
    if task not in (None, "CAUSAL_LM"):
        return f"The adapter's task_type is {task}: only adapters of language models (CAUSAL_LM) can be used here."
    if not trained:
        return "Give the model that the adapter was trained on: the adapter does not name it."
    if base is None or not same_model(base.name, trained):
        here = f", and this model is {base.name}" if base else ""
        return f"The adapter was trained on {trained}{here}: give that model."
    return (
        f"The adapter names this very model ({trained}), so it was trained on another version of it: one with tokens "
        "added or layers changed, for instance. Save the model as it was trained, with its tokenizer, and give that."
    )


def same_model(one: str, other: str) -> bool:
    """Whether two names of models (folders or repositories) are equal or have the same last part."""
    return one == other or Path(one).name.lower() == Path(other).name.lower()


def only_in_checkpoint(bare: dict[str, nn.Module], adapter: Adapter, base: BaseModel) -> list[str]:
    """Modules of the adapter that the model lacks although its checkpoint has their weight."""
    missing = [path for path in _paths(adapter) if path not in bare and path != HEAD and path not in adapter.tokens]
    return [path for path in missing if base.weight_name(path) is not None]


def _paths(adapter: Adapter) -> list[str]:
    """The modules that the adapter changes in any way."""
    saved = (name.rpartition(".")[0] for name in adapter.full_parameters)
    return list(dict.fromkeys([*adapter.modules, *saved, *adapter.tokens]))


def _layer_exists(path: str, bare: dict[str, nn.Module], base: BaseModel) -> bool:
    """Whether the model has the layer that contains ``path``, or its parent."""
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts)) if parts[i - 1].isdigit() or i == len(parts) - 1]
    return any(base.to_mlx(p) in bare for p in above)


def warn_of_another_base(adapter: Adapter, here: Fingerprint | None, base: Base | None) -> None:
    """Warn if ``adapter`` was trained on another base than the model with the fingerprint ``here``."""
    trained_on = Fingerprint.from_stored(adapter.metadata.get(FINGERPRINT))
    if trained_on is None or here is None or trained_on.matches(here):
        return
    warnings.warn(
        f"The adapter was trained on {adapter.base or 'another model'}, whose weights are not those of "
        f"{base.name if base else 'this model'}. It fits, but may answer worse than on its own base model.",
        MLXLoRAWarning,
        stacklevel=3,
    )


def own_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own parameters; for a quantized module, the names in its dense equivalent."""
    if is_quantized(module):
        return ["weight", "bias"] if "bias" in module else ["weight"]
    return [name for name, value in module.items() if isinstance(value, mx.array) and not name.startswith("_")]


def _in_full_parameters(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found = []
    for name, array in adapter.full_parameters.items():
        path, _, leaf = name.rpartition(".")
        module = bare.get(path)
        if module is None or leaf not in own_parameters(module):
            found.append(f"{name}: the model has no such parameter")
            continue
        shape = dense_weight(module).shape if is_quantized(module) and leaf == "weight" else module[leaf].shape
        if shape != array.shape:
            found.append(f"{name}: shape {list(array.shape)}, the model's is {list(shape)}")
    return found


def has_token_rows(path: str, module: nn.Module | None) -> bool:
    """Whether ``module`` has one row per token: an embedding, or an output head, which must have no bias."""
    if module is None or kind(module) == "embedding":
        return module is not None
    return kind(module) == "linear" and split_layer(path)[0] is None and "bias" not in module


def _in_tokens(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found = []
    for path, (ids, rows) in adapter.tokens.items():
        if not has_token_rows(path, bare.get(path)):
            found.append(f"{path}: the model has no such embedding or output head")
            continue
        vocabulary, width = dims(bare[path]) if kind(bare[path]) == "embedding" else dims(bare[path])[::-1]
        if rows.shape[1] != width or max(ids) >= vocabulary:
            size = f"{vocabulary} x {width}"
            found.append(f"{path}: rows {list(rows.shape)} up to token {max(ids)} do not fit this embedding ({size})")
    return found


def _in_layers(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    found, method = [], adapter.config.method
    for path in adapter.modules:
        module = bare.get(path)
        which = kind(module) if module is not None else None
        if METHODS[method].get(which) is None:
            what = (
                "the model has no such layer" if module is None else f"{method} does not adapt {type(module).__name__}"
            )
            found.append(f"{path}: {what}")
            continue
        rows, columns = dims(module)
        experts = (module.num_experts,) if which == "switch" else ()
        if method == "vera":
            found += _in_vera_layer(path, experts, rows, columns, adapter)
            continue
        if "lora_a" not in LEAVES[method]:
            continue  # mount compares the shapes with a new layer's
        a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
        if which == "switch":
            shapes = (*experts, a.shape[1], rows), (*experts, columns, b.shape[-1])
        else:
            shapes = (rows, a.shape[-1]), (b.shape[0], columns)
        if (a.shape, b.shape) != shapes:
            found.append(
                f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit this layer "
                f"({rows} x {columns}{', experts' if which == 'switch' else ''})"
            )
            continue
        for leaf in ("m", "lora_bias"):
            expected = (rows,) if which == "embedding" else (*experts, columns)
            vector = adapter.weights.get(f"{path}.{leaf}")
            if vector is not None and vector.shape != expected:
                found.append(f"{path}: {leaf} {list(vector.shape)}, expected {list(expected)}")
    return found


def _in_vera_layer(path: str, experts: tuple, rows: int, columns: int, adapter: Adapter) -> list[str]:
    found = []
    for leaf, size in (("vera_lambda_d", adapter.config.rank), ("vera_lambda_b", columns)):
        shape = adapter.weights[f"{path}.{leaf}"].shape
        if shape != (*experts, size):
            found.append(f"{path}: {leaf} {list(shape)}, expected {[*experts, size]}")
    given = adapter.weights.get("vera_a")
    if given is not None and given.shape[1] < rows:
        found.append(f"{path}: vera_a {list(given.shape)} is too narrow for this layer ({rows} x {columns})")
    return found
