"""``fuse``, ``convert`` and ``inspect``: commands for a trained adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from . import console
from .options import (
    adapter_option,
    check_free,
    checkpoint_option,
    chosen,
    force_option,
    is_quantized_base,
    json_option,
    model_option,
    save_path_option,
    trust_option,
)

if TYPE_CHECKING:
    from ..adapter import Adapter


@click.command()
@model_option(required=True)
@adapter_option("adapters")
@checkpoint_option
@save_path_option("fused_model", "model")
@click.option("--bits", type=int, help="Bits of the adapted layers of a quantized base; fewer than 8 need --force.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Store the adapted layers in this dtype."
)
@click.option("--dequantize", is_flag=True, help="Store all layers of a quantized base as floats.")
@force_option
@trust_option
@json_option
def fuse(model, adapter_path, checkpoint, save_path, bits, dtype, dequantize, force, trust_remote_code, as_json):
    """Merge an adapter into the model's weights, and report how precisely each update is stored.

    Quantizing the merged weights to 4 bits rounds most of an adapter's update away. The adapted layers of a quantized
    base are therefore stored in 8 bits if that preserves the update, else as floats. Other layers stay unchanged. The
    report shows the cosine similarity and the relative error of each stored update.

    \b
    mlx-lora fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --save-path my_model
    mlx-lora fuse --model Qwen/Qwen3-0.6B --adapter-path adapters --save-path my_model
    mlx-lora fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --dequantize
    """
    from ..merge.fuse import check_biases, check_options
    from ..merge.fuse import fuse as fuse_model
    from ..model.loading import load, save_model
    from ..model.state import state_of

    check_options(bits, dtype, dequantize, force)
    check_free(save_path, force, model=True)
    _check_quantized(model, bits, dequantize)
    adapter_path = chosen(adapter_path, checkpoint)
    console.note(f"Loading {model} and {adapter_path}")
    loaded, _ = load(model, adapter_path, dtype="stored", trust_remote_code=trust_remote_code)
    check_biases(loaded)
    replaced = len(state_of(loaded).full_parameters)
    reports = fuse_model(loaded, bits=bits, dtype=dtype, dequantize=dequantize, force=force)
    lost = [r for r in reports if not r.survives]
    if as_json:
        for report in reports:
            console.event("FusedLayer", {**asdict(report), "survives": report.survives})
    elif reports:
        rows = [
            (r.path, r.storage, f"{r.cosine:.4f}", f"{100 * r.relative_error:.2f} %", f"{100 * r.update_norm:.3f} %")
            for r in reports
        ]
        console.data(console.table(rows, ("layer", "stored as", "cosine", "error", "update / weight")))
    if replaced:
        console.note(f"{replaced} parameters trained in full replace those of the model.")
    if lost:
        worst = min(lost, key=lambda r: r.cosine)
        more = "float32" if worst.storage == "float16" else "float16 or float32"
        console.warn(
            f"{len(lost)} of {len(reports)} layers lost part of their update (worst: {worst.path}, cosine "
            f"{worst.cosine:.3f}). Use the adapter without merging it, or store more bits: --dtype {more}."
        )
    save_model(loaded, save_path, overwrite=force)
    console.note(f"Saved {save_path}")


def _check_quantized(model: str, bits: int | None, dequantize: bool) -> None:
    """Refuse --bits, and warn about --dequantize, if the base is not quantized. Reads only its config."""
    if (bits or dequantize) and not is_quantized_base(model):
        if bits:
            raise ConfigError(
                "--bits applies to quantized bases; this one is not", "Fuse first, then quantize the model."
            )
        console.warn("--dequantize has no effect: the base is not quantized.")


class Flags(click.ParamType):
    """``1,0,1``: which of the projections in a fused layer are adapted."""

    name = "1,0,..."

    def convert(self, value, param, ctx):
        known = {"1": True, "0": False, "true": True, "false": False}
        flags = [known.get(part.strip().lower()) for part in str(value).split(",")]
        if None in flags or not any(flags):
            self.fail(f"{value!r} is not of the form 1,0,1", param, ctx)
        return tuple(flags)


@click.command()
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option("--to", "to", required=True, metavar="FORMAT", help="Format to write; merged writes a full model.")
@click.option("--from", "source", metavar="FORMAT", help="Format of SRC (default: detected from its files).")
@checkpoint_option
@model_option()
@click.option("--adapter", metavar="NAME", help="Name of the adapter, if a PEFT folder has several in sub-folders.")
@click.option("--alpha", type=float, help="Alpha of SRC (scale * rank), if its files do not store it.")
@click.option("--to-alpha", type=float, help="Alpha that DST will be loaded with, if its format does not store it.")
@click.option("--legacy-scale", type=click.Choice(["scale", "alpha"]), help="What scale meant in SRC's mlx-lm version.")
@click.option("--enable-lora", type=Flags(), help="loralib's enable_lora of SRC's fused layers, such as 1,0,1.")
@click.option("--moe", type=click.Choice(["per_expert", "target_parameters"]), help="PEFT: how to store experts.")
@click.option("--profile", type=click.Choice(["serving"]), help="PEFT: write a folder for servers such as vLLM.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "q8_0"]),
              help="merged: dtype of the weights; q8_0 is for GGUF.")  # fmt: skip
@click.option("--modelfile", is_flag=True, help="GGUF: also write a Modelfile for Ollama in the folder of DST.")
@click.option("--allow-lossy", is_flag=True, help="Leave out what FORMAT cannot store, with a warning.")
@force_option
@trust_option
@json_option
def convert(src, dst, to, source, checkpoint, model, force, as_json, **options):
    """Convert the adapter SRC (a folder or a file) to another format and write it to DST.

    Formats: mlx-lm, peft, loralib, torchtune, nemo, litgpt, gguf; lightning and deepspeed can only be read. Tensors
    are copied bit for bit wherever the format allows it. If a format cannot store something, that is an error.

    --model names the base model. It is recorded in the adapter, and gives the sizes that some formats need. With --to
    merged, the adapter is merged into that model; if DST ends in .gguf, the model is one file for llama.cpp and Ollama.

    \b
    mlx-lora convert adapters my_peft_adapter --to peft --model Qwen/Qwen3-0.6B
    mlx-lora convert some_peft_adapter adapters --to mlx-lm
    mlx-lora convert adapters adapter.gguf --to gguf --model Qwen/Qwen3-0.6B
    mlx-lora convert adapters my_model --to merged --model Qwen/Qwen3-0.6B --dtype bfloat16
    mlx-lora convert adapters my_model.gguf --to merged --model Qwen/Qwen3-0.6B --dtype q8_0 --modelfile
    """
    from dataclasses import replace

    from ..formats import detect_format, load_adapter

    _check_convert(dst, to, model, force, options)
    tic = time.perf_counter()
    src = chosen(src, checkpoint)
    source = source or detect_format(src)
    adapter = load_adapter(
        src,
        source,
        model,
        alpha=options["alpha"],
        adapter=options["adapter"],
        legacy_scale=options["legacy_scale"],
        enabled=options["enable_lora"],
    )
    if model and to != "merged":  # mounts the adapter, so an error names the base model it was trained on
        _check_base(adapter, model)
        adapter = replace(adapter, base=model)
    if to == "merged":
        lost = _write_merged(adapter, model, dst, force, options)
    else:
        lost = _write(adapter, dst, to, model, force, options)
    took = time.perf_counter() - tic
    for text in lost:
        console.warn(text)
    if as_json:
        fields = {"source": source, "target": to, "path": dst, "modules": len(adapter.modules), "seconds": took}
        return console.event("Converted", {**fields, "parameters": adapter.num_parameters, "lost": lost})
    console.note(
        f"{src} ({source}) -> {dst} ({to}): {len(adapter.modules)} modules, {adapter.num_parameters:,} parameters, "
        f"{1000 * took:.0f} ms"
    )
    kind = "gguf model" if to == "merged" and Path(dst).suffix.lower() == ".gguf" else to
    if kind in _USES:
        console.note(f"Use it: {_USES[kind].format(dst, base=adapter.base or 'MODEL')}")
    if options["modelfile"]:
        console.note(f"With Ollama: ollama create {Path(dst).stem} -f {Path(dst).parent / 'Modelfile'}")
    if to == "loralib":
        scale = adapter.config.scale_of(adapter.modules[0]) * adapter.rank_of(adapter.modules[0])
        console.note(
            f"loralib does not store alpha. Create its layers with lora_alpha={options['to_alpha'] or scale:g}."
        )


def _check_convert(dst: str, to: str, model: str | None, force: bool, options: dict[str, Any]) -> None:
    """Refuse options that do not apply to ``to`` and an existing target, before anything is read."""
    from ..formats import check_destination
    from ..formats.options import WriteOptions, refuse_unused

    if options["modelfile"] and to not in ("merged", "gguf"):
        raise ConfigError(f"--modelfile is for GGUF files, not for --to {to}", "Leave it out.")
    if to != "merged":
        if options["dtype"] or options["trust_remote_code"]:
            raise ConfigError("--dtype and --trust-remote-code are for --to merged", "Leave them out.")
        written = WriteOptions(moe=options["moe"], profile=options["profile"], alpha=options["to_alpha"])
        refuse_unused(written, check_destination(dst, to, force).WRITES, to)
        return
    unused = [name for name in ("moe", "profile", "to_alpha", "allow_lossy") if options[name]]
    if unused:
        flags = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise ConfigError(f"{flags} cannot be used with --to merged", "Leave it out.")
    if model is None:
        raise ConfigError("--to merged needs a base model to merge into", "Name it with --model.")
    if Path(dst).suffix.lower() != ".gguf":
        check_free(dst, force, model=True)


def _check_base(adapter: Adapter, model: str) -> None:
    """Refuse an adapter that does not match ``model``, by the shapes and names that the model's config implies."""
    from ..adapter import FINGERPRINT, raise_faults
    from ..base.fingerprint import Fingerprint
    from ..base.loading import load_base
    from ..base.names import BaseModel
    from ..base.origin import base_of
    from ..model.compatibility import incompatibilities, warn_of_another_base
    from ..model.state import bare_modules

    base = BaseModel(model)
    if not base.known:
        console.warn(f"the config of {model} is not on this machine, so the adapter was not checked against it.")
        return
    raise_faults(*incompatibilities(base.model, adapter.check()))  # mlx-lm's class without its weights
    if FINGERPRINT in adapter.metadata and base.tensor_names:
        weights, _ = load_base(model, dtype="stored", lazy=True)  # only a few of its tensors are read
        warn_of_another_base(adapter, Fingerprint.of(bare_modules(weights)), base_of(weights))


