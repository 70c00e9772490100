"""``fuse``, ``convert`` and ``inspect``: what can be done with an adapter that is finished."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from ..errors import ConfigError
from . import console
from .options import adapter_option, force_option, json_option, model_option, trust_option


@click.command()
@model_option(required=True)
@adapter_option("adapters")
@click.option(
    "--save-path", default="fused_model", show_default=True, metavar="FOLDER", help="Where to write the model."
)
@click.option(
    "--bits", type=int, help="Store adapted layers of a quantized base at these bits; below 8 with --force only."
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Store adapted layers as floats.")
@click.option("--dequantize", is_flag=True, help="Store every layer as floats, the untouched ones too.")
@force_option
@trust_option
@json_option
def fuse(model, adapter_path, save_path, bits, dtype, dequantize, force, trust_remote_code, as_json):
    """Merge an adapter into the model's weights, and report how much of it survived.

    Merged weights must be stored, and a coarse grid swallows small updates: 4 bits lose nearly any adapter. Adapted
    layers of a quantized base are therefore stored at 8 bits where that keeps the update, else as floats; the others
    stay as they are. The report gives, for each layer, the cosine and relative error of the stored update.

    \b
    mlx-lora fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --save-path my_model
    mlx-lora fuse --model Qwen/Qwen3-0.6B --adapter-path adapters --save-path my_model
    mlx-lora fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --dequantize
    """
    from ..fusing import fuse as fuse_model
    from ..model import load, save_model

    target = Path(save_path)
    if target.exists() and not (target.is_dir() and (force or not any(target.iterdir()))):
        raise ConfigError(f"{target}: is there already", "Choose another --save-path, or add --force.")
    console.note(f"Loading {model} and {adapter_path}")
    loaded, _ = load(model, adapter_path, dtype="stored", trust_remote_code=trust_remote_code)
    reports = fuse_model(loaded, bits=bits, dtype=dtype, dequantize=dequantize, force=force)
    lost = [r for r in reports if not r.survives]
    if as_json:
        for report in reports:
            console.event("FusedLayer", {**asdict(report), "survives": report.survives})
    else:
        rows = [
            (r.path, r.storage, f"{r.cosine:.4f}", f"{100 * r.relative_error:.2f} %", f"{100 * r.update_norm:.3f} %")
            for r in reports
        ]
        console.data(console.table(rows, ("layer", "stored as", "cosine", "error", "update / weight")))
    if lost:
        worst = min(lost, key=lambda r: r.cosine)
        console.warn(
            f"{len(lost)} of {len(reports)} layers lost part of their update (worst: {worst.path}, cosine "
            f"{worst.cosine:.3f}). Keep the adapter beside the base, or store wider: --dtype float16 or float32."
        )
    save_model(loaded, target, overwrite=force)
    console.note(f"Saved {target}")


@click.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option("--to", "to", required=True, metavar="FORMAT", help="Format to write: mlx-lm or peft.")
@click.option("--from", "source", metavar="FORMAT", help="Format of SRC; by default it is told by the files.")
@model_option()
@force_option
@json_option
def convert(src, dst, to, source, model, force, as_json):
    """Convert the adapter in folder SRC into another format in folder DST.

    Tensors are carried over bit for bit; what a format cannot hold is refused by name. --model is written into the
    adapter as its base.

    \b
    mlx-lora convert adapters my_peft_adapter --to peft --model Qwen/Qwen3-0.6B
    mlx-lora convert some_peft_adapter adapters --to mlx-lm
    """
    from dataclasses import replace

    from ..formats import detect_format, load_adapter, save_adapter

    tic = time.perf_counter()
    source = source or detect_format(src)
    adapter = load_adapter(src, source)
    if model:
        adapter = replace(adapter, base=model)
    save_adapter(adapter, dst, to, overwrite=force)
    took = time.perf_counter() - tic
    if as_json:
        fields = {"source": source, "target": to, "path": dst, "modules": len(adapter.modules), "seconds": took}
        return console.event("Converted", {**fields, "parameters": adapter.num_parameters})
    console.note(
        f"{src} ({source}) -> {dst} ({to}): {len(adapter.modules)} modules, {adapter.num_parameters:,} parameters, "
        f"{1000 * took:.0f} ms"
    )
    if to == "peft":
        console.note("Use it: PeftModel.from_pretrained(base_model, " + repr(dst) + ")")


@click.command()
@click.argument("path", metavar="FOLDER")
@click.option("--from", "source", metavar="FORMAT", help="Format; by default it is told by the files.")
@json_option
def inspect(path, source, as_json):
    """Describe the adapter in FOLDER without loading a model.

    \b
    mlx-lora inspect adapters
    mlx-lora inspect some_peft_adapter --json
    """
    from ..formats import describe

    facts = describe(path, source)
    if as_json:
        return console.event("Adapter", facts)
    for name, value in facts.items():
        if name == "problems":
            continue
        shown = ", ".join(str(v) for v in value) if isinstance(value, list) else value
        console.data(f"{name.replace('_', ' '):<12} {shown:,}" if isinstance(value, int) else f"{name:<12} {shown}")
    for problem in facts["problems"]:
        console.warn(problem)
