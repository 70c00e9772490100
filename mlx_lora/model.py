"""Models and their adapters: load, attach, extract, mount, unmount, save. The one door to mlx-lm's loader.

An adapter never touches a base weight here; merging it into the weights is ``fusing.py``. Nothing prints.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import device
from .adapter import Adapter, explicit_config, raise_faults, split_layer
from .base_config import missing_fields
from .config import AdapterConfig
from .errors import AdapterError, ConfigError, MLXLoRAError, ModelError
from .formats import load_adapter
from .layers import METHODS, AdapterLayer, dims, introduce, is_quantized, kind, use_blas
from .selection import layer_paths, select

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What a model folder needs besides its weights; copied as they are when a model is saved.
_BESIDE = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Base:
    """Where a model came from: the name it was asked for by, its folder and its config."""

    name: str
    folder: Path
    config: dict[str, Any]


def base_of(model: nn.Module) -> Base | None:
    """What ``load`` knew of the model; None for one that was made elsewhere."""
    return model.__dict__.get("_mlx_lora_base")


def load(
    path_or_repo: str | Path,
    adapter_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer through mlx-lm, and mount an adapter of any format.

    Args:
        path_or_repo: a local folder, or a repository on the Hugging Face Hub.
        adapter_path: folder of an adapter.
        dtype: ``auto``: as stored, but float32 on a CPU, where MLX computes half precision and quantized products some
            hundred times slower (quantized weights keep their values). ``stored``: as in the files, whatever computes.
            Else ``float32``, ``float16`` or ``bfloat16``.
        revision: of the repository.
        trust_remote_code: run Python files of the model folder. Off unless asked for.
        lazy: leave weights on disk until they are used.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ModelError: no such model, damaged files, an unknown architecture. AdapterError, FormatError: the adapter.
    """
    if dtype not in ("auto", "stored", *DTYPES):
        raise ConfigError(f"dtype must be one of auto, stored, {', '.join(DTYPES)}, not {dtype!r}")
    adapter = load_adapter(adapter_path) if adapter_path is not None else None
    folder = resolve(path_or_repo, revision)
    config = read_config(folder)

    from mlx_lm import utils

    if "model_file" in config and not trust_remote_code:
        raise ModelError(
            f"{path_or_repo}: wants to run its own code ({config['model_file']!r})",
            "If you have read and trust it: --trust-remote-code.",
        )
    # Older versions of mlx-lm run such code without asking, and know no such argument.
    knows = "trust_remote_code" in inspect.signature(utils.load_model).parameters
    options = {"trust_remote_code": True} if trust_remote_code and knows else {}
    try:
        model, config = utils.load_model(folder, lazy=True, model_config=missing_fields(config), **options)
        tokenizer = utils.load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # whatever a damaged or foreign folder provokes in mlx-lm and transformers
        raise ModelError(f"{path_or_repo}: cannot be loaded ({_first_line(error)})", _load_hint(error)) from error
    on_cpu = dtype == "auto" and device.is_cpu()
    if dtype in DTYPES or on_cpu:
        model.set_dtype(DTYPES.get(dtype, mx.float32))
    if on_cpu:
        use_blas(model)
    object.__setattr__(model, "_mlx_lora_base", Base(str(path_or_repo), folder, config))
    if not lazy:
        try:
            mx.eval(model.parameters())
        except RuntimeError as error:
            raise ModelError(f"{path_or_repo}: its weights cannot be read ({_first_line(error)})") from error
    model.eval()
    if adapter is not None:
        mount(model, adapter)
    return model, tokenizer


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded from the Hub where the name is a repository's."""
    name = str(path_or_repo)
    if not name.strip():
        raise ModelError("no model is named: no such folder", "Give a local folder, or a repository of the Hub.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{name}: is a file", "Name the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/"):
        raise ModelError(f"{name}: no such folder", "Give a local folder, or a repository such as Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download

    patterns = [p for p in _BESIDE if not p.startswith(("LICENSE", "NOTICE"))] + ["model*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises its own, httpx's and OSError
        raise ModelError(
            f"{name}: no such folder, and the repository cannot be had ({_first_line(error)})",
            "Check the name and the network; a model that was downloaded before loads with HF_HUB_OFFLINE=1.",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: holds no config.json", "Name the folder of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})", "Download the file again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path}: names no model_type", "Name the folder of a Hugging Face language model.")
    return config


# -- adapters on a model ---------------------------------------------------------------------------------------------


