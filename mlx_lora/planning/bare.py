"""A base model with its adapter whose arrays are never computed: only their shapes are used."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..base.downloads import download_hint
from ..base.loading import DTYPES
from ..base.modules import kind, layer_paths
from ..base.names import BaseModel
from ..base.nf4 import NF4
from ..base.nf4_linear import NF4Linear
from ..errors import ModelError

_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# quantization_config of other tools, as mlx-lm reads it: method -> MLX's quantization.
_METHODS = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "compressed-tensors": {"group_size": 32, "bits": 4, "mode": "affine"},
}


def bare_model(base: BaseModel, quantize: bool, full_precision: bool) -> nn.Module:
    """The model of ``base`` without values.

    Args:
        quantize: to 4 bits, if it is not quantized already.
        full_precision: floats in float32, as on a CPU, instead of the stored dtype.
    """
    model, config = base._build(), base.config
    if not full_precision:
        model.set_dtype(DTYPES[stored_dtype(base)])
    if (found := quantization_of(config)) == "nf4":
        _to_nf4(model, config)
    elif found or quantize:
        _quantize(model, found or {"group_size": 64, "bits": 4}, _scaled(base))
    return model


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | str | None:
    """How a checkpoint is quantized: arguments of ``nn.quantize``, "nf4", or None. Raises: ModelError."""
    if found := config.get("quantization"):
        return found
    given = config.get("quantization_config")
    if not isinstance(given, dict):
        return None
    method = given.get("quant_method")
    if method == "bitsandbytes":
        return "nf4"
    if method is None:
        return given
    if method in _METHODS:
        return _METHODS[method]
    if method in ("awq", "gptq"):
        return {"group_size": given.get("group_size", 128), "bits": given.get("bits", 4)}
    raise ModelError(f"a plan does not support weights quantized by {method}", "Use a model of mlx-community.")


def stored_dtype(base: BaseModel) -> str:
    """The dtype of most floats in the checkpoint, by its files' headers; else by the config."""
    counts = Counter(dtype for name, dtype in base.dtypes.items() if name.endswith(("weight", "scales")))
    found = next((_STORED[dtype] for dtype, _ in counts.most_common() if dtype in _STORED), None)
    config = {**base.config, **base.text}
    given = str(config.get("dtype") or config.get("torch_dtype") or "").rpartition(".")[2]
    return found or (given if given in DTYPES else "bfloat16")


def _scaled(base: BaseModel) -> set[str]:
    """The modules with scales in the checkpoint's headers; empty if there are no headers."""
    return {name.removesuffix(".scales") for name in base.dtypes if name.endswith(".scales")}


def _quantize(model: nn.Module, quantization: dict[str, Any], scaled: set[str]) -> None:
    arguments = {name: quantization[name] for name in ("group_size", "bits", "mode") if name in quantization}
    known = {path for path, _ in model.named_modules()} & scaled  # names that ``sanitize`` changes are unknown

    def chosen(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % arguments["group_size"]:
            return False
        own = quantization.get(path)
        return own if own is not None else not known or path in scaled

    nn.quantize(model, class_predicate=chosen, **arguments)


def _to_nf4(model: nn.Module, config: dict[str, Any]) -> None:
    settings = config["quantization_config"]
    skipped = settings.get("llm_int8_skip_modules") or ["lm_head"]
    inside, layers = tuple(f"{path}." for path in layer_paths(model)), []
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or not path.startswith(inside) or path in skipped:
            continue
        blocks, nested = -(-module.weight.size // 64), None
        if settings.get("bnb_4bit_use_double_quant"):
            nested = (mx.zeros((-(-blocks // 256),)), mx.zeros((256,)), mx.zeros(()))
        absmax = mx.zeros((blocks,), mx.uint8 if nested else mx.float32)
        codes = mx.zeros((-(-module.weight.size // 2),), mx.uint8)
        value = NF4(codes, absmax, nested, tuple(module.weight.shape), 64)
        layers.append((path, NF4Linear(value, module.get("bias"), module.weight.dtype)))
    model.update_modules(tree_unflatten(layers))


def flops_per_token(model: nn.Module, config: dict[str, Any]) -> float:
    """Floating-point operations of a token's forward pass: two for each matrix weight that it is multiplied by.

    Attention's own products are left out. Only the experts that a token is sent to count.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
    chosen = next((text[name] for name in names if isinstance(text.get(name), int)), 1)
    total, head = 0.0, 0
    from ..base.modules import dims

    for path, module in model.named_modules():
        which = kind(module)
        size = dims(module)[0] * dims(module)[1] if which else 0
        if which == "embedding":
            head = max(head, size)  # a tied head; otherwise the linear layer counts
        elif which == "switch":
            total += size * chosen
        elif which == "linear":
            total += size
            head = 0 if "lm_head" in path or "embed_out" in path else head
    return 2 * (total + head)


def base_named(name: str | Path) -> BaseModel:
    """The model in a local folder or in the Hub's cache; for other repositories, only config and headers are read."""
    from ..base.loading import resolve

    if not is_repository(name):
        return BaseModel(resolve(name))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(name), "config.json")
    folder = Path(cached).parent if isinstance(cached, str) else None
    return BaseModel(folder if folder and any(folder.glob("*.safetensors")) else str(name))


def is_repository(name: str | Path) -> bool:
    """Whether ``name`` is not a local path and can be a repository's name."""
    text = str(name)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None
    return named and not Path(text).expanduser().exists()


def folder_of(base: BaseModel) -> Path:
    """The local folder with the tokenizer of ``base``; for a repository, only the small files are downloaded."""
    if base.folder is not None:
        return base.folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base.name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.py"]))
    except Exception as error:  # huggingface_hub raises its own errors, httpx's and OSError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{base.name}: its tokenizer cannot be downloaded ({first[:200]})", download_hint(error)
        ) from None
