"""LoRA+: B learns faster than A (arXiv:2402.12354), in the groups of PEFT's ``create_loraplus_optimizer``.

    group        parameters                                      learning rate            weight decay
    A            all others                                      rate                     loraplus_weight_decay
    embedding    the low-rank matrices of embeddings             loraplus_lr_embedding    loraplus_weight_decay
    B            ``lora_b``, and every vector                    rate * ratio             loraplus_weight_decay
    B, no decay  biases and LayerNorms                           rate * ratio             0

Vectors are DoRA's magnitudes, VeRA's lambdas, biases and norms; for experts they are the rows of a matrix. A schedule
scales all rates in proportion. It works with any optimizer; the optimizer's ``weight_decay`` is set to the group's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
from mlx.utils import tree_flatten

from ..config import OptimizerConfig
from ..errors import ConfigError

EMBEDDING_RATE = 1e-6
_EXPERT_VECTORS = ("m", "vera_lambda_d", "vera_lambda_b")  # [experts, n]: a vector for each


def group_of(path: str, ndim: int, embeddings: set[str], norms: set[str]) -> str:
    """The group of the parameter at ``path``: ``A``, ``embedding``, ``B`` or ``B, no decay``.

    Args:
        embeddings, norms: paths of the model's embeddings and norms.
    """
    module, _, leaf = path.rpartition(".")
    if _of_embedding(path, embeddings):
        return "embedding"
    if leaf == "lora_b" or ndim == 1 or leaf in _EXPERT_VECTORS:
        return "B, no decay" if "bias" in path or module in norms else "B"
    return "A"


def _of_embedding(path: str, embeddings: set[str]) -> bool:
    module, _, leaf = path.rpartition(".")
    return module in embeddings and leaf in ("lora_a", "lora_b")


def loraplus_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    rate: float | Callable[[mx.array], mx.array],
    make: Callable[[str, Any, dict], opt.Optimizer],
) -> opt.MultiOptimizer:
    """A ``MultiOptimizer`` with an optimizer for each group, of the kind that ``config`` names.

    Args:
        rate: the learning rate of group A, as ``build_schedule`` returns it.
        make: makes an optimizer from (its name, the rate, further arguments).

    Muon is for matrices. AdamW trains the other parameters of the same group.
    """
    embeddings = {path for path, module in model.named_modules() if hasattr(module, "as_linear")}
    norms = {path for path, module in model.named_modules() if _is_norm(module)}
    paths = [path for path, _ in tree_flatten(model.trainable_parameters())]
    if config.loraplus_lr_embedding is not None and paths and not any(_of_embedding(p, embeddings) for p in paths):
        raise ConfigError("loraplus_lr_embedding has no effect: no embedding is adapted", "Leave it out.")
    first = config.learning_rate
    if isinstance(config.lr_schedule, dict) and config.lr_schedule.get("arguments"):
        first = float(config.lr_schedule["arguments"][0])  # mlx-lm's mapping has the rate there
    decay = config.loraplus_weight_decay or 0.0
    of_embeddings = EMBEDDING_RATE if config.loraplus_lr_embedding is None else config.loraplus_lr_embedding
    groups = {
        "A": (1.0, decay),
        "embedding": (of_embeddings / first, decay),
        "B": (config.loraplus_lr_ratio, decay),
        "B, no decay": (config.loraplus_lr_ratio, 0.0),
    }
    kinds = ["muon", "adamw"] if config.optimizer == "muon" else [config.optimizer]
    members, filters = [], []
    for group, (factor, weight_decay) in groups.items():
        for kind in kinds:
            members.append(make(kind, scaled(rate, factor), {"weight_decay": weight_decay}))

            def accepts(path, weight, group=group, kind=kind):
                trainable = kind != "muon" or weight.ndim == 2
                return trainable and group_of(path, weight.ndim, embeddings, norms) == group

            filters.append(accepts)
    return opt.MultiOptimizer(members, filters[:-1])  # the last optimizer takes what no filter accepts


def scaled(rate: float | Callable, factor: float) -> float | Callable:
    """``rate`` times ``factor``, a number or a function of the step."""
    if factor == 1:
        return rate
    return (lambda step: factor * rate(step)) if callable(rate) else factor * rate


def faults_of(config: OptimizerConfig, takes_decay: bool, own_decay: bool, own_rate: bool) -> list[str]:
    """The faults of the LoRA+ settings for this optimizer."""
    faults = []
    if own_rate:
        faults.append("adafactor with relative_step chooses its own learning rate, which LoRA+ cannot set")
    if own_decay:
        faults.append("LoRA+ sets the weight_decay of each group: set loraplus_weight_decay, not optimizer_config")
    if config.loraplus_weight_decay and not takes_decay:
        faults.append(f"loraplus_weight_decay: {config.optimizer} has no weight decay; adamw has")
    return faults


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)  # not RMSNorm: PEFT uses transformers' list, which has LayerNorm only
