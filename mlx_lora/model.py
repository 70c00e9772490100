"""Models and their adapters: load, attach, extract, mount, unmount, save. The one door to mlx-lm's loader.

An adapter never touches a base weight here; merging it into the weights is ``fusing.py``. Nothing prints.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from . import device
from .adapter import SHARED, Adapter, explicit_config, raise_faults, saved_whole, split_layer
from .base_config import missing_fields
from .config import AdapterConfig
from .errors import AdapterError, ConfigError, MLXLoRAError, ModelError
from .fitting import misfits, own_arrays, token_misfits, whole_misfits
from .formats import detect_format, load_adapter
from .initialisation import SUBTRACTED
from .layers import (
    AdapterLayer,
    TokenRows,
    UntiedEmbedding,
    base_dtype,
    check_rank,
    dense_weight,
    dims,
    draw_projections,
    fuse_mlps,
    introduce,
    is_quantized,
    kind,
    make_layers,
    shared_dims,
    use_blas,
)
from .quant import NF4Linear
from .quant.model import load_classes, nf4_config, refuse_foreign, stored_names
from .selection import layer_paths, select, select_named
from .starting import start_layer, starts_of, with_ranks

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def check_dtype(dtype: str | None) -> None:
    """Refuse a name that is not among ``DTYPES``; None stands for the model's own."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}", "Leave dtype out to keep the model's own."
        )


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
        raise ConfigError(
            f"dtype must be one of auto, stored, {', '.join(DTYPES)}, not {dtype!r}",
            "Leave dtype out for auto: as stored, but float32 on a CPU.",
        )
    if adapter_path is not None:
        detect_format(adapter_path)  # before a base is downloaded for it
    folder = resolve(path_or_repo, revision)
    adapter = load_adapter(adapter_path, base=folder) if adapter_path is not None else None
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
    refuse_foreign(path_or_repo, config)
    classes = {"get_model_classes": load_classes(utils._get_classes)}
    try:
        model, config = utils.load_model(folder, lazy=True, model_config=missing_fields(config), **classes, **options)
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
            raise ModelError(
                f"{path_or_repo}: its weights cannot be read ({_first_line(error)})",
                "Download its *.safetensors again.",
            ) from error
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


@dataclass
class _State:
    """What is on a model besides its adapter layers, and what it takes to undo it."""

    config: AdapterConfig
    shared: tuple[mx.array, mx.array] | None = None  # VeRA's projections as drawn or loaded, float32
    whole: list[tuple[str, str]] = field(default_factory=list)  # (module path, parameter name) of whole parameters
    arrays: dict[tuple[str, str], mx.array] = field(default_factory=dict)  # what they were
    modules: dict[str, nn.Module] = field(default_factory=dict)  # quantized modules that dense ones stand in for


