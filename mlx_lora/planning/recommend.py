"""Chooses the settings of a run for a model, its data and this machine, and plans it with them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..base.names import BaseModel
from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..config.options import is_set
from ..data import iterations
from ..device import is_cpu, memory_limit
from ..errors import ConfigError, DataError, MLXLoRAError
from ..training.packing_checks import check_model
from .bare import base_named, folder_of
from .estimate import Estimator
from .machines import Variant, fits, variants
from .plan import Plan, plan_of, read_rows
from .recipe import as_yaml, chosen_settings, epochs_for, rhythm
from .rows import epoch_of


def recommend(
    model: str | Path, data: DataConfig, *, adapter_path: str = "adapters", trust_remote_code: bool = False
) -> tuple[str, Plan]:
    """A configuration for ``train -c`` as YAML, and its plan. The run fits into the memory of this machine.

    Raises: DataError without a tokenizer or training rows; ConfigError where nothing that was tried fits.
    """
    base, notes = base_named(model), []
    folder = folder_of(base)
    try:
        rows = read_rows(folder, data, trust_remote_code, notes)
    except DataError as error:
        if "preference row" in error.message:
            raise DataError(
                "the rows are preferences (chosen, rejected), for which no settings are chosen",
                "Start from examples/recipes/dpo.yaml, and plan it: mlx-lora plan -c FILE.",
            ) from None
        raise
    if rows is None:
        raise DataError(notes[-1], "Name a model folder that has its tokenizer.")
    masks = data.mask_prompt or any(
        not example.mask[1:].all() for example in _with_prompts(folder, data, trust_remote_code)
    )
    size = min(4, len(rows)) if rows.widths[-1] > 512 else min(8, len(rows))
    chosen = chosen_settings(rows, masks, _packs(base, data.max_seq_length), TrainConfig(batch_size=size))
    adapter, train = AdapterConfig(**chosen["adapter"]), TrainConfig(batch_size=size, **chosen["train"])
    longest, optimizer = epoch_of(rows, train).longest, OptimizerConfig(**chosen["optimizer"])
    limit = memory_limit()
    fitting = _fitting(base, optimizer, Variant(adapter, train, length=longest), limit)
    train, adapter = fitting.train, fitting.adapter
    train = replace(train, iters=None, epochs=epochs_for(len(rows)))
    epoch, iters = epoch_of(rows, train), iterations(train, rows)
    steps = math.ceil(iters / train.grad_accumulation_steps)
    settings: dict[str, Any] = {
        "model": str(model),
        "data": data.data,
        "adapter_path": adapter_path,
        "fine_tune_type": "lora",
        "num_layers": adapter.num_layers,
        "rank": adapter.rank,
        "alpha": chosen["adapter"]["alpha"],
        **chosen["optimizer"],
        "warmup": max(1, min(100, steps // 10)),
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "grad_accumulation_steps": train.grad_accumulation_steps,
        "max_seq_length": data.max_seq_length,
        "mask_prompt": masks,
        **_given(data),
        **({"trust_remote_code": True} if trust_remote_code else {}),
        "val_batches": 25,
        "steps_per_eval": rhythm(epoch.batches, iters),
        "save_every": rhythm(epoch.batches, iters),
        **{name: True for name in ("pack", "grad_checkpoint") if getattr(train, name)},
        "seed": 0,
    }
    plan = plan_of(base, str(model), rows, data.max_seq_length, adapter, optimizer, train, notes=notes)
    machine = f"this machine, on which MLX can use {limit / 1e9:.1f} GB"
    return as_yaml(plan, settings, machine), plan


def _given(data: DataConfig) -> dict[str, Any]:
    """The other settings of the data that are not the default: without them the file would read other rows."""
    names = [field.name for field in fields(DataConfig) if field.name not in ("data", "mask_prompt", "max_seq_length")]
    return {name: getattr(data, name) for name in names if is_set(data, name)}


def _with_prompts(folder: Path, data: DataConfig, trust_remote_code: bool) -> list[Any]:
    """A few rows read with their prompts masked; none of plain text, whose rows have no prompt."""
    try:
        rows = read_rows(folder, replace(data, mask_prompt=True), trust_remote_code, [])
    except MLXLoRAError:
        return []
    return [rows[i] for i in range(min(8, len(rows)))]


def _packs(base: BaseModel, width: int) -> bool:
    try:
        check_model(base.model, width)
    except MLXLoRAError:
        return False
    return True


def _fitting(base: BaseModel, optimizer: OptimizerConfig, asked: Variant, limit: int) -> Variant:
    """The first variant that fits without another base or shorter rows."""
    with Estimator(base, optimizer) as estimate:
        for variant in variants(asked, True, 1):  # neither another base nor fewer layers
            if variant.length == asked.length and fits(estimate(variant, not is_cpu()).parts.peak, limit):
                return variant
    raise ConfigError(
        f"{base.name}: nothing that was tried fits into the {limit / 1e9:.1f} GB that MLX can use here",
        "Use a model with 4-bit weights, or a smaller one: mlx-lora quantize makes one.",
    )