def _write(adapter: Adapter, dst: str, to: str, base: str | None, force: bool, options: dict[str, Any]) -> list[str]:
    """Write an adapter; return what was left out."""
    from ..formats import save_adapter

    lost: list[str] = []
    if options["modelfile"]:
        from ..base.names import BaseModel
        from ..merge.gguf.modelfile import check_modelfile, ollama_base, write_modelfile
        from ..merge.gguf.tokenizer import load_tokenizer

        name = base or adapter.base
        if name is None:
            raise ConfigError("--modelfile needs the base model's name, which is unknown", "Name it with --model.")
        folder, file = ollama_base(BaseModel(name)), check_modelfile(Path(dst), force)
        tokenizer = load_tokenizer(folder)
    save_adapter(
        adapter,
        dst,
        to,
        overwrite=force,
        base=base,
        moe=options["moe"],
        profile=options["profile"],
        alpha=options["to_alpha"],
        allow_lossy=options["allow_lossy"],
        lost=lost,
    )
    notes = write_modelfile(file, str(folder), tokenizer, f"./{Path(dst).name}") if options["modelfile"] else []
    return [*(f"left out: {fault}" for fault in lost), *notes]


def _write_merged(adapter: Adapter, model: str, dst: str, force: bool, options: dict[str, Any]) -> list[str]:
    """Write a merged model; return warnings about rounding losses and about what llama.cpp computes differently."""
    from ..merge.export import export_merged

    notes: list[str] = []
    reports = export_merged(
        model,
        adapter,
        dst,
        dtype=options["dtype"],
        overwrite=force,
        trust_remote_code=options["trust_remote_code"],
        notes=notes,
        modelfile=options["modelfile"],
    )
    lost = [r for r in reports if not r.survives]
    if lost:
        worst = min(lost, key=lambda r: r.cosine)
        notes.append(
            f"{len(lost)} of {len(reports)} layers lost part of their update in {worst.storage} (worst: {worst.path}, "
            f"cosine {worst.cosine:.3f})"
        )
    return notes