def attach(
    model: nn.Module, config: AdapterConfig, batches: Iterable | None = None, reference: nn.Module | None = None
) -> list[str]:
    """Freeze the base and put fresh, trainable adapters on the modules that ``config`` chooses. The identity at first.

    Whole modules, biases and rows of embeddings that ``config`` names become trainable too; ``unmount`` puts back what
    they were. Draws from ``mx.random``: seed it for a run that can be repeated. Under ``method="full"`` nothing is
    attached: the chosen layers' own parameters become trainable.

    Args:
        batches: what ``init`` "eva" and "lora_ga" look at: with ``tokens`` [B, T] and ``mask`` [B, T-1], as
            ``mlx_lora.data.train_batches`` yields them.
        reference: the model before it was quantized, for ``init`` "loftq". (That start is not the identity: it makes
            up for what quantizing lost.)

    Returns: the adapted paths. Raises: AdapterError, ConfigError.
    """
    if adapters_on(model) or _state(model) is not None:
        raise AdapterError("the model has adapters already", "Take them off with unmount(model), or fuse them.")
    if config.method == "full":
        return _unfreeze(model, config)
    bare = dict(model.named_modules())
    whole, tokens = _whole_modules(model, config), select_named(model, config.trainable_token_indices)
    chosen = select(model, config)
    both = [path for path in chosen if path in whole or path in tokens]
    if config.keys is None:
        chosen = {path: module for path, module in chosen.items() if path not in both}
    elif both:
        raise AdapterError(f"{', '.join(both)}: adapted and trained whole at once", "Leave one of the two out.")
    ranks = {path: config.rank_of(path) for path in chosen}
    if config.method != "vera":
        for path, module in chosen.items():
            try:
                check_rank(module, ranks[path])
            except AdapterError as error:
                raise AdapterError(f"{path}: {error.message}", error.hint) from None
    starts = starts_of(model, config, chosen, ranks, batches, reference)
    if config.init == "eva":  # layers whose inputs tell least are left out, others got their ranks
        chosen = {path: module for path, module in chosen.items() if path in starts}
        config = with_ranks(config, ranks, {path: len(pair[0]) for path, pair in starts.items()})
        ranks = {path: config.rank_of(path) for path in chosen}
    state = _State(config)
    if config.method == "vera" and chosen:
        state.shared = draw_projections(config.rank, *shared_dims(chosen.values()), config.projection_prng_key)
    difference = config.init.startswith(SUBTRACTED)
    layers: dict[str, nn.Module] = make_layers(chosen, config, ranks, _model_dtype(model), state.shared, difference)
    for path, (a, b) in starts.items():
        start_layer(layers[path], a, b)
    layers |= {path: TokenRows(bare[path], ids, _model_dtype(model)) for path, ids in tokens.items()}
    model.freeze()
    _place(model, layers)
    names = [(path, leaf) for path in whole for leaf in own_arrays(bare[path])]
    names += [(path, "bias") for path in _biased(bare, config, list(chosen)) if (path, "bias") not in names]
    _make_whole(model, state, names)
    return list(chosen)


def extract(model: nn.Module) -> Adapter:
    """The adapter on ``model`` as a value; the arrays are shared, not copied.

    After ``attach(model, AdapterConfig(method="full"))`` these are the trainable parameters themselves.
    """
    layers, state = adapters_on(model), _state(model)
    base = base_of(model)
    name = base.name if base else None
    if state is None and not layers:
        weights = dict(tree_flatten(model.trainable_parameters()))
        if not weights or len(weights) == len(tree_flatten(model.parameters())):
            raise AdapterError("the model has no adapter", "Put one on with attach(model, config) or mount(...).")
        indices = [split_layer(path)[0] for path in weights]
        return Adapter(AdapterConfig(method="full", num_layers=_count(model, indices)), weights, base=name)
    if state is None:  # layers that were not put there by attach or mount
        first = next(iter(layers.values()))
        state = _State(AdapterConfig(method=first.method, dropout=round(1 - first.dropout._p_1, 6)))
    weights, ranks, scales = {}, {}, {}
    for path, layer in layers.items():
        ranks[path], scales[path] = layer.rank, layer.scale
        weights.update({f"{path}.{leaf}": array for leaf, array in layer.adapter_weights().items()})
    tokens = {path: m for path, m in model.named_modules() if isinstance(m, TokenRows)}
    weights |= {f"{path}.trainable_tokens": module.trainable_tokens for path, module in tokens.items()}
    bare = _bare_modules(model)
    weights |= {f"{path}.{leaf}": bare[path][leaf] for path, leaf in state.whole}
    config = state.config
    if config.method == "vera" and config.save_projection:
        weights |= dict(zip(SHARED, state.shared, strict=True))
    plain = replace(
        config,
        num_layers=_count(model, [split_layer(path)[0] for path in layers]),
        keys=None if layers else config.keys,
        modules_to_save=tuple(sorted({path for path, leaf in state.whole if saved_whole(config, path)})) or None,
        trainable_token_indices={path: module.ids for path, module in tokens.items()},
    )
    return Adapter(explicit_config(plain, ranks, scales), weights, base=name)


