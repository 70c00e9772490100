"""``doctor``: what MLX computes with here, how to make it faster, and what is accelerated in a model."""

from __future__ import annotations

from typing import Any

import click

from . import console
from .options import adapter_option, checkpoint_option, chosen, json_option, model_option, trust_option


@click.command()
@model_option()
@adapter_option(help="Folder of an adapter to mount on --model first.")
@checkpoint_option
@trust_option
@json_option
def doctor(model, adapter_path, checkpoint, trust_remote_code, as_json):
    """Show what MLX computes with on this machine, and how to make it faster.

    With --model, also list what was accelerated in the model, and the reasons for what was not. "kernels" says
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

    for flag, given in (("--adapter-path", adapter_path), ("--trust-remote-code", trust_remote_code)):
        if given and not model:
            raise ConfigError(f"{flag} has no effect without --model", "Name the model with --model.")
    adapter_path = chosen(adapter_path, checkpoint)
    found = device.describe()
    notes = device.advice(found)
    if enabled() and found.backend == "CPU":
        notes.append(
            "MLX_LORA_KERNELS=on, but there is no GPU to run kernels, so decoding with adapters fails. Unset it."
        )
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
        console.data("")
        for row in rows:
            console.data(f"{row['what']}: {'yes' if row['done'] else 'no, ' + row['reason']}")
            console.data(f"    {row['count']} modules: {', '.join(row['modules'])}")
    for text in notes:
        console.warn(text)
    if not notes:
        console.note("No problems found.")


def _explained(model: str, adapter_path: str | None, trust_remote_code: bool) -> list[dict[str, Any]]:
    """What was accelerated or not, one row per result; layer numbers are left out of module names."""
    from ..adapter import split_layer
    from ..fast import explain
    from ..model.loading import load

    console.note(f"Loading {model}" + (f" and {adapter_path}" if adapter_path else ""))
    loaded, _ = load(model, adapter_path, trust_remote_code=trust_remote_code)
    found: dict[tuple, list[str]] = {}
    for e in explain(loaded):
        found.setdefault((e.what, e.done, e.reason), []).append(split_layer(e.path)[1])
    return [
        {"what": what, "done": done, "reason": reason, "count": len(names), "modules": list(dict.fromkeys(names))}
        for (what, done, reason), names in found.items()
    ]
