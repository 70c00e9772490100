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
    from ..merge.fuse import fuse as fuse_model
    from ..model.loading import load, save_model

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


class Flags(click.ParamType):
    """``1,0,1``: which parts of a merged layer are adapted."""

    name = "1,0,..."

    def convert(self, value, param, ctx):
        parts = [part.strip().lower() for part in str(value).split(",")]
        known = {"1": True, "0": False, "true": True, "false": False}
        if not all(part in known for part in parts) or ("1" not in parts and "true" not in parts):
            self.fail(f"{value!r} is not of the form 1,0,1", param, ctx)
        return tuple(known[part] for part in parts)


@click.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option("--to", "to", required=True, metavar="FORMAT", help="Format to write, or merged for a whole model.")
@click.option("--from", "source", metavar="FORMAT", help="Format of SRC; by default it is told by the files.")
@model_option()
@click.option("--adapter", metavar="NAME", help="Which adapter, where a PEFT folder holds several in sub-folders.")
@click.option("--alpha", type=float, help="Alpha of SRC (scale * rank), where its files do not tell it.")
@click.option("--to-alpha", type=float, help="Alpha to write, where DST does not store it; the scale is folded to it.")
@click.option("--legacy-scale", type=click.Choice(["scale", "alpha"]), help="What scale meant to the mlx-lm of SRC.")
@click.option("--enable-lora", type=Flags(), help="loralib's enable_lora of merged layers, such as 1,0,1.")
@click.option("--moe", type=click.Choice(["per_expert", "target_parameters"]), help="How PEFT's folder holds experts.")
@click.option("--profile", type=click.Choice(["serving"]), help="PEFT's folder for servers such as vLLM.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of a merged model's weights.")
@click.option("--allow-lossy", is_flag=True, help="Leave out what FORMAT cannot hold; it is named.")
@force_option
@trust_option
@json_option
def convert(
    src,
    dst,
    to,
    source,
    model,
    adapter,
    alpha,
    to_alpha,
    legacy_scale,
    enable_lora,
    moe,
    profile,
    dtype,
    allow_lossy,
    force,
    trust_remote_code,
    as_json,
):
    """Convert the adapter SRC (a folder or a file) into another format, DST.

    Formats: mlx-lm, peft, loralib, torchtune, nemo, litgpt, gguf; to read also lightning and deepspeed. Tensors are
    carried over bit for bit wherever the format allows it; what it cannot hold is refused by name. --model names the
    base: it is written into the adapter, its config gives the sizes that some formats need, and with --to merged it is
    the model that the adapter is merged into (DST may then end in .gguf).

    \b
    mlx-lora convert adapters my_peft_adapter --to peft --model Qwen/Qwen3-0.6B
    mlx-lora convert some_peft_adapter adapters --to mlx-lm
    mlx-lora convert adapters adapter.gguf --to gguf --model Qwen/Qwen3-0.6B
    mlx-lora convert adapters my_model --to merged --model Qwen/Qwen3-0.6B --dtype bfloat16
    """
    from dataclasses import replace

    from ..formats import detect_format, load_adapter, save_adapter

    merged = to == "merged"
    if merged:
        given = {"--moe": moe, "--profile": profile, "--to-alpha": to_alpha, "--allow-lossy": allow_lossy or None}
        if unused := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: a merged model is written without", "Leave it out.")
        if model is None:
            raise ConfigError("--to merged needs the model to merge into", "Name it: --model.")
    elif dtype or trust_remote_code:
        raise ConfigError("--dtype and --trust-remote-code are for --to merged", "Leave them out.")
    tic = time.perf_counter()
    source = source or detect_format(src)
    options = {"alpha": alpha, "adapter": adapter, "legacy_scale": legacy_scale, "enabled": enable_lora}
    loaded = load_adapter(src, source, model, **options)
    if model:
        loaded = replace(loaded, base=model)
    lost: list[str] = []
    if merged:
        from ..merge.export import export_merged

        reports = export_merged(model, loaded, dst, dtype=dtype, overwrite=force, trust_remote_code=trust_remote_code)
        lost = [f"{r.path}: lost part of its update, cosine {r.cosine:.3f}" for r in reports if not r.survives]
    else:
        save_adapter(
            loaded,
            dst,
            to,
            overwrite=force,
            base=model,
            moe=moe,
            profile=profile,
            alpha=to_alpha,
            allow_lossy=allow_lossy,
            lost=lost,
        )
    took = time.perf_counter() - tic
    for fault in lost:
        console.warn(f"left out: {fault}" if not merged else fault)
    if as_json:
        fields = {"source": source, "target": to, "path": dst, "modules": len(loaded.modules), "seconds": took}
        return console.event("Converted", {**fields, "parameters": loaded.num_parameters, "lost": lost})
    console.note(
        f"{src} ({source}) -> {dst} ({to}): {len(loaded.modules)} modules, {loaded.num_parameters:,} parameters, "
        f"{1000 * took:.0f} ms"
    )
    if use := _USES.get(to):
        console.note(f"Use it: {use.format(dst)}")
    if to == "loralib":
        scale = loaded.config.scale_of(loaded.modules[0]) * loaded.rank_of(loaded.modules[0])
        console.note(f"loralib stores no alpha; give its layers lora_alpha={to_alpha or scale:g}.")


_USES = {
    "peft": 'PeftModel.from_pretrained(base_model, "{}")',
    "gguf": "llama-cli -m base.gguf --lora {}",
    "merged": 'AutoModelForCausalLM.from_pretrained("{}")',
}


@click.command()
@click.argument("path", metavar="SRC")
@click.option("--from", "source", metavar="FORMAT", help="Format; by default it is told by the files.")
@model_option()
@json_option
def inspect(path, source, model, as_json):
    """Describe the adapter SRC, a folder or a file of any known format, without loading a model.

    \b
    mlx-lora inspect adapters
    mlx-lora inspect some_peft_adapter --json
    mlx-lora inspect adapter.gguf --model Qwen/Qwen3-0.6B
    """
    from ..formats import describe

    facts = describe(path, source, model)
    if as_json:
        return console.event("Adapter", facts)
    for name, value in facts.items():
        if name == "problems":
            continue
        shown = ", ".join(str(v) for v in value) if isinstance(value, list) else value
        console.data(f"{name.replace('_', ' '):<12} {shown:,}" if isinstance(value, int) else f"{name:<12} {shown}")
    for problem in facts["problems"]:
        console.warn(problem)
