"""A merged model as Hugging Face's transformers loads it, or as a GGUF file: ``convert --to merged``.

The merging is ``fusing.py``'s. Where the base is a checkpoint of transformers, its files are gone through shard by
shard, the merged weights put in and everything else carried over as it is. A base in MLX's own layout (quantized, or
with stacked experts) is written from the model instead, in floats, under transformers' names.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..adapter import Adapter, raise_faults
from ..base.loading import DTYPES, check_dtype
from ..base.modules import kind
from ..base.names import BaseModel
from ..base.origin import base_of
from ..base.saving import saved_config, write_model_folder
from ..errors import FormatError, ModelError
from ..formats.files import write_file
from ..model.attach import mount
from ..model.loading import load
from .fuse import FusedLayer, fuse

_SHARD = 5 << 30  # bytes of weights in a file
_GGUF = ("llama", "mistral", "mixtral")  # what mlx-lm's writer covers
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Whose MLX layout is known to be transformers' but for the stacked experts.
_STACKED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
_SAME = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "starcoder2"),
    *("cohere", "cohere2", "stablelm", "smollm3", "granite", "glm4", "seed_oss"),
}
_TURNED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")  # GPT-2 stores [in, out]


def export_merged(
    base: str | Path,
    adapter: Adapter,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> list[FusedLayer]:
    """Merge ``adapter`` into the model ``base`` and write the whole model to ``target``.

    Args:
        base: a model folder, or a repository on the Hub.
        target: a folder; or a file that ends in ``.gguf`` (llama and mistral models, float16, as mlx-lm writes them).
        dtype: ``float32``, ``float16`` or ``bfloat16`` for all weights; as they are stored by default.
        overwrite: replace what is there.

    Returns: a report for each merged layer; see ``fuse``.

    Raises: ModelError, AdapterError, ConfigError, FormatError.
    """
    check_dtype(dtype)
    target = Path(target)
    as_gguf = target.suffix == ".gguf"
    if as_gguf and target.exists() and not overwrite:
        raise FormatError(f"{target}: is there already", "Choose another name, or add --force.")
    model, _ = load(base, dtype="stored", trust_remote_code=trust_remote_code)
    facts = BaseModel(base_of(model).folder)
    if as_gguf and (facts.config["model_type"] not in _GGUF or dtype not in (None, "float16")):
        raise FormatError(
            f"mlx-lm writes GGUF of {', '.join(_GGUF)} in float16, not of {facts.config['model_type']} in {dtype}",
            "Write a folder, and convert it with llama.cpp's convert_hf_to_gguf.py.",
        )
    if as_gguf and (facts.config.get("attention_bias") or facts.config.get("mlp_bias")):
        raise FormatError("mlx-lm's GGUF writer leaves biases of q and k in the wrong order", "Write a folder instead.")
    tied = facts.tied
    mount(model, adapter)
    reports = fuse(model, dtype=dtype, dequantize=True)
    tensors = _tensors(model, facts, adapter, DTYPES.get(dtype))
    config = _config(model, dtype, tied)
    if as_gguf:
        _write_gguf(target, tensors, config, facts.folder)
    else:
        write_model_folder(target, facts.folder, lambda folder: _write(folder, tensors, config), overwrite)
    return reports


def _config(model: nn.Module, dtype: str | None, tied: bool) -> dict[str, Any]:
    config = saved_config(model, base_of(model).config)
    stored = dtype or str(_most_common_dtype(model)).rpartition(".")[2]
    return {**config, "dtype": stored, "torch_dtype": stored, "tie_word_embeddings": tied}


def _most_common_dtype(model: nn.Module) -> mx.Dtype:
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=sizes.get)


def _tensors(
    model: nn.Module, facts: BaseModel, adapter: Adapter, dtype: mx.Dtype | None
) -> Iterator[tuple[str, mx.array]]:
    """(transformers' name, array) of everything in the merged model, in the checkpoint's order."""
    files = sorted(facts.folder.glob("*.safetensors"))
    names = facts.tensor_names
    quantized = any(facts.config.get(key) for key in ("quantization", "quantization_config"))
    if quantized or any(".switch_mlp." in name for name in names):
        source = _from_model(model, facts)
    else:
        changed = _changed(model, facts, adapter, names)
        source = ((n, changed.get(n, array)) for file in files for n, array in mx.load(str(file)).items())
    for name, array in source:
        floats = mx.issubdtype(array.dtype, mx.floating)
        yield name, array.astype(dtype) if dtype is not None and floats else array


def _changed(model: nn.Module, facts: BaseModel, adapter: Adapter, names: set[str]) -> dict[str, mx.array]:
    """Weights that the adapter moved, by the checkpoint's name."""
    paths = {*adapter.modules, *adapter.tokens, *(name.rpartition(".")[0] for name in adapter.whole)}
    modules, found, faults = dict(model.named_modules()), {}, []
    for path in paths:
        module = modules[path]
        for leaf in (leaf for leaf in ("weight", "bias") if leaf in module):
            made = _experts(path, module[leaf], facts) if kind(module) == "switch" else {}
            options = [f"{name}.{leaf}" for name in (facts.to_hf(path), path, path.removeprefix("model."))]
            name = next((n for n in options if n in names), None)
            if made and leaf == "weight" and all(n in names for n in made):
                found |= made
            elif name is None:
                faults.append(f"{path}.{leaf}: the checkpoint has no such weight")
            else:
                turned = facts.model_type == "gpt2" and _TURNED.search(name)
                found[name] = module[leaf].T if turned else module[leaf]
    if faults and all(".bias:" in fault for fault in faults):
        hint = "The adapter has biases (lora_bias) where this model has none: keep it beside the base."
    else:
        hint = "This layout of experts is not written; fuse it for mlx-lm (mlx-lora fuse)."
    raise_faults(faults, hint, ModelError)
    return found


def _experts(path: str, stacked: mx.array, facts: BaseModel) -> dict[str, mx.array]:
    """A stacked weight [experts, out, in] under a name for each expert."""
    block, _, leaf = path.rpartition(".")
    parent = block.rpartition(".")[0]
    leaf = _MIXTRAL.get(leaf, leaf) if facts.model_type == "mixtral" else leaf
    return {f"{parent}.experts.{i}.{leaf}.weight": weight for i, weight in enumerate(stacked)}


def _from_model(model: nn.Module, facts: BaseModel) -> Iterator[tuple[str, mx.array]]:
    kind_of = facts.model_type
    if kind_of not in _SAME | _STACKED or "text_config" in facts.config:
        raise ModelError(
            f"{facts.name}: how transformers names the weights of an MLX {kind_of} is not known",
            "Give the original model of transformers with --model, or fuse it for mlx-lm (mlx-lora fuse).",
        )
    for name, array in tree_flatten(model.parameters()):
        if ".switch_mlp." in name and name.endswith(".weight"):
            yield from _experts(name.removesuffix(".weight"), array, facts).items()
        else:
            yield name, array


def _write(folder: Path, tensors: Iterator[tuple[str, mx.array]], config: dict[str, Any]) -> None:
    """Weights in files of at most ``_SHARD`` bytes, their index, and the config."""
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


def _write_gguf(target: Path, tensors: Iterator[tuple[str, mx.array]], config: dict[str, Any], tokenizer: Path) -> None:
    from mlx_lm.gguf import convert_to_gguf

    weights = {name: array.astype(mx.float16) for name, array in tensors}

    def write(temporary: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_gguf(tokenizer, weights, {**config, "quantization": None}, str(temporary))

    _quietly(lambda: write_file(target, write))


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except (ValueError, KeyError, TypeError, AssertionError, NotImplementedError) as error:
        raise FormatError(f"mlx-lm cannot write this model as GGUF ({error})", "Write a folder instead.") from None
