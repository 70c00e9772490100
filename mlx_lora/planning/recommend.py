"""Chooses the settings of a run for a model, its data and this machine, and plans it with them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..base.names import BaseModel
from ..config import (
    LABELS,
    TOKENS,
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    as_config,
    preference_of,
)
from ..config.options import is_set
from ..data import iterations
from ..device import is_cpu, memory_limit
from ..errors import ConfigError, DataError, MLXLoRAError
from ..training.packing_checks import check_model
from .bare import base_named, folder_of
from .estimate import Estimator
from .machines import Variant, fits, variants
from .plan import Plan, plan_of, read_sets
from .recipe import as_yaml, chosen_settings, epochs_for, rhythm
from .rows import epoch_of


def recommend(
    model: str | Path,
    data: DataConfig,
    *,
    options: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    processes: int = 1,
    trust_remote_code: bool = False,
) -> tuple[str, Plan]:
    """A configuration for ``train -c`` as YAML, and its plan. The run fits into the memory of this machine.

    Args:
        options: train's options that the user gave, as in YAML; they are kept.
        adapter, optimizer, train: the fields of these configs among ``options``.

    Raises: DataError without a tokenizer or training rows; ConfigError if nothing that was tried fits.
    """
    base, notes, options = base_named(model), [], options or {}
    given = {"adapter": adapter or {}, "optimizer": optimizer or {}, "train": train or {}}
    loss, folder = given["train"].get("loss", TrainConfig.loss), folder_of(base)
    sets = read_sets(folder, data, trust_remote_code, notes, loss)
    if sets is None:
        raise DataError(notes[-1], "Name a model folder that has its tokenizer.")
    rows = sets.train
    imitates = preference_of(loss).rows == TOKENS
    masks = data.mask_prompt or (imitates and "mask_prompt" not in options and _masks(folder, data, trust_remote_code))
    size = _batch_size(rows, loss, processes)
    size = given["train"].get("batch_size", size)
    epoch = epoch_of(rows, TrainConfig(batch_size=size, loss=loss))
    chosen = chosen_settings(epoch, imitates and _packs(base, data.max_seq_length), given, loss)
    asked = Variant(
        as_config(AdapterConfig, chosen["adapter"], "adapter"),
        as_config(TrainConfig, {"batch_size": size, **chosen["train"]}, "train"),
    )
    optimizer = as_config(OptimizerConfig, chosen["optimizer"], "optimizer")
    asked, limit = replace(asked, length=epoch_of(rows, asked.train).longest), memory_limit()
    fitting = _fitting(base, optimizer, asked, limit, given["train"].keys(), processes)
    train = fitting.train
    if not given["train"].keys() & {"iters", "epochs"}:
        train = replace(train, iters=None, epochs=epochs_for(len(rows), loss))
    epoch, iters = epoch_of(rows, train), iterations(train, rows)
    if "warmup" not in given["optimizer"] and chosen["optimizer"].get("lr_schedule") == "cosine_decay":
        chosen["optimizer"]["warmup"] = max(1, min(100, math.ceil(iters / train.grad_accumulation_steps) // 10))
    settings: dict[str, Any] = {
        "model": str(model),
        **({"hf_dataset": data.hf_dataset} if data.hf_dataset else {"data": data.data}),
        "train": True,
        "adapter_path": "adapters",
        **{"fine_tune_type" if n == "method" else n: v for n, v in chosen["adapter"].items()},
        **chosen["optimizer"],
        **({"epochs": train.epochs} if train.epochs else {"iters": train.iters}),
        "batch_size": train.batch_size,
        "grad_accumulation_steps": train.grad_accumulation_steps,
        "max_seq_length": data.max_seq_length,
        **({"mask_prompt": masks} if imitates else {}),
        **_given(data),
        **({"trust_remote_code": True} if trust_remote_code else {}),
        **chosen["train"],
        "val_batches": 25,
        "steps_per_eval": rhythm(epoch.batches, iters),
        "save_every": rhythm(epoch.batches, iters),
        **({"grad_checkpoint": True} if train.grad_checkpoint else {}),
        "seed": 0,
    }
    settings |= options
    if loss == TrainConfig.loss and "loss" not in options:
        del settings["loss"]
    plan = plan_of(
        base, str(model), sets, data.max_seq_length, fitting.adapter, optimizer, train, processes, notes=notes
    )
    machine = f"this machine, on which MLX can use {limit / 1e9:.1f} GB"
    return as_yaml(plan, settings, machine, options), plan


def _batch_size(rows: Any, loss: str, processes: int) -> int:
    """4 rows, or 8 short ones, but not more than there are; a multiple of the number of processes."""
    least = processes * (2 if preference_of(loss).rows == LABELS else 1)
    size = min(4 if rows.widths[-1] > 512 else 8, len(rows))
    return max(least, size // least * least)


def _given(data: DataConfig) -> dict[str, Any]:
    """The other non-default data settings; without them the file would read other rows."""
    names = [
        f.name for f in fields(DataConfig) if f.name not in ("data", "hf_dataset", "mask_prompt", "max_seq_length")
    ]
    return {name: getattr(data, name) for name in names if is_set(data, name)}


def _masks(folder: Path, data: DataConfig, trust_remote_code: bool) -> bool:
    """Whether the rows have prompts to mask."""
    return any(not example.mask[1:].all() for example in _with_prompts(folder, data, trust_remote_code))


def _with_prompts(folder: Path, data: DataConfig, trust_remote_code: bool) -> list[Any]:
    """A few rows read with masked prompts; none for plain text, whose rows have no prompt."""
    try:
        rows = read_sets(folder, replace(data, mask_prompt=True), trust_remote_code, []).train
    except MLXLoRAError:
        return []
    return [rows[i] for i in range(min(8, len(rows)))]


def _packs(base: BaseModel, width: int) -> bool:
    try:
        check_model(base.model, width)
    except MLXLoRAError:
        return False
    return True


def _fitting(
    base: BaseModel, optimizer: OptimizerConfig, asked: Variant, limit: int, given: Collection[str], processes: int
) -> Variant:
    """The first variant that fits with the same base, row lengths and ``given`` options."""

    def keeps(variant: Variant) -> bool:
        same = all(getattr(variant.train, name) == getattr(asked.train, name) for name in given)
        return same and variant.length == asked.length

    with Estimator(base, optimizer, processes) as estimate:
        # same base, same layers
        for variant in filter(keeps, variants(asked, True, 1, processes)):
            if fits(estimate(variant, not is_cpu()).parts.peak, limit):
                return variant
    kept = f" with {', '.join(sorted(given))} as given" if given else ""
    raise ConfigError(
        f"{base.name}: nothing that was tried{kept} fits into the {limit / 1e9:.1f} GB that MLX can use here",
        "Use a model with 4-bit weights, or a smaller one: mlx-lora quantize makes one.",
    )
