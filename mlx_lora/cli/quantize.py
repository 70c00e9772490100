"""``quantize``: a model in fewer bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ..errors import ConfigError
from . import console
from .options import force_option, json_option, model_option, trust_option

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4", "nf4")


@click.command()
@model_option(required=True)
@click.option("--mode", default="affine", show_default=True, type=click.Choice(MODES), help="How to store weights.")
@click.option("--bits", type=int, help="Bits a weight: affine 2, 3, 4, 5, 6, 8; the other modes have one width.")
@click.option("--group-size", type=int, help="Weights that share a scale; the mode's own by default.")
@click.option(
    "--double-quant", is_flag=True, help="nf4: store the scales in 8 bits, too (QLoRA's double quantization)."
)
@click.option("--save-path", default="quantized_model", show_default=True, metavar="FOLDER", help="Where to write it.")
@click.option("--loftq-rank", type=int, metavar="N", help="Also make a LoftQ adapter of this rank, to train from.")
@click.option("--loftq-iters", default=1, show_default=True, help="LoftQ: rounds of quantizing and fitting.")
@click.option("--loftq-path", default="loftq_adapter", show_default=True, metavar="FOLDER",
              help="LoftQ: where to write the adapter.")  # fmt: skip
@force_option
@trust_option
@json_option
def quantize(
    model, mode, bits, group_size, double_quant, save_path, loftq_rank, loftq_iters, loftq_path, force,
    trust_remote_code, as_json,
):  # fmt: skip
    """Quantize a model, and report the bits it takes and what it loses.

    affine, mxfp4, mxfp8 and nvfp4 are MLX's own modes; mlx-lm loads the result. nf4 is the type of QLoRA
    (arXiv:2305.14314), packed as bitsandbytes packs it: transformers loads the result, and so does mlx-lora.

    LoftQ (arXiv:2310.08659) makes up for what quantizing loses by an adapter: train it with
    --resume-adapter-file on the model written here.

    \b
    mlx-lora quantize --model Qwen/Qwen3-0.6B --mode nf4 --double-quant --save-path qwen3-nf4
    mlx-lora quantize --model Qwen/Qwen3-0.6B --bits 6 --save-path qwen3-6bit
    mlx-lora quantize --model Qwen/Qwen3-0.6B --bits 2 --loftq-rank 16 --loftq-iters 5
    """
    from ..base.quantizing import check_mode
    from ..base.quantizing import quantize as quantize_model
    from ..model.loading import load, save_model

    check_mode(mode, bits, group_size, double_quant)
    for path in [save_path, *([loftq_path] if loftq_rank else [])]:
        if Path(path).exists() and not (Path(path).is_dir() and (force or not any(Path(path).iterdir()))):
            raise ConfigError(f"{path}: is there already", "Choose another folder, or add --force.")
    console.note(f"Loading {model}")
    loaded, _ = load(model, dtype="stored", trust_remote_code=trust_remote_code)
    settings = dict(mode=mode, bits=bits, group_size=group_size, double_quant=double_quant)
    if loftq_rank is None:
        report = quantize_model(loaded, **settings)
    else:
        from dataclasses import replace

        from ..config import AdapterConfig
        from ..formats import save_adapter
        from ..init.loftq import quantize_with_loftq
        from ..model.targets import select

        report, adapter = quantize_with_loftq(
            loaded, select(loaded, AdapterConfig(num_layers=-1)), loftq_rank, loftq_iters, **settings
        )
    save_model(loaded, save_path, overwrite=force)
    if loftq_rank is not None:
        save_adapter(replace(adapter, base=str(save_path)), loftq_path, overwrite=force)
    if as_json:
        return console.event("Quantized", {**asdict(report), "path": save_path})
    console.note(
        f"{report.layers} layers in {mode}: {report.bits_per_weight:.3f} bits a weight, "
        f"relative error {report.error:.4f}; "
        f"the model: {report.bits_per_parameter:.3f} bits a parameter, {report.bytes / 1e6:,.1f} MB"
    )
    if report.kept:
        console.note(f"Left as floats: {', '.join(report.kept)}")
    console.note(f"Saved {save_path}" + (f" and the adapter {loftq_path}" if loftq_rank is not None else ""))
