"""``tables``: the parameter and memory tables of the LoRA papers, and the same counts for any model."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..config import AdapterConfig
from ..errors import ConfigError
from . import console
from .options import build, config_options, flag_of, given_flags, json_option, model_option, trust_option


@click.command()
@model_option()
@config_options(AdapterConfig, "method", "rank", "keys", "num_layers", "layers_to_transform", "rank_pattern",
                "modules_to_save", "bias", "lora_bias")  # fmt: skip
@trust_option
@json_option
@click.pass_context
def tables(ctx, model, trust_remote_code, as_json, **params):
    """Recompute the tables of the LoRA, QLoRA, DoRA and VeRA papers, next to the printed numbers.

    With --model: count the trained parameters, the adapter's size, and the memory for training it with Adam, compared
    with full fine-tuning.

    \b
    mlx-lora tables
    mlx-lora tables --model Qwen/Qwen3-0.6B --rank 16 --keys q_proj,v_proj
    mlx-lora tables --model Qwen/Qwen3-0.6B --fine-tune-type vera
    """
    if model:
        return _local(model, build(AdapterConfig, params), trust_remote_code, as_json)
    if unused := [flag_of(ctx, name) for name in given_flags(ctx) if name != "as_json"]:
        raise ConfigError(f"{', '.join(unused)}: no effect without --model", "Name a model, or leave these out.")
    from ..planning.tables import rows

    for row in rows():
        if as_json:
            console.event("TableRow", {**asdict(row), "agrees": row.agrees})
    if as_json:
        return
    shown, paper = [], None
    for row in rows():
        if row.paper != paper:
            shown.append((row.paper, "", "", ""))
            paper = row.paper
        mark = row.note or ("agrees" if row.agrees else "differs")
        shown.append((f"  {row.what}", _figure(row.computed, row.printed), row.printed, mark))
    console.data(console.table(shown, ("", "computed", "printed", "")))


def _figure(value: float, printed: str) -> str:
    if printed.endswith(("bits", "%", "x")):
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if printed.endswith(unit):
            return f"{value / size:,.4g} {unit}"
    return f"{value:,.0f}"


def _local(model: str, config: AdapterConfig, trust: bool, as_json: bool) -> None:
    """Print the counts for a model. Its weights are not read from disk."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..model.attach import attach, parameter_counts
    from ..model.loading import load
    from ..planning.tables import training_bytes

    loaded, _ = load(model, dtype="stored", trust_remote_code=trust, lazy=True)
    _, everything = parameter_counts(loaded)
    weights = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    attach(loaded, config)
    trained = dict(tree_flatten(loaded.trainable_parameters()))
    count = sum(array.size for array in trained.values())
    half = sum(array.size for array in trained.values() if array.dtype != mx.float32)
    adapter = sum(array.nbytes for array in trained.values())
    ours, full = training_bytes(count, half), training_bytes(everything, everything if half else 0)
    facts = {
        "model": model,
        "parameters": everything,
        "weights_bytes": weights,
        "trained": count,
        "share": count / everything,
        "times_fewer": everything / count,
        "adapter_bytes": adapter,
        "optimizer_bytes": sum(ours.values()),
        "full_optimizer_bytes": sum(full.values()),
        "times_less_memory": (weights + sum(full.values())) / (weights + adapter + sum(ours.values())),
    }
    if as_json:
        return console.event("ModelTable", facts)
    rows = [("parameters", f"{count:,}", f"{everything:,}", f"{everything / count:,.0f} times fewer")]
    rows += [("size", _bytes(adapter), _bytes(weights), f"{weights / adapter:,.0f} times less")]
    rows += [(name, _bytes(ours[name]), _bytes(full[name]), "") for name in ours]
    total, total_full = weights + adapter + sum(ours.values()), weights + sum(full.values())
    rows += [("total with weights", _bytes(total), _bytes(total_full), f"{total_full / total:.1f} times less")]
    console.data(console.table(rows, ("", config.method if config.method != "full" else "chosen layers", "full", "")))
    console.note("For Adam, without activations. Both columns need nearly the same memory for those.")


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} B"
