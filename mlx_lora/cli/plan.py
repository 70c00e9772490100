"""``plan``: estimates of a run without loading weights, and a configuration that fits."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import click

from ..base.writing import write_new_text
from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..errors import ConfigError
from . import console
from .options import (
    PATTERNS,
    build,
    config_options,
    flag_of,
    given_flags,
    json_option,
    model_option,
    trust_option,
    values_of,
    yaml_option,
)
from .sections import SectionedCommand
from .train import train as train_command
from .yaml_files import settle

_NOT_TRAIN = ("model", "data", "processes", "write", "trust_remote_code", "as_json")  # or written by themselves


@click.command(cls=SectionedCommand)
@model_option(default="Qwen/Qwen3-0.6b", show_default=True)
@config_options(DataConfig, data=None)
@config_options(AdapterConfig)
@config_options(OptimizerConfig)
@config_options(TrainConfig)
@click.option("--processes", default=1, show_default=True, metavar="N", help="Plan for N processes (mlx.launch -n N).")
@click.option(
    "--write",
    metavar="FILE",
    help="Choose settings for these data and this machine; write them to a new YAML file.",
)
@yaml_option("hf_dataset", passes=lambda: {param.name for param in train_command.params})
@trust_option
@json_option
@click.pass_context
def plan(ctx: click.Context, **params: Any):
    """Estimate a run before it starts: memory, steps, time, and the Macs that it fits on.

    Takes train's options and YAML files. No weights are loaded: the training step is traced with the shapes in
    config.json and in the headers of the weight files. Without --data, every row counts as --max-seq-length tokens. The
    figures for Macs are estimates. If a run does not fit on a Mac, the table names options to add.

    --write chooses settings for your data and this machine, also for preferences (--loss dpo). Options that you give,
    here or in a file (-c), are kept.

    --json prints one object with the fields of mlx_lora.planning.plan.Plan: memory in bytes, seconds, and null for
    unknown values.

    \b
    mlx-lora plan --model mlx-community/Qwen3-8B-4bit --data my_data --batch-size 2
    mlx-lora plan --model Qwen/Qwen3-0.6B --data my_data --write run.yaml
    mlx-lora train -c run.yaml
    """
    settle(ctx, params)
    if params["write"] is None and (idle := [flag_of(ctx, name) for name in given_flags(ctx) if name in _OF_TRAIN]):
        console.note(f"{', '.join(idle)}: no effect on a plan")
    hf_dataset = (ctx.default_map or {}).get("hf_dataset")
    data = None
    if params["data"] or hf_dataset:
        values = {**params, "data": params["data"] or DataConfig.data}
        data = build(DataConfig, values, hf_dataset=hf_dataset)
    if params["write"] is not None:
        return _write(ctx, params, data)
    from ..planning.plan import plan as make_plan
    from ..runs.metrics import load_metrics

    train = build(TrainConfig, params)
    load_metrics(train.metric)  # refused here as by train
    found = make_plan(
        params["model"],
        data,
        adapter=build(AdapterConfig, params),
        optimizer=build(OptimizerConfig, params),
        train=train,
        processes=params["processes"],
        max_seq_length=params["max_seq_length"],
        trust_remote_code=params["trust_remote_code"],
    )
    console.report_event(found) if params["as_json"] else _show(found)


# Options of train that do not affect a plan; they are accepted so that a train command can be planned unchanged.
_OF_TRAIN = {param.name: param for param in train_command.params}
for _name in [param.name for param in plan.params]:
    _OF_TRAIN.pop(_name, None)
for _param in _OF_TRAIN.values():
    _param = copy.copy(_param)
    _param.hidden = True
    plan.params.append(_param)


def _write(ctx: click.Context, params: dict[str, Any], data: DataConfig | None) -> None:
    file = Path(params["write"])
    if file.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--write {file}: does not end in .yaml", "Name a file that ends in .yaml.")
    if data is None:
        raise ConfigError("--write chooses the settings from the data, and no data are named", "Add --data FOLDER.")
    if os.path.lexists(file):
        raise ConfigError(f"{file}: exists already", "Choose another name with --write, or remove the file.")
    from ..planning.recommend import recommend

    given = _given(ctx, params)
    text, found = recommend(
        params["model"],
        data,
        options={name: _in_yaml(name, value) for name, value in given.items()},
        adapter=values_of(AdapterConfig, given),
        optimizer=values_of(OptimizerConfig, given),
        train=values_of(TrainConfig, given),
        processes=params["processes"],
        trust_remote_code=params["trust_remote_code"],
    )
    write_new_text(file, text)
    if params["as_json"]:
        return console.report_event(found)
    _show(found)
    console.note(f"Wrote {file}. Next: mlx-lora train -c {file}")


def _given(ctx: click.Context, params: dict[str, Any]) -> dict[str, Any]:
    """The options of train given by a flag or the file, except those that ``settle`` has reset."""
    names = (*given_flags(ctx), *(name for name in ctx.default_map or {} if name in params))
    settled = [name for name in dict.fromkeys(names) if params[name] == ctx.params[name]]
    return {name: params[name] for name in settled if name not in _NOT_TRAIN and params[name] is not None}


def _in_yaml(name: str, value: Any) -> Any:
    """The value of an option for YAML: a repeated option's pairs become a mapping."""
    return dict(value) if name in (*PATTERNS, "trainable_token_indices") else value


