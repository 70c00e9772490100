"""``plan --write``: a commented configuration for a model, its data and a machine, as YAML for ``train -c``."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from ..config import PREFERENCE_OPTIONS, TOKENS, TrainConfig, chooses_own_rate, first_rate, preference_of
from .plan import Plan
from .rows import Epoch

_PACK_FROM = 0.15  # minimum share of padding for packing
# (rows, epochs): the first that applies; few rows are repeated more often. Preferences overfit sooner.
_EPOCHS = ((500, 5), (2_000, 4), (10_000, 3), (50_000, 2))
_EPOCHS_OF_PREFERENCES = ((1_000, 3), (5_000, 2))
# LoRA learning rates for preference losses. dpo, orpo, cpo: from TRL's scripts of these names; ipo and kto: as dpo;
# simpo: ten times its authors' rate for full fine-tuning (arXiv:2405.14734).
_RATES = {"dpo": 5e-6, "ipo": 5e-6, "kto": 5e-6, "simpo": 1e-5, "orpo": 8e-5, "cpo": 8e-5}
_FULL_RATE = 0.1  # as a share of LoRA's learning rate
# A given option -> the options that it replaces, which are then not chosen.
_REPLACED = {
    "iters": ("epochs",),
    "scale": ("alpha",),
    "layers_to_transform": ("num_layers",),
    "lr_schedule": ("warmup",),
    "cache_prefix": ("pack",),
}


def epochs_for(rows: int, loss: str) -> int:
    """The number of epochs for ``rows`` rows."""
    table = _EPOCHS_OF_PREFERENCES if preference_of(loss).rows != TOKENS else _EPOCHS
    return next((epochs for most, epochs in table if rows < most), 1)


def chosen_settings(
    epoch: Epoch, packs: bool, given: dict[str, dict[str, Any]], loss: str
) -> dict[str, dict[str, Any]]:
    """The settings of ``adapter``, ``optimizer`` and ``train`` that do not depend on memory, except the given ones.

    Args:
        packs: the model can train packed rows. given: the fields of these three configs that stay.
    """
    rank, method = 8 if epoch.rows < 2_000 else 16, given["adapter"].get("method", "lora")
    rank = given["adapter"].get("rank", rank)
    rate = _RATES.get(loss, 2e-4 if epoch.rows < 10_000 else 1e-4) * (_FULL_RATE if method == "full" else 1)
    chosen = {
        "adapter": {"method": method, "num_layers": -1},
        "optimizer": {"optimizer": "adamw", "learning_rate": float(f"{rate:g}"), "lr_schedule": "cosine_decay"},
        "train": {"loss": loss},
    }
    if method in ("lora", "dora"):
        chosen["adapter"] |= {"rank": rank, "alpha": 2.0 * rank}
    if epoch.packed_padding is not None and packs and epoch.padding - epoch.packed_padding > _PACK_FROM:
        chosen["train"]["pack"] = True
    if preference_of(loss).options:
        chosen["train"] |= {"max_grad_norm": 1.0, **TrainConfig(loss=loss).preference_options()}
    own = given["optimizer"]
    if first_rate(own.get("lr_schedule")) is not None:
        del chosen["optimizer"]["learning_rate"]
    elif chooses_own_rate(own.get("optimizer", "adamw"), own.get("optimizer_config") or {}):
        del chosen["optimizer"]["learning_rate"], chosen["optimizer"]["lr_schedule"]
    names = {name for fields in given.values() for name in fields}
    dropped = {other for name in names for other in _REPLACED.get(name, ())}
    return {
        kind: {**{n: v for n, v in fields.items() if n not in dropped}, **given[kind]}
        for kind, fields in chosen.items()
    }


def as_yaml(plan: Plan, settings: dict[str, Any], machine: str, given: Collection[str]) -> str:
    """The configuration, with a reason next to each setting.

    Args:
        settings: train's settings, as in YAML. given: names of settings that the user gave.
        machine: the machine whose memory it was chosen for.
    """
    own = settings.keys() & set(given)
    why = {
        "loss": "learn which answer is preferred" if preference_of(settings.get("loss", "")).rows != TOKENS else "",
        **dict.fromkeys(PREFERENCE_OPTIONS, "TRL's default"),
        "max_grad_norm": "longer gradients are shortened to this norm",
        "num_layers": "all layers",
        "rank": "16 from 2,000 rows on",
        "alpha": "the update is scaled by alpha / rank",
        "learning_rate": _why_rate(settings),
        "lr_schedule": "falls to 0 at the end",
        "warmup": "optimizer steps over which the rate rises",
        "epochs": f"passes over the {plan.epoch.rows:,} rows, {plan.iters:,} iterations in all",
        "mask_prompt": "learn the answers only",
        "max_seq_length": f"the longest row has {plan.length} tokens",
        "batch_size": "rows of a batch",
        "grad_accumulation_steps": "batches of an optimizer step",
        "grad_checkpoint": "recompute activations, to fit into memory",
        "pack": "several rows in each sequence, because padding would be a large share",
        "steps_per_eval": f"{plan.epoch.batches / (settings.get('steps_per_eval') or 1):.2g} times an epoch",
        "save_every": "a checkpoint at every validation",
    }
    lines = [
        f"# For {plan.model}, to run with: mlx-lora train -c FILE",
        f"# Peak memory about {plan.memory.peak / 1e9:.2f} GB; chosen for {machine}.",
    ]
    for name, value in settings.items():
        text, reason = f"{name}: {_value(value)}", "as given" if name in own else why.get(name)
        lines.append(f"{text:<40}# {reason}" if reason else text)
    return "\n".join(lines) + "\n"


def _why_rate(settings: dict[str, Any]) -> str:
    if settings.get("fine_tune_type") == "full":
        return "a tenth of LoRA's, because all weights are trained"
    if settings.get("loss") in _RATES:
        return "lower than for other fine-tuning, because preferences overfit sooner"
    return "LoRA learns at ten times the rate of full fine-tuning"


def rhythm(batches: int, iters: int) -> int:
    """Iterations between validations: five per epoch, at least ten iterations apart, at least one in the run."""
    return max(1, min(iters, max(10, math.ceil(batches / 5))))


def _value(value: Any) -> str:
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:g}".partition("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if exponent else f"{value:g}"
    return json.dumps(value, ensure_ascii=False)