def mount(model: nn.Module, adapter: Adapter, *, difference: bool = False) -> None:
    """Put ``adapter`` on ``model``, in place of whichever is there. The base is untouched, and frozen.

    Args:
        difference: the adapter came from a start such as PiSSA's: its second half is the frozen pair that the base
            gives up, and stays frozen. Only a training run that goes on needs this.

    Raises:
        AdapterError: the adapter does not fit; the model is then as it was.
    """
    adapter.check()
    config, bare = adapter.config, _bare_modules(model)
    faults = [] if config.method == "full" else misfits(bare, adapter)
    faults += token_misfits(bare, adapter) + whole_misfits(bare, adapter)
    if faults:
        raise_faults(faults, f"This adapter was made for {adapter.base or 'another model'}: put it on that one.")
    state, layers, dtype = _State(config), {}, _model_dtype(model)
    if config.method != "full":
        bases = {path: bare[path] for path in adapter.modules}
        if config.method == "vera" and bases:
            state.shared = _projections(adapter, bases)
        ranks = {path: adapter.rank_of(path) for path in bases}
        if difference:
            ranks = {path: rank // 2 for path, rank in ranks.items()}
        layers = make_layers(bases, config, ranks, dtype, state.shared, difference)
        for path, layer in layers.items():
            if difference:
                layer.split(adapter.weights[f"{path}.lora_a"], adapter.weights[f"{path}.lora_b"])
                continue
            for leaf, initial in layer.adapter_weights().items():
                setattr(layer, leaf, adapter.weights[f"{path}.{leaf}"].astype(initial.dtype))
    for path, (ids, rows) in adapter.tokens.items():
        layers[path] = TokenRows(bare[path], ids, dtype)
        layers[path].trainable_tokens = rows.astype(layers[path].trainable_tokens.dtype)
    unmount(model)
    model.freeze()
    _place(model, layers)
    whole = {tuple(name.rpartition(".")[::2]): array for name, array in adapter.whole.items()}
    _make_whole(model, state, list(whole), whole)


def unmount(model: nn.Module) -> None:
    """Take every adapter off ``model``; it computes as it was loaded. Does nothing where there is none."""
    layers, state = _wrappers(model), model.__dict__.pop("_mlx_lora_state", None)
    if layers:
        model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers.items()]))
    if state is not None:
        if state.modules:
            model.update_modules(tree_unflatten(list(state.modules.items())))
        modules = dict(model.named_modules())
        for (path, leaf), array in state.arrays.items():
            modules[path][leaf] = array


def forget(model: nn.Module) -> None:
    """The model keeps what it computes now for its own: ``unmount`` has nothing left to put back."""
    model.__dict__.pop("_mlx_lora_state", None)


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
            total += math.prod(dims(module)) * (module.weight.shape[0] if module.weight.ndim == 3 else 1)
            own = {n: a for n, a in own.items() if n == "bias"}
        total += sum(array.size for array in own.values())
    return trainable, total


def _state(model: nn.Module) -> _State | None:
    return model.__dict__.get("_mlx_lora_state")


def _wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Everything that wraps a module of the bare model, by path: adapter layers and rows of embeddings."""
    return {path: m for path, m in reversed(model.named_modules()) if isinstance(m, (AdapterLayer, TokenRows))}


def _place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for layer in layers.values():
        layer.train(model.training)
    model.update_modules(tree_unflatten(list(layers.items())))
    introduce(layers)
    fuse_mlps(model)


def _bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by path as they would be without adapters."""
    adapted = _wrappers(model)
    inside = tuple(path + "." for path in adapted)
    modules = {p: m for p, m in model.named_modules() if not (inside and p.startswith(inside))}
    return modules | {path: layer.base for path, layer in adapted.items()}


def _projections(adapter: Adapter, bases: dict[str, nn.Module]) -> tuple[mx.array, mx.array]:
    """VeRA's shared pair: the adapter's own, or drawn anew for the modules it adapts."""
    if SHARED[0] in adapter.weights:
        return tuple(adapter.weights[name] for name in SHARED)
    return draw_projections(adapter.config.rank, *shared_dims(bases.values()), adapter.config.projection_prng_key)


# Whole parameters: modules_to_save, biases, and all of a "full" adapter.


