"""Writing a merged model as a folder for Hugging Face's transformers, or as a GGUF file: ``convert --to merged``.

``fuse.py`` merges, ``gguf/`` writes GGUF. If the base is a transformers checkpoint, its files are copied shard by
shard with the merged weights replaced. A base in MLX's layout (quantized, or with stacked experts) is written from the
model instead, in floats and under transformers' names.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapter import SHARED, Adapter, raise_faults
from ..base.heads import FLAG
from ..base.loading import DTYPES, check_dtype, resolve
from ..base.modules import kind, total_bytes
from ..base.names import BaseModel
from ..base.origin import base_of
from ..base.saving import saved_config, write_model_folder
from ..errors import ConfigError, FormatError, ModelError
from ..model.attach import mount
from ..model.compatibility import only_in_checkpoint
from ..model.loading import load
from ..model.state import HEAD, bare_modules
from .checkpoint import merge_into_checkpoint, split_adapter
from .fuse import FusedLayer, check_biases, fuse
from .gguf import BLOCK, GGUFModel, rounded
from .gguf.modelfile import check_modelfile, write_modelfile

_SHARD = 5 << 30  # bytes of weights per file
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Families whose MLX names and shapes are transformers' except for the experts, which mlx-lm stacks.
_STACKED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
_TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")  # GPT-2 stores [in, out]


def export_merged(
    base: str | Path,
    adapter: Adapter,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
    modelfile: bool = False,
) -> list[FusedLayer]:
    """Merge ``adapter`` into the model ``base`` and write the whole model to ``target``.

    Args:
        base: a model folder, or a repository on the Hub.
        target: a folder, or a file that ends in ``.gguf``.
        dtype: ``float32``, ``float16``, ``bfloat16`` or, for GGUF, ``q8_0`` for all weights; by default as in the base.
        overwrite: replace an existing folder or file.
        notes: a list that receives what llama.cpp computes differently.
        modelfile: write Ollama's ``Modelfile`` next to the GGUF file.

    Returns: a report for each merged layer; see ``fuse``.

    Raises: ModelError, AdapterError, ConfigError, FormatError.
    """
    target = Path(target)
    if target.suffix.lower() == ".gguf":
        notes = [] if notes is None else notes
        return _export_gguf(base, adapter, target, dtype, overwrite, trust_remote_code, notes, modelfile)
    if modelfile:
        raise ConfigError("modelfile is for a GGUF file", "Give DST a name that ends in .gguf, or leave it out.")
    if dtype == "q8_0":
        raise ConfigError(
            "q8_0 is a type of GGUF files", "Give DST a name that ends in .gguf, or choose another dtype."
        )
    check_dtype(dtype)
    model, _ = load(base, dtype="stored", trust_remote_code=trust_remote_code)
    facts = BaseModel(base_of(model).folder)
    stored = only_in_checkpoint(bare_modules(model), adapter, facts)
    adapter, apart = split_adapter(adapter.check(), stored)
    merged, reports = merge_into_checkpoint(apart, facts) if stored else ({}, [])
    if adapter.weights.keys() - set(SHARED):
        mount(model, adapter)
        check_biases(model)
        reports += fuse(model, dtype=dtype, dequantize=True)
    untied = facts.tied and base_of(model).config.get(FLAG) is False
    tensors = _tensors(model, facts, adapter, merged, DTYPES.get(dtype))
    config = _config(model, dtype, facts.tied and not untied)
    needed = total_bytes(model)
    write_model_folder(target, facts.folder, lambda folder: _write(folder, tensors, config), overwrite, needed=needed)
    return reports


def _export_gguf(
    base: str | Path,
    adapter: Adapter,
    target: Path,
    dtype: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    notes: list[str],
    modelfile: bool,
) -> list[FusedLayer]:
    if target.exists() and not overwrite:
        raise FormatError(f"{target}: already exists", "Choose another name, or add --force.")
    beside = check_modelfile(target, overwrite) if modelfile else None
    made = GGUFModel(BaseModel(resolve(base)), adapter, target.stem, dtype, trust_remote_code)
    model, _ = load(base, dtype="stored", trust_remote_code=trust_remote_code)
    mount(model, adapter)
    reports = fuse(model, dtype=dtype if dtype in DTYPES else None, dequantize=True)
    stored = str(_most_common_dtype(model)).rpartition(".")[2]
    parameters = dict(tree_flatten(model.parameters()))
    del model  # so that each weight can be freed when it is written
    if dtype == "q8_0":
        weights = {report.path: parameters[f"{report.path}.weight"] for report in reports}
        reports = [r if weights[r.path].shape[-1] % BLOCK else rounded(r, weights[r.path]) for r in reports]
        del weights
    made.write(target, parameters, stored)
    notes += made.notes
    if beside is not None:
        notes += write_modelfile(beside, f"./{target.name}", made.tokenizer.tokenizer)
    return reports


def _config(model: nn.Module, dtype: str | None, tied: bool) -> dict[str, Any]:
    config = saved_config(model, base_of(model).config)
    stored = dtype or str(_most_common_dtype(model)).rpartition(".")[2]
    return {**config, "dtype": stored, "torch_dtype": stored, FLAG: tied}


def _most_common_dtype(model: nn.Module) -> mx.Dtype:
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=sizes.get)


def _tensors(
    model: nn.Module, facts: BaseModel, adapter: Adapter, merged: dict[str, mx.array], dtype: mx.Dtype | None
) -> Iterator[tuple[str, mx.array]]:
    """(transformers' name, array) of all weights of the merged model, in the checkpoint's order."""
    files = sorted(facts.folder.glob("*.safetensors"))
    names = facts.tensor_names
    quantized = any(facts.config.get(key) for key in ("quantization", "quantization_config"))
    if quantized or any(".switch_mlp." in name for name in names):
        source = _from_model(model, facts)
    else:
        changed = {**_changed(model, facts, adapter, names), **merged}
        stored = ((n, changed.get(n, array)) for file in files for n, array in mx.load(str(file)).items())
        source = itertools.chain(stored, ((n, array) for n, array in changed.items() if n not in names))
    for name, array in source:
        floats = mx.issubdtype(array.dtype, mx.floating)
        yield name, array.astype(dtype) if dtype is not None and floats else array


def _changed(model: nn.Module, facts: BaseModel, adapter: Adapter, names: set[str]) -> dict[str, mx.array]:
    """The weights that the adapter changed, by the checkpoint's name."""
    paths = {*adapter.modules, *adapter.tokens, *(name.rpartition(".")[0] for name in adapter.full_parameters)}
    modules, found, faults = dict(model.named_modules()), {}, []
    if facts.tied and base_of(model).config.get(FLAG) is False:  # fuse gave the model a head
        head = next(path for path in modules if f".{path}".endswith(f".{HEAD}"))
        found[f"{HEAD}.weight"] = modules[head].weight
        paths.discard(HEAD)
    for path in paths:
        module = modules[path]
        packed = _packed_experts(path, modules, facts) if kind(module) == "switch" else {}
        if packed and packed.keys() <= names:
            found |= packed
            continue
        for leaf in (leaf for leaf in ("weight", "bias") if leaf in module):
            made = _experts(path, module[leaf], facts) if kind(module) == "switch" else {}
            options = [f"{name}.{leaf}" for name in (facts.to_hf(path), path, path.removeprefix("model."))]
            name = next((n for n in options if n in names), None)
            if made and leaf == "weight" and all(n in names for n in made):
                found |= made
            elif name is None:
                faults.append(f"{path}.{leaf}: the checkpoint has no such weight")
            else:
                transposed = facts.model_type == "gpt2" and _TRANSPOSED.search(name)
                found[name] = module[leaf].T if transposed else module[leaf]
    hint = "This layout of experts is not supported; fuse the adapter for mlx-lm (mlx-lora fuse)."
    raise_faults(faults, hint, ModelError)
    return found


def _packed_experts(path: str, modules: dict[str, nn.Module], facts: BaseModel) -> dict[str, mx.array]:
    """gpt-oss's experts as transformers stores them: [experts, in, out], with alternating columns of gate and up."""
    if not facts.experts_in_out:
        return {}
    block, _, leaf = path.rpartition(".")
    name, parts = facts.to_hf(block), [modules[path]]
    if leaf != "down_proj":
        leaf, parts = "gate_up_proj", [modules[f"{block}.gate_proj"], modules[f"{block}.up_proj"]]
    weights = mx.stack([part.weight.swapaxes(-1, -2) for part in parts], axis=-1).flatten(-2)
    biases = mx.stack([part.bias for part in parts], axis=-1).flatten(-2)
    return {f"{name}.{leaf}": weights, f"{name}.{leaf}_bias": biases}


def _experts(path: str, stacked: mx.array, facts: BaseModel) -> dict[str, mx.array]:
    """A stacked weight [experts, out, in] as one weight per expert, by transformers' names."""
    block, _, leaf = path.rpartition(".")
    parent = block.rpartition(".")[0]
    leaf = _MIXTRAL.get(leaf, leaf) if facts.model_type == "mixtral" else leaf
    return {f"{parent}.experts.{i}.{leaf}.weight": weight for i, weight in enumerate(stacked)}


def _from_model(model: nn.Module, facts: BaseModel) -> Iterator[tuple[str, mx.array]]:
    """The weights of a model in MLX's layout, by transformers' names. Raises: ModelError."""
    if not facts.same_names and (facts.model_type not in _STACKED or "text_config" in facts.config):
        raise ModelError(
            f"{facts.name}: transformers' weight names are unknown for MLX {facts.model_type} models",
            "Give the original transformers model with --model, or fuse the adapter for mlx-lm (mlx-lora fuse).",
        )
    for name, array in tree_flatten(model.parameters()):
        if ".switch_mlp." in name and name.endswith(".weight"):
            yield from _experts(name.removesuffix(".weight"), array, facts).items()
        else:
            yield name, array


def _write(folder: Path, tensors: Iterator[tuple[str, mx.array]], config: dict[str, Any]) -> None:
    """Write the weights in files of at most ``_SHARD`` bytes, their index, and the config."""
    shards: list[dict[str, mx.array]] = [{}]
    size, sizes, where = 0, 0, {}

    def flush() -> None:
        mx.save_safetensors(str(folder / f"shard-{len(shards)}.safetensors"), shards[-1], {"format": "pt"})
        where.update(dict.fromkeys(shards[-1], len(shards)))
        shards[-1] = {}

    for name, array in tensors:
        if size + array.nbytes > _SHARD and shards[-1]:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = array
        size, sizes = size + array.nbytes, sizes + array.nbytes
    flush()
    count = len(shards)
    file = "model.safetensors" if count == 1 else "model-{:05d}-of-{:05d}.safetensors"
    for i in range(1, count + 1):
        (folder / f"shard-{i}.safetensors").rename(folder / file.format(i, count))
    if count > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": {n: file.format(i, count) for n, i in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
