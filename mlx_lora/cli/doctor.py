"""``doctor``: what this machine computes with, and what to do about a slow one."""

from __future__ import annotations

import click

from . import console
from .options import json_option


@click.command()
@json_option
def doctor(as_json):
    """Tell what this machine computes with, and how to make it faster.

    "kernels": whether mlx-lora's own are used; MLX_LORA_KERNELS=auto|on|off decides (auto: on Metal).

    \b
    mlx-lora doctor
    mlx-lora doctor --json
    """
    from .. import device
    from ..kernels import enabled

    found = device.describe()
    notes = device.advice(found)
    if enabled() and found.backend == "CPU":
        notes.append("MLX_LORA_KERNELS=on, and there is no GPU for kernels: adapters cannot decode. Unset it.")
    facts = {**device.as_dict(found), "kernels": "used" if enabled() else "not used"}
    if as_json:
        return console.event("Device", {**facts, "advice": notes})
    units = {"memory": " GB", "working_set": " GB", "matmul_gflops": " GFLOP/s (float32, 1024 x 1024)"}
    for name, value in facts.items():
        if value is not None:
            console.data(f"{name.replace('_', ' '):<14} {value}{units.get(name, '')}")
    for text in notes:
        console.warn(text)
    if not notes:
        console.note("Nothing to mend.")
