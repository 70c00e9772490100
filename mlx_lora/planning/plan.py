"""``plan``: estimates of a run, without loading weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..base.names import BaseModel
from ..config import LABELS, AdapterConfig, DataConfig, OptimizerConfig, TrainConfig, as_config, preference_of
from ..data import iterations, load_dataset
from ..device import is_cpu, memory_limit
from ..errors import ConfigError, MLXLoRAError
from ..training.prefix_checks import check_settings
from . import speed
from .bare import base_named, folder_of, quantization_of
from .estimate import Estimate, Estimator, Frozen
from .machines import Variant, Verdict, fits, variants, verdicts
from .prefix import Prefix, prefix_of, with_prefix
from .rows import Epoch, epoch_of
from .step import Parts


@dataclass(frozen=True)
class Plan:
    """Estimates of a run. Memory is in bytes per process (per machine of a distributed run)."""

    model: str
    parameters: int  # of the model with its adapter; a quantized weight counts as one
    trainable: int
    memory: Parts
    limit: int  # bytes that MLX can use on this machine
    fits: bool  # whether it fits on this machine, with ``machines.MARGIN`` to spare
    epoch: Epoch | None  # None if the data are unknown
    length: int  # tokens of the widest batch
    iters: int | None  # None with ``epochs`` if the data are unknown
    epochs: float | None
    tokens_per_step: int | None  # mean per optimizer step, over all processes, without padding
    processes: int
    layers: int
    flops_per_step: float  # of a batch of mean length in this process, without attention
    seconds: float | None  # of the whole run; None if this machine has not been measured
    prefix: Prefix | None = None  # with ``cache_prefix``
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()


def plan(
    model: str | Path,
    data: str | Path | DataConfig | dict | None = None,
    *,
    adapter: AdapterConfig | dict | None = None,
    optimizer: OptimizerConfig | dict | None = None,
    train: TrainConfig | dict | None = None,
    processes: int = 1,
    max_seq_length: int | None = None,
    machines: bool = True,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a run: memory, steps, time, and the Macs that it fits on. No weights are loaded.

    The training step itself is traced, with the model's shapes from its config and its files' headers; so the memory
    follows from the operations that the run will evaluate.

    Args:
        model: a folder or repository; a folder with a ``config.json`` is enough.
        data: a DataConfig or its ``data``; without data, every row counts as ``max_seq_length`` tokens.
        max_seq_length: used if there are no data; 2048 by default.
        adapter, optimizer, train: the settings of the run, or a dict of them.
        processes: number in a distributed run (``mlx.launch -n``); ``batch_size`` is divided among them.
        machines: whether to find the Macs that the run fits on, which takes a few seconds more.

    Raises: ModelError, DataError, ConfigError, AdapterError.
    """
    data = DataConfig(data=str(data)) if isinstance(data, (str, Path)) else data
    data = as_config(DataConfig, data, "data") if isinstance(data, dict) else data
    adapter, optimizer = (
        as_config(AdapterConfig, adapter, "adapter"),
        as_config(OptimizerConfig, optimizer, "optimizer"),
    )
    train = as_config(TrainConfig, train, "train")
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ConfigError(f"processes must be at least 1, not {processes!r}", "Give the N of mlx.launch -n N.")
    if train.batch_size % processes:
        raise ConfigError(
            f"{train.batch_size} rows cannot be divided equally among {processes} processes",
            f"Set batch_size to a multiple of the number of processes, such as {4 * processes}.",
        )
    if max_seq_length is not None:
        DataConfig(max_seq_length=max_seq_length)  # raises the same errors as for the data of a run
    if train.cache_prefix != "none":
        check_settings(train.loss, processes)  # as train does
    base, sets, notes = base_named(model), None, []
    if data is None:
        length = DataConfig.max_seq_length if max_seq_length is None else max_seq_length
        notes.append(f"No data: every row counts as {length} tokens (max_seq_length)")
    if data is not None:
        sets = read_sets(folder_of(base), data, trust_remote_code, notes, train.loss)
    return plan_of(
        base,
        str(model),
        sets,
        data.max_seq_length if data else length,
        adapter,
        optimizer,
        train,
        processes,
        machines=machines,
        notes=notes,
    )