_USES = {
    "mlx-lm": "mlx-lora chat --model {base} --adapter-path {}",
    "peft": 'PeftModel.from_pretrained(base_model, "{}")',
    "gguf": "llama-cli -m base.gguf --lora {}",
    "gguf model": "llama-cli -m {}",
    "merged": 'AutoModelForCausalLM.from_pretrained("{}")',
}


@click.command()
@click.argument("path", metavar="SRC")
@click.option("--from", "source", metavar="FORMAT", help="Format (default: detected from the files).")
@checkpoint_option
@model_option()
@json_option
def inspect(path, source, checkpoint, model, as_json):
    """Describe the adapter SRC, a folder or a file in any supported format, without loading a model.

    \b
    mlx-lora inspect adapters
    mlx-lora inspect some_peft_adapter --json
    mlx-lora inspect adapter.gguf --model Qwen/Qwen3-0.6B
    """
    from ..formats import describe
    from ..formats.checkpoints import checkpoints

    facts = describe(chosen(path, checkpoint), source, model)
    if found := list(checkpoints(path)):
        facts["checkpoints"] = found
    if as_json:
        return console.event("Adapter", facts)
    for name, value in facts.items():
        if name == "problems":
            continue
        shown = ", ".join(str(v) for v in value) if isinstance(value, list) else value
        console.data(f"{name.replace('_', ' '):<12} {shown:,}" if isinstance(value, int) else f"{name:<12} {shown}")
    for problem in facts["problems"]:
        console.warn(problem)
