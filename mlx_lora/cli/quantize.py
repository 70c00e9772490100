"""``quantize``: store a model in fewer bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError, ModelError
from . import console
from .options import (
    check_free,
    flag_of,
    force_option,
    given_flags,
    is_quantized_base,
    json_option,
    model_option,
    save_path_option,
    trust_option,
)

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4", "nf4")


@click.command()
@model_option(required=True)
@click.option("--mode", default="affine", show_default=True, type=click.Choice(MODES), help="Quantization mode.")
@click.option("--bits", type=int, help="Bits per weight. affine: 2, 3, 4, 5, 6 or 8; the other modes have one choice.")
@click.option("--group-size", type=int, help="Weights per scale (default: depends on the mode).")
@click.option(
    "--double-quant", is_flag=True, help="nf4: also quantize the scales to 8 bits (QLoRA's double quantization)."
)
@save_path_option("quantized_model", "model")
@click.option("--loftq-rank", type=int, metavar="N", help="Also write a LoftQ adapter of this rank.")
@click.option("--loftq-iters", default=1, show_default=True, help="LoftQ: number of alternating steps.")
@click.option("--loftq-path", default="loftq_adapter", show_default=True, metavar="FOLDER",
              help="LoftQ: folder to write the adapter to.")  # fmt: skip
@force_option
@trust_option
@json_option
@click.pass_context
def quantize(
    ctx, model, mode, bits, group_size, double_quant, save_path, loftq_rank, loftq_iters, loftq_path, force,
    trust_remote_code, as_json,
):  # fmt: skip
    """Quantize a model, and report its size and the quantization error.

    affine, mxfp4, mxfp8 and nvfp4 are MLX's modes; mlx-lm can load the result. nf4 is QLoRA's data type
    (arXiv:2305.14314), stored as bitsandbytes does; transformers and mlx-lora can load the result.

    A LoftQ adapter (arXiv:2310.08659) compensates for the quantization error. To train it, use the model written here
    with train --resume-adapter-file.

    \b
    mlx-lora quantize --model Qwen/Qwen3-0.6B --mode nf4 --double-quant --save-path qwen3-nf4
    mlx-lora quantize --model Qwen/Qwen3-0.6B --bits 6 --save-path qwen3-6bit
    mlx-lora quantize --model Qwen/Qwen3-0.6B --bits 2 --loftq-rank 16 --loftq-iters 5
    """
    from ..base.quantizing import check_mode
    from ..base.quantizing import quantize as quantize_model
    from ..model.loading import load, save_model

    check_mode(mode, bits, group_size, double_quant)
    check_free(save_path, force, model=True)
    _check_loftq(ctx, loftq_rank, loftq_iters, loftq_path, save_path, force)
    if is_quantized_base(model):
        raise ModelError(
            f"{model} is quantized already", "Quantize the original model: quantizing twice loses more precision."
        )
    console.note(f"Loading {model}")
    loaded, _ = load(model, dtype="stored", trust_remote_code=trust_remote_code)
    settings = dict(mode=mode, bits=bits, group_size=group_size, double_quant=double_quant)
    if loftq_rank is None:
        report = quantize_model(loaded, **settings)
    else:
        report, adapter = _with_loftq(loaded, loftq_rank, loftq_iters, settings)
    save_model(loaded, save_path, overwrite=force)
    if loftq_rank is not None:
        from ..formats import save_adapter

        save_adapter(dataclasses.replace(adapter, base=str(save_path)), loftq_path, overwrite=force)
    if as_json:
        return console.event("Quantized", {**dataclasses.asdict(report), "path": save_path})
    console.note(
        f"{report.layers} layers in {mode}: {report.bits_per_weight:.3f} bits per weight, "
        f"relative error {report.error:.4f}; "
        f"whole model: {report.bits_per_parameter:.3f} bits per parameter, {report.bytes / 1e6:,.1f} MB"
    )
    if report.kept:
        console.note(f"Not quantized: {', '.join(report.kept)}")
    console.note(f"Saved {save_path}" + (f" and the adapter {loftq_path}" if loftq_rank is not None else ""))


def _check_loftq(ctx: click.Context, rank: int | None, iters: int, path: str, save_path: str, force: bool) -> None:
    """Refuse LoftQ options that are invalid or have no effect without --loftq-rank."""
    others = [flag_of(ctx, name) for name in given_flags(ctx) if name in ("loftq_iters", "loftq_path")]
    if rank is None:
        if others:
            raise ConfigError(f"{' and '.join(others)}: no effect without --loftq-rank", "Add --loftq-rank N.")
        return
    if rank < 1 or iters < 1:
        raise ConfigError(
            f"--loftq-rank {rank} and --loftq-iters {iters} must be at least 1",
            "Use a rank such as 16, and 1 to 5 iterations; without --loftq-rank no adapter is written.",
        )
    if Path(path).resolve() == Path(save_path).resolve():
        raise ConfigError(f"--loftq-path and --save-path are both {path}", "Choose a folder for each.")
    check_free(path, force)


def _with_loftq(model: Any, rank: int, iterations: int, settings: dict[str, Any]):
    """Quantize ``model``; return the report and the adapter. A rank that is too large is refused at once."""
    from ..config import AdapterConfig
    from ..init.loftq import quantize_with_loftq
    from ..layers import check_rank
    from ..model.targets import select

    modules = select(model, AdapterConfig(num_layers=-1))
    for module in modules.values():
        check_rank(module, rank)
    return quantize_with_loftq(model, modules, rank, iterations, **settings)