def plan_of(
    base: BaseModel,
    name: str,
    sets: Any,
    max_seq_length: int,
    adapter: AdapterConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    processes: int = 1,
    *,
    machines: bool = False,
    notes: list[str] | None = None,
) -> Plan:
    """As ``plan``, with complete settings, and with ``sets`` as the ``Splits`` of ``mlx_lora.data`` or None.

    Args:
        max_seq_length: tokens per row if there is no data set.
    """
    rows, notes = sets.train if sets is not None else None, list(notes or ())
    if rows is not None:
        train = replace(train, iters=iterations(train, rows), epochs=None)
    epoch = epoch_of(rows, train) if rows is not None else None
    length = epoch.longest if epoch else max_seq_length
    asked, here = Variant(adapter, train, length=length), not is_cpu()
    limit, table = memory_limit(), ()
    with Estimator(base, optimizer, processes) as estimate:
        found = estimate(asked, here)
        prefix = None
        if rows is None and found.frozen:
            notes.append("No data: the states that --cache-prefix keeps are not counted")
        elif found.frozen:
            prefix = prefix_of(found.frozen, sets, train, exact=not here)
        if machines:
            kept = partial(prefix_of, sets=sets, train=train, exact=False) if prefix else lambda frozen: None
            peak = partial(_peak, estimate, kept)
            table = verdicts(variants(asked, found.quantized, found.layers, processes), peak)
    parts = with_prefix(found.parts, prefix)
    padded = epoch.tokens / (1 - epoch.padding) / epoch.batches if epoch else train.batch_size * length
    flops = step_flops(found, train, padded, prefix) / processes
    rate = speed.measured(flops)
    seconds = None
    if rate and train.iters is not None:
        of_reference = reference_flops(found, train, epoch.tokens) / processes if epoch else 0.0
        seconds = (flops * train.iters + of_reference) / rate
    return Plan(
        model=name,
        parameters=found.parameters,
        trainable=found.trainable,
        memory=parts,
        limit=limit,
        fits=fits(parts.peak, limit),
        epoch=epoch,
        length=length,
        iters=train.iters,
        epochs=round(train.iters / epoch.batches, 2) if epoch else train.epochs,
        tokens_per_step=round(epoch.tokens / epoch.batches * train.grad_accumulation_steps) if epoch else None,
        processes=processes,
        layers=found.layers,
        flops_per_step=flops,
        seconds=seconds,
        prefix=prefix,
        verdicts=tuple(table),
        notes=tuple(notes),
    )


def step_flops(found: Estimate, train: TrainConfig, tokens: float, prefix: Prefix | None = None) -> float:
    """Operations of a step on ``tokens``, padding included; the mean over all epochs."""
    method = "full" if found.trainable > 0.5 * found.parameters else "lora"
    others = preference_of(train.loss).rows == LABELS  # each prompt is also read with another answer, forward only
    saved = found.frozen.flops * tokens * prefix.reused if prefix else 0.0
    return speed.step_flops(found.flops, tokens, method, train.grad_checkpoint) + others * found.flops * tokens - saved


def reference_flops(found: Estimate, train: TrainConfig, tokens: float) -> float:
    """Operations to compute the reference before training: one pass over the ``tokens`` of all rows."""
    needs = preference_of(train.loss)
    return found.flops * tokens * needs.reference * (2 if needs.rows == LABELS else 1)


def _peak(estimate: Estimator, kept: Callable[[Frozen | None], Prefix | None], variant: Variant) -> float:
    """Bytes on a Mac's GPU; infinite for settings that this model does not have, such as checkpointing."""
    try:
        found = estimate(variant, True)
        return with_prefix(found.parts, kept(found.frozen)).peak
    except MLXLoRAError:
        return math.inf


def suggestion(
    base: BaseModel, adapter: AdapterConfig, optimizer: OptimizerConfig, train: TrainConfig, found: Plan
) -> tuple[str, ...]:
    """The options with which the run of the plan ``found`` fits this machine; empty if nothing helps."""
    asked = Variant(adapter, train, length=found.length)
    with Estimator(base, optimizer, found.processes) as estimate:
        for variant in variants(asked, quantization_of(base.config) is not None, found.layers, found.processes)[1:]:
            try:
                if fits(estimate(variant, not is_cpu()).parts.peak + found.memory.kept, found.limit):
                    return variant.flags
            except MLXLoRAError:  # settings that this model does not have
                continue
    return ()


def read_sets(
    folder: Path, data: DataConfig, trust_remote_code: bool, notes: list[str], loss: str = TrainConfig.loss
) -> Any:
    """The training and validation sets as ``loss`` reads them; None, with a note, if there is no tokenizer."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        notes.append(f"{folder} has no tokenizer, so every row counts as {data.max_seq_length} tokens (max_seq_length)")
        return None
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(folder, {"trust_remote_code": trust_remote_code})
    kind = preference_of(loss).rows
    sets = load_dataset(data, tokenizer, ("train", "valid"), kind)  # without a validation set, rows are held out for it
    notes += [*sets.all_warnings(), *sets.all_notes()]
    return sets
