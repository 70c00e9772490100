"""``merge``: several adapters into one."""

from __future__ import annotations

import time

import click

from ..errors import ConfigError
from . import console
from .options import force_option, json_option, model_option

# As in ``merging``, which imports NumPy: help must not wait for it. A test compares the two.
METHODS = (
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "cat", "svd",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip


def _numbers(_ctx, _param, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.replace(" ", "").split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.7,0.3") from None


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--weights", callback=_numbers, metavar="W,W,..", help="One weight an adapter; 1 each by default.")
@click.option("--method", default="svd", show_default=True, type=click.Choice(METHODS), help="How to add them up.")
@click.option("--density", type=float, help="ties, dare, magnitude_prune: share of the numbers to keep.")
@click.option("--sign", default="total", show_default=True, type=click.Choice(["total", "frequency"]),
              help="ties: the elected sign is that of the sum, or of the most.")  # fmt: skip
@click.option("--rank", type=int, help="svd: rank of the result; the largest of the adapters' by default.")
@click.option("--clamp", type=float, help="svd: cut the factors off at this quantile of their numbers.")
@click.option("--seed", default=0, show_default=True, help="dare: seed of the numbers that are dropped.")
@model_option()
@click.option("--save-path", default="merged_adapter", show_default=True, metavar="FOLDER", help="Where to write it.")
@click.option("--to", default="mlx-lm", show_default=True, metavar="FORMAT", help="Format to write.")
@force_option
@json_option
def merge(adapters, weights, method, density, sign, rank, clamp, seed, model, save_path, to, force, as_json):
    """Add up LoRA adapters of one base, each by its weight, as PEFT's add_weighted_adapter does.

    cat and svd add up what the adapters do: cat exactly, its rank is that of all together; svd as well as its rank
    allows. linear, ties, dare and magnitude_prune work on the matrices A and B themselves, which is rough, or with
    _svd on their products. --model checks that the result fits, makes dare drop module by module in its order, and
    turns VeRA adapters into LoRA first; one VeRA adapter alone comes out as a LoRA adapter that computes the same.

    \b
    mlx-lora merge adapters_a adapters_b --weights 0.7,0.3 --save-path both
    mlx-lora merge a_vera_adapter --model Qwen/Qwen3-0.6B --to peft --save-path as_lora
    mlx-lora merge a b c --method ties --density 0.5 --to peft --save-path both
    """
    from dataclasses import replace

    from ..formats import load_adapter, save_adapter
    from ..merge.combine import as_lora, merge_adapters

    if weights is not None and len(weights) != len(adapters):
        raise ConfigError(
            f"--weights gives {len(weights)} numbers for {len(adapters)} adapters",
            "Give one number for each folder, in their order, or leave --weights out for 1 each.",
        )
    tic = time.perf_counter()
    loaded, order = [load_adapter(folder) for folder in adapters], None
    if model:
        from ..model.attach import mount, unmount
        from ..model.loading import load

        base, _ = load(model, lazy=True)
        order = [path for path, _ in reversed(base.named_modules())]
        loaded = [as_lora(base, one) if one.config.method == "vera" else one for one in loaded]
    merged = merge_adapters(
        loaded, weights, method, density=density, sign=sign, rank=rank, clamp=clamp, seed=seed, order=order
    )
    if model:
        mount(base, merged)
        unmount(base)
        merged = replace(merged, base=model)
    save_adapter(merged, save_path, to, overwrite=force)
    ranks = sorted({merged.rank_of(path) for path in merged.modules})
    fields = {"path": save_path, "method": method, "modules": len(merged.modules), "rank": ranks}
    if as_json:
        return console.event("Merged", {**fields, "parameters": merged.num_parameters})
    console.note(
        f"{len(loaded)} adapters -> {save_path} ({method}): {len(merged.modules)} modules, rank "
        f"{', '.join(map(str, ranks))}, {merged.num_parameters:,} parameters, {time.perf_counter() - tic:.1f} s"
    )