def _whole_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names and of everything in them that holds parameters."""
    named = select_named(model, dict.fromkeys(config.modules_to_save or ()))
    modules = dict(model.named_modules())
    inside = [p for p in modules if any(p == name or p.startswith(name + ".") for name in named)]
    return [path for path in reversed(inside) if own_arrays(modules[path])]


def _biased(bare: dict[str, nn.Module], config: AdapterConfig, adapted: list[str]) -> list[str]:
    """Paths of the modules whose bias is trained."""
    paths = {"none": [], "all": list(reversed(bare)), "lora_only": adapted}[config.bias]
    found = [path for path in paths if isinstance(bare[path].get("bias"), mx.array)]
    if config.bias != "none" and not found:
        where = "the model has" if config.bias == "all" else "the adapted layers have"
        raise AdapterError(
            f"bias {config.bias!r}: {where} none to train",
            "Leave bias out; an update gets a bias of its own by lora_bias.",
        )
    return found


def _make_whole(
    model: nn.Module, state: _State, names: list[tuple[str, str]], values: dict[tuple[str, str], mx.array] | None = None
) -> None:
    """Make these parameters trainable, with ``values`` in place of their own; remember in ``state`` what they were."""
    bare = _bare_modules(model)
    for path in dict.fromkeys(path for path, leaf in names if leaf == "weight"):
        base = bare[path]
        one_sided = state.config.embedding_side == "input" and kind(base) == "embedding"
        if one_sided or is_quantized(base):
            weight = dense_weight(base, base_dtype(base) or _model_dtype(model))
            made = UntiedEmbedding(base, weight) if one_sided else dense_module(base, weight, weight.dtype)
            made.train(model.training)
            state.modules[path], bare[path] = base, made.freeze()
            if (layer := _wrappers(model).get(path)) is not None:  # adapted as well: below the adapter
                layer[layer.slot] = made
            else:
                model.update_modules(tree_unflatten([(path, made)]))
    for path, leaf in names:
        module = bare[path]
        if path not in state.modules:
            state.arrays[path, leaf] = module[leaf]
        if values is not None:
            module[leaf] = values[path, leaf].astype(module[leaf].dtype)
        module.unfreeze(recurse=False, keys=leaf)
    state.whole = list(names)
    object.__setattr__(model, "_mlx_lora_state", state)


def dense_module(base: nn.Module, weight: mx.array, dtype: mx.Dtype) -> nn.Module:
    """A plain layer of ``base``'s kind with ``weight`` and ``base``'s bias, frozen."""
    which = kind(base)
    if not is_quantized(base):
        made = copy.copy(base)
    elif which == "linear":
        made = nn.Linear(1, 1, bias=False)
    elif which == "embedding":
        made = nn.Embedding(1, 1)
    else:
        from mlx_lm.models.switch_layers import SwitchLinear

        made = SwitchLinear(1, 1, 1, bias=False)
    made.weight = weight.astype(dtype)
    if "bias" in base:
        made.bias = base.bias
    made.freeze()
    return made


def _unfreeze(model: nn.Module, config: AdapterConfig) -> list[str]:
    if config.keys is not None or config.rank_pattern or config.scale_pattern or config.alpha_pattern:
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
        raise ModelError(
            "the model was not loaded by mlx_lora.load: its config and tokenizer are not known",
            "Load it with mlx_lora.load(path_or_repo).",
        )
    if _wrappers(model) or (_state(model) is not None and _state(model).config.method != "full"):
        raise ModelError("the model has adapters on it", "Merge them with fuse(model), or take them off.")
    from mlx_lm.utils import save_config
    from mlx_lm.utils import save_model as save_weights

    def fill(temporary: Path) -> None:
        save_weights(temporary, stored_names(model))
        save_config(saved_config(model, base.config), temporary / "config.json")

    return write_model_folder(folder, base.folder, fill, overwrite)


def write_model_folder(folder: Path, base: Path, fill: Callable[[Path], None], overwrite: bool = False) -> Path:
    """A folder with what ``fill`` writes into it and the tokenizer's and other small files of the folder ``base``.

    It appears whole or not at all. Raises: ModelError.
    """
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise ModelError(f"{folder}: is there already", "Choose another folder, or add --force.")
    if folder.exists() and base.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{folder}: the base model itself lies there", "Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for pattern in _BESIDE:
            for file in base.glob(pattern):
                if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, temporary / file.name)
        fill(temporary)
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
    settings, nf4 = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            nf4[path] = module
        elif is_quantized(module):
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
    if nf4:
        config["quantization_config"] = nf4_config(model, nf4)
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
