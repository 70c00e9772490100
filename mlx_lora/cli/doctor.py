"""``doctor``: what this machine computes with, how to make it faster, and what acceleration did to a model."""

from __future__ import annotations

from typing import Any

import click

from . import console
from .options import adapter_option, json_option, model_option, trust_option


@click.command()
@model_option()
@adapter_option(help="Folder of an adapter to mount on --model first.")
@trust_option
@json_option
def doctor(model, adapter_path, trust_remote_code, as_json):
    """Show what this machine computes with, and how to make it faster.

    With --model, also list what was accelerated in the model and, where something was not, the reason. "kernels" says
    whether mlx-lora's own Metal kernels are used: MLX_LORA_KERNELS=auto|on|off decides (auto: on Metal).
    MLX_LORA_FAST=off turns all acceleration off.

    \b
    mlx-lora doctor
    mlx-lora doctor --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters
    mlx-lora doctor --json
    """
    from .. import device
    from ..errors import ConfigError
    from ..kernels import enabled

    if adapter_path and not model:
        raise ConfigError("--adapter-path needs the model to mount the adapter on", "Name the model with --model.")
    found = device.describe()
    notes = device.advice(found)
    if enabled() and found.backend == "CPU":
        notes.append("MLX_LORA_KERNELS=on, but there is no GPU to run kernels: adapters cannot decode. Unset it.")
    facts = {**device.as_dict(found), "kernels": "used" if enabled() else "not used"}
    rows = _explained(model, adapter_path, trust_remote_code) if model else []
    if as_json:
        console.event("Device", {**facts, "advice": notes})
        for row in rows:
            console.event("Acceleration", row)
        return
    units = {"memory": " GB", "working_set": " GB", "matmul_gflops": " GFLOP/s (float32, 1024 x 1024)"}
    for name, value in facts.items():
        if value is not None:
            console.data(f"{name.replace('_', ' '):<14} {value}{units.get(name, '')}")
    if rows:
        cells = [(r["modules"], r["count"], r["what"], "yes" if r["done"] else f"no: {r['reason']}") for r in rows]
        console.data("\n" + console.table(cells, ("modules", "count", "acceleration", "done")))
    for text in notes:
        console.warn(text)
    if not notes:
        console.note("No problems found.")


def _explained(model: str, adapter_path: str | None, trust_remote_code: bool) -> list[dict[str, Any]]:
    """What was accelerated, one row for modules that are alike in every layer."""
    from ..adapter import split_layer
    from ..fast import explain
    from ..model.loading import load

    console.note(f"Loading {model}" + (f" and {adapter_path}" if adapter_path else ""))
    loaded, _ = load(model, adapter_path, trust_remote_code=trust_remote_code)
    counts: dict[tuple, int] = {}
    for e in explain(loaded):
        layer, name = split_layer(e.path)
        key = (name if layer is None else f"layers.*.{name}", e.what, e.done, e.reason)
        counts[key] = counts.get(key, 0) + 1
    return [
        {"modules": modules, "count": count, "what": what, "done": done, "reason": reason}
        for (modules, what, done, reason), count in counts.items()
    ]