def _show(found: Any) -> None:
    from ..planning.machines import MARGIN

    for text in found.notes:
        console.note(text)
    size, parts, epoch = console.gigabytes, found.memory, found.epoch
    share = 100 * found.trainable / found.parameters
    rows = [
        ("trainable", f"{found.trainable:,} of {found.parameters:,} parameters ({share:.3f} %)"),
        ("weights", size(parts.weights)),
        ("adapter", size(parts.adapter)),
        ("optimizer", size(parts.optimizer)),
        ("activations", size(parts.activations)),
        ("logits", size(parts.logits)),
        (
            "peak",
            f"{size(parts.peak)}; MLX can use {size(found.limit)} here: {_word(found)}",
        ),
    ]
    if kept := found.prefix:
        where = "in memory, part of the peak" if kept.place == "memory" else "in a file, not in memory"
        found_again = f"found for {100 * kept.reused:.0f} % of the rows that the run reads"
        rows += [("prefix", f"{size(kept.bytes)} of output of {kept.layers} frozen layers {where}; {found_again}")]
    if epoch:
        learned = f"{epoch.tokens:,} tokens, {epoch.learned_tokens:,} to learn, {100 * epoch.padding:.1f} % padding"
        rows += [("epoch", f"{epoch.rows:,} rows, {learned}, {epoch.batches:,} batches")]
    run = [] if found.iters is None else [f"{found.iters:,} iterations"]
    run += [] if found.epochs is None else [f"{found.epochs:g} epochs"]
    rows += [("run", ", ".join([*run, f"rows of up to {found.length} tokens"]))]
    if found.processes > 1:
        rows += [("processes", f"{found.processes}; the memory is per process, and a batch is divided among them")]
    if found.tokens_per_step:
        rows += [("tokens", f"{found.tokens_per_step:,} in an optimizer step, on average")]
    unknown = (
        "nor is the number of rows"
        if found.iters is None
        else "unknown on this machine until something was trained here"
    )
    time = f"about {console.seconds(found.seconds)}" if found.seconds else f"not known: {unknown}"
    rows += [("time", time)]
    for name, value in rows:
        console.data(f"{name:<12} {value}")
    if found.verdicts:
        margin = f"{100 * MARGIN:g} %"
        console.data(
            f"\nOn a Mac (estimated, not measured on a Mac; a run fits if {margin} more than its peak is free):"
        )
        console.data(
            console.table([_verdict(v) for v in found.verdicts], ("Mac", "MLX can use", "", "peak", "add to fit"))
        )


def _word(found: Any) -> str:
    return "fits" if found.fits else "may fit" if found.memory.peak <= found.limit else "too much"


def _verdict(v: Any) -> tuple[str, ...]:
    size = console.gigabytes
    word = "fits" if v.fits else "too small" if v.flags is None else "fits with"
    options = " ".join(v.flags or ()).replace("a 4-bit base ", "a 4-bit base, ")  # options that can be pasted
    return f"{v.machine} GB", size(v.working_set), word, size(v.peak), options