def attach(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze the base and put fresh, trainable adapters on the modules that ``config`` chooses. The identity at first.

    Draws from ``mx.random``: seed it for a run that can be repeated. Under ``method="full"`` nothing is attached: the
    chosen layers' own parameters become trainable.

    Returns: the adapted paths. Raises: AdapterError, ConfigError.
    """
    if adapters_on(model):
        raise AdapterError("the model has adapters already", "Take them off with unmount(model), or fuse them.")
    if config.method == "full":
        return _unfreeze(model, config)
    chosen = select(model, config)
    dtype = _model_dtype(model)
    layers = {}
    for path, module in chosen.items():
        layer = METHODS[config.method][kind(module)]
        try:
            layers[path] = layer(module, config.rank_of(path), config.scale_of(path), config.dropout, dtype)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}", error.hint) from None
    model.freeze()
    _place(model, layers)
    return list(chosen)


def extract(model: nn.Module) -> Adapter:
    """The adapter on ``model`` as a value; the arrays are shared, not copied.

    After ``attach(model, AdapterConfig(method="full"))`` these are the trainable parameters themselves.
    """
    layers = adapters_on(model)
    base = base_of(model)
    name = base.name if base else None
    if not layers:
        weights = dict(tree_flatten(model.trainable_parameters()))
        if not weights or len(weights) == len(tree_flatten(model.parameters())):
            raise AdapterError("the model has no adapter", "Put one on with attach(model, config) or mount(...).")
        indices = [split_layer(path)[0] for path in weights]
        return Adapter(AdapterConfig(method="full", num_layers=_count(model, indices)), weights, base=name)
    weights, ranks, scales = {}, {}, {}
    for path, layer in layers.items():
        ranks[path], scales[path] = layer.rank, layer.scale
        weights.update({f"{path}.{leaf}": array for leaf, array in layer.adapter_weights().items()})
    first = next(iter(layers.values()))
    plain = AdapterConfig(
        method=first.method,
        dropout=round(1 - first.dropout._p_1, 6),
        num_layers=_count(model, [split_layer(path)[0] for path in layers]),
    )
    return Adapter(explicit_config(plain, ranks, scales), weights, base=name)


def mount(model: nn.Module, adapter: Adapter) -> None:
    """Put ``adapter`` on ``model``, in place of whichever is there. The base is untouched, and frozen.

    Raises:
        AdapterError: the adapter does not fit; the model is then as it was.
    """
    adapter.check()
    if adapter.config.method == "full":
        return _mount_full(model, adapter)
    bare = _bare_modules(model)
    faults = _misfits(bare, adapter)
    if faults:
        base = f" It was made for {adapter.base}." if adapter.base else ""
        raise_faults(faults, f"This adapter is of another model.{base}")
    dtype, layers = _model_dtype(model), {}
    for path in adapter.modules:
        config = adapter.config
        layer = METHODS[config.method][kind(bare[path])](
            bare[path], adapter.rank_of(path), config.scale_of(path), config.dropout, dtype
        )
        for leaf, initial in layer.adapter_weights().items():
            setattr(layer, leaf, adapter.weights[f"{path}.{leaf}"].astype(initial.dtype))
        layers[path] = layer
    unmount(model)
    model.freeze()
    _place(model, layers)


def unmount(model: nn.Module) -> None:
    """Take every adapter off ``model``; it computes as it was loaded. Does nothing where there is none."""
    layers = adapters_on(model)
    if layers:
        model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers.items()]))
    replaced = model.__dict__.pop("_mlx_lora_replaced", None)
    if replaced:
        model.update(tree_unflatten(list(replaced.items())))


def adapters_on(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of ``model`` by path, in the model's order."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, AdapterLayer)}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as the numbers it stands for."""
    trainable = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    total = 0
    for module in model.modules():
        own = {n: a for n, a in module.items() if isinstance(a, mx.array) and not n.startswith("_")}
        if is_quantized(module):
            total += (module.weight.size * 32) // module.bits
            own = {n: a for n, a in own.items() if n == "bias"}
        total += sum(array.size for array in own.values())
    return trainable, total


def _place(model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    introduce(layers)


def _bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path as they would be without adapters."""
    adapted = adapters_on(model)
    inside = tuple(path + "." for path in adapted)
    modules = {p: m for p, m in model.named_modules() if not (inside and p.startswith(inside))}
    return modules | {path: layer.base for path, layer in adapted.items()}


def _misfits(bare: dict[str, nn.Module], adapter: Adapter) -> list[str]:
    faults = []
    for path in adapter.modules:
        module = bare.get(path)
        which = kind(module) if module is not None else None
        a, b = adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"]
        if which is None:
            faults.append(f"{path}: the model has no such layer to adapt")
            continue
        rows, columns = dims(module)
        if which == "switch":
            shapes = (module.num_experts, a.shape[1], rows), (module.num_experts, columns, b.shape[-1])
        else:
            shapes = (rows, a.shape[-1]), (b.shape[0], columns)
        if (a.shape, b.shape) != shapes:
            faults.append(
                f"{path}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not fit this layer "
                f"({rows} x {columns}{', experts' if which == 'switch' else ''})"
            )
        elif "m" in METHODS[adapter.config.method][which].leaves:
            expected = (rows,) if which == "embedding" else (*b.shape[:-2], columns)
            if which == "switch":
                expected = (module.num_experts, columns)
            if adapter.weights[f"{path}.m"].shape != expected:
                faults.append(f"{path}: m {list(adapter.weights[f'{path}.m'].shape)}, expected {list(expected)}")
    return faults


def _mount_full(model: nn.Module, adapter: Adapter) -> None:
    unmount(model)
    parameters = dict(tree_flatten(model.parameters()))
    faults = []
    for name, array in adapter.weights.items():
        if name not in parameters:
            faults.append(f"{name}: the model has no such parameter")
        elif parameters[name].shape != array.shape:
            faults.append(f"{name}: shape {list(array.shape)}, the model's is {list(parameters[name].shape)}")
    raise_faults(faults, "These weights are of another model.")
    object.__setattr__(model, "_mlx_lora_replaced", {name: parameters[name] for name in adapter.weights})
    new = {name: array.astype(parameters[name].dtype) for name, array in adapter.weights.items()}
    model.update(tree_unflatten(list(new.items())))


def _unfreeze(model: nn.Module, config: AdapterConfig) -> list[str]:
    if config.keys is not None or config.rank_pattern or config.scale_pattern:
        raise ConfigError("full fine-tuning trains whole layers: keys and patterns do not apply", "Use --num-layers.")
    paths = layer_paths(model)
    paths = paths[-config.num_layers :] if config.num_layers > 0 else paths
    modules = dict(model.named_modules())
    if any(is_quantized(m) for path in paths for m in modules[path].modules()):
        raise ConfigError(
            "full fine-tuning cannot train quantized layers", "Use lora or dora, or a model that is not quantized."
        )
    model.freeze()
    for path in paths:
        modules[path].unfreeze()
    return paths


def _count(model: nn.Module, indices: list[int | None]) -> int:
    """The last how many layers hold all of ``indices``; all where some lie outside the layers alone."""
    known = [i for i in indices if i is not None]
    total = len(layer_paths(model))
    return total - min(known) if known else total


def _model_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype most of the model's float parameters have."""
    count: Counter = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            count[array.dtype] += array.size
    return count.most_common(1)[0][0] if count else mx.float32


# -- saving ----------------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, path: str | Path, overwrite: bool = False) -> Path:
    """Write ``model``, loaded by ``load``, as a model folder that mlx-lm loads; its tokenizer files come along.

    Adapters must be fused or taken off first. The folder appears whole or not at all.

    Raises: ModelError.
    """
    base, folder = base_of(model), Path(path)
    if base is None:
        raise ModelError("the model was not loaded by mlx_lora.load: its config and tokenizer are not known")
    if adapters_on(model):
        raise ModelError("the model has adapters on it", "Merge them with fuse(model), or take them off.")
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ModelError(f"{folder}: is there already", "Choose another folder, or add --force.")
    if folder.exists() and base.folder.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder}: the base model itself lies there", "Choose another folder.")
    from mlx_lm.utils import save_config
    from mlx_lm.utils import save_model as save_weights

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for pattern in _BESIDE:
            for file in base.folder.glob(pattern):
                if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, temporary / file.name)
        save_weights(temporary, model)
        save_config(saved_config(model, base.config), temporary / "config.json")
        os.chmod(temporary, 0o755)
        if folder.exists():
            # Renamed before it is deleted: whatever fails, the old or the new folder is whole.
            os.replace(folder, old := temporary.with_name(temporary.name + "-old"))
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
        raise ModelError(
            f"{folder}: cannot be written ({error})", "Free some space, or choose another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def saved_config(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its quantization section telling what the modules of ``model`` are now."""
    config = dict(config)
    settings = {}
    for path, module in model.named_modules():
        if is_quantized(module):
            settings[path] = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            if module.get("global_scale") is not None:
                settings[path]["global_scale"] = True
    foreign = config.get("quantization_config", {}).get("quant_method") == "bitnet"  # layers that mlx-lm makes itself
    if not foreign:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    if settings:
        common = Counter(json.dumps(s, sort_keys=True) for s in settings.values()).most_common(1)[0][0]
        default = json.loads(common)
        config["quantization"] = {**default, **{path: s for path, s in settings.items() if s != default}}
        config["quantization_config"] = config["quantization"]
    return config


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _load_hint(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "The tokenizer wants to run its own code. If you trust it: --trust-remote-code."
    if isinstance(error, MLXLoRAError):
        return error.hint
    if "not supported" in text:
        return "This architecture is not in mlx-lm: try a newer one (pip install -U mlx-lm)."
    return "Download the model again; the folder needs config.json, *.safetensors and a tokenizer."
