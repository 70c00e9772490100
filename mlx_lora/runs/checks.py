"""Checks before a model is loaded: settings of a run that contradict each other or cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.forward_paths import check_trainable
from ..base.loading import resolve
from ..base.modules import layer_paths
from ..base.names import BaseModel
from ..config import ITERS, REPORTERS, TOKENS, AdapterConfig, DataConfig, preference_of
from ..config.options import is_set
from ..data import Splits
from ..data.sources import find
from ..errors import AdapterError, ConfigError, ModelError
from ..formats.files import read_safetensors
from ..init import init_of
from ..layers import check_rank
from ..model.full_parameters import modules_to_save
from ..model.targets import check_patterns, select, select_named
from ..training import build_optimizer
from ..training.best import check_patience
from ..training.evaluation import check_rows
from ..training.losses import check_takes_packed, loss_named
from ..training.packing_checks import check_model
from .metrics import load_metrics


def check_settings(settings: Any) -> None:
    """Raise for the first group of faults in the ``Settings`` of a run. Reads no model and no data."""
    adapter, optimizer, train = settings.adapter, settings.optimizer, settings.train
    adapter.check_used()
    loss_named(train.loss)
    for split in ("train", "valid", "test"):
        if isinstance(settings.data, Splits) and (rows := getattr(settings.data, split)) is not None:
            check_rows(rows, train.loss)
    faults: dict[str, str] = {}  # with their hints
    init, one = init_of(adapter), "Choose one of the two."
    if settings.resume and settings.resume_adapter_file:
        faults["resume and resume_adapter_file contradict each other"] = one
    if settings.resume_adapter_file and adapter.init != "default":
        faults[f"resume_adapter_file and init {adapter.init!r} contradict each other"] = one
    if settings.init_reference is not None and not init.needs_reference:
        faults[f"init_reference is for init 'loftq', not for {adapter.init!r}"] = "Leave init_reference out."
    if init.needs_reference and settings.init_reference is None:
        faults["init 'loftq' needs the model before it was quantized"] = (
            "Name it with --init-reference, or make base and adapter with mlx-lora quantize --loftq-rank."
        )
    if optimizer.loraplus_lr_ratio is not None and adapter.method in ("full", "vera"):
        fault = f"loraplus_lr_ratio is for methods that train A and B, not for {adapter.method}"
        faults[fault] = "Leave the options of LoRA+ out."
    if preference_of(train.loss).rows != TOKENS:
        if adapter.init == "lora_ga":
            faults[f"init 'lora_ga' follows the gradient of cross_entropy, not of {train.loss}"] = "Use another init."
        faults |= masks_without_effect(settings.data, train.loss)
    if unknown := [name for name in settings.report_to if name not in REPORTERS]:
        faults[f"report_to {', '.join(unknown)} is not known"] = f"Known: {', '.join(REPORTERS)}."
    if settings.project_name and not {*settings.report_to} - {"tensorboard"}:  # TensorBoard has no projects
        projects = ", ".join(name for name in REPORTERS if name != "tensorboard")
        faults["project_name needs report_to"] = f"Set report_to ({projects}), or leave project_name out."
    if faults:
        raise ConfigError("\n".join(faults), "\n".join(dict.fromkeys(faults.values())))
    if train.iters is not None:  # else it follows from the data
        check_patience(train, train.iters)
    # A module without parameters is enough to check the optimizer's arguments and the schedule.
    build_optimizer(optimizer, -(-(train.iters or ITERS) // train.grad_accumulation_steps), nn.Module())
    load_metrics(train.metric)
    if settings.resume_adapter_file:
        check_initial_weights(Path(settings.resume_adapter_file), adapter)


def masks_without_effect(data: Any, loss: str) -> dict[str, str]:
    """Faults, with hints, of options that mask prompts although the loss takes preferences."""
    if preference_of(loss).rows == TOKENS or not isinstance(data, DataConfig):
        return {}
    masks = [name for name in ("mask_prompt", "mask_turns") if is_set(data, name)]
    why = f"has no effect with loss {loss!r}, which compares answers, never prompts"
    return {f"{name} {why}": f"Leave {name} out." for name in masks}


def check_packing(settings: Any) -> None:
    """Refuse packing for a model that, by its config, does not support it; ``train`` checks the rest.

    Raises: ConfigError.
    """
    if not settings.train.pack:
        return
    check_takes_packed(settings.train.loss)
    if not isinstance(settings.model, tuple):
        try:
            bare = BaseModel(resolve(settings.model)).model
        except ModelError:  # loading reports what is wrong
            return
        check_model(bare, settings.data.max_seq_length if isinstance(settings.data, DataConfig) else 0)


def check_data(data: Any, splits: tuple[str, ...]) -> None:
    """Refuse data that does not exist and cannot be a repository's name. Raises: DataError."""
    named = isinstance(data, DataConfig) and not data.hf_dataset
    if named and not Path(data.data).expanduser().exists() and data.data.count("/") != 1:
        find(data, splits, [])


def check_initial_weights(file: Path, adapter: AdapterConfig) -> None:
    """Refuse a file that a run with ``adapter`` cannot start from. Reads only names of arrays."""
    if not file.is_file():
        where = f"Name {file / 'adapters.safetensors'}." if (file / "adapters.safetensors").is_file() else ""
        raise ConfigError(f"{file}: no such file", where or "resume_adapter_file takes an adapters.safetensors.")
    names = read_safetensors(file)
    if any(name.startswith("base_model.model.") for name in names):
        raise ConfigError(
            f"{file}: is PEFT's, and resume_adapter_file takes mlx-lm's adapters.safetensors",
            f"Convert it first: mlx-lora convert {file.parent} FOLDER --to mlx-lm. Then name its adapters.safetensors.",
        )


def check_modules(model: Any, adapter: AdapterConfig) -> None:
    """Refuse a model that cannot be trained, and keys, patterns, ranks and layers that it does not have.

    Reads only its config. ``attach`` repeats these and more checks on the loaded model. If mlx-lm's class cannot be
    built, or if the output head is named, which may not be a module of the class, only ``attach`` checks.
    """
    named = (*(adapter.keys or ()), *(adapter.modules_to_save or ()))
    if isinstance(model, tuple) or any("lm_head" in name for name in named):
        return
    try:
        bare = BaseModel(resolve(model)).model
    except ModelError:  # loading reports what is wrong
        return
    check_trainable(bare)
    if adapter.method == "full":
        adapter.last_layers(len(layer_paths(bare)))
        return
    modules_to_save(bare, adapter)
    select_named(bare, adapter.trainable_token_indices)
    chosen = select(bare, adapter)
    check_patterns(adapter, chosen)
    for path, module in chosen.items() if adapter.method != "vera" else ():
        try:
            check_rank(module, adapter.rank_of(path))
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}", error.hint) from None
