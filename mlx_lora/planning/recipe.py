"""``plan --write``: a commented configuration for a model, its data and a machine, as YAML for ``train -c``."""

from __future__ import annotations

import json
import math
from typing import Any

from ..config import TrainConfig
from .plan import Plan
from .rows import epoch_of

_PACK_FROM = 0.15  # share of padding that packing must save
# Rows -> epochs: few rows are seen more often. The first that applies.
_EPOCHS = ((500, 5), (2_000, 4), (10_000, 3), (50_000, 2))


def epochs_for(rows: int) -> int:
    """How often to see each of ``rows`` rows."""
    return next((epochs for most, epochs in _EPOCHS if rows < most), 1)


def chosen_settings(rows: Any, masks: bool, packs: bool, train: TrainConfig) -> dict[str, dict[str, Any]]:
    """Settings for a data set by its size, as far as they do not depend on memory: those of adapter and optimizer.

    Args:
        rows: the training set. masks: its rows have prompts or turns. packs: the model can train packed rows.
    """
    epoch = epoch_of(rows, train)
    pack = packs and epoch.padding - epoch.packed_padding > _PACK_FROM
    rank = 8 if epoch.rows < 2_000 else 16
    return {
        "adapter": {"method": "lora", "rank": rank, "alpha": 2.0 * rank, "num_layers": -1},
        "optimizer": {
            "optimizer": "adamw",
            "learning_rate": 2e-4 if epoch.rows < 10_000 else 1e-4,
            "lr_schedule": "cosine_decay",
        },
        "data": {"mask_prompt": masks},
        "train": {"pack": pack},
    }


def as_yaml(plan: Plan, settings: dict[str, Any], machine: str) -> str:
    """The configuration, with a reason beside each setting.

    Args:
        settings: of train, as in YAML.
        machine: for which memory it was chosen.
    """
    why = {
        "num_layers": "all layers",
        "rank": "16 from 2,000 rows on",
        "alpha": "the update is scaled by alpha / rank",
        "learning_rate": "LoRA learns at ten times the rate of full fine-tuning",
        "lr_schedule": "falls to 0 at the end",
        "warmup": "optimizer steps over which the rate rises",
        "epochs": f"passes over the {plan.epoch.rows:,} rows, {plan.iters:,} iterations in all",
        "mask_prompt": "learn the answers only",
        "max_seq_length": f"the longest row has {plan.length} tokens",
        "batch_size": "rows of a batch",
        "grad_accumulation_steps": "batches of an optimizer step",
        "grad_checkpoint": "recompute activations, to fit into memory",
        "pack": "several rows in each sequence, because padding would be a large share",
        "steps_per_eval": f"{plan.epoch.batches / settings['steps_per_eval']:.2g} times an epoch",
        "save_every": "a checkpoint at every validation",
    }
    lines = [
        f"# For {plan.model}, to run with: mlx-lora train -c FILE",
        f"# Peak memory about {plan.memory.peak / 1e9:.2f} GB; chosen for {machine}.",
        "train: true",
    ]
    for name, value in settings.items():
        text = f"{name}: {_value(value)}"
        lines.append(f"{text:<40}# {why[name]}" if name in why else text)
    return "\n".join(lines) + "\n"


def rhythm(batches: int, iters: int) -> int:
    """Iterations between validations: five in an epoch, at least ten iterations apart, and one in the run at least."""
    return max(1, min(iters, max(10, math.ceil(batches / 5))))


def _value(value: Any) -> str:
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:g}".partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if exponent else f"{value:g}"
    return json.dumps(value, ensure_ascii=False)
