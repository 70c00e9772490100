"""``merge``: merge several adapters into one."""

from __future__ import annotations

import time

import click

from ..errors import ConfigError
from . import console
from .options import checkpoint_option, chosen, force_option, given_flags, json_option, model_option, save_path_option

# A copy of ``merge.combine.MERGES``, because its module imports NumPy, which --help must not. A test compares the two.
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
@click.option("--weights", callback=_numbers, metavar="W,W,..", help="One weight per adapter (default: 1 each).")
@click.option("--method", default="svd", show_default=True, type=click.Choice(METHODS), help="Merging method.")
@click.option("--density", type=float, help="ties, dare, magnitude_prune: fraction of the values to keep.")
@click.option("--sign", default="total", show_default=True, type=click.Choice(["total", "frequency"]),
              help="ties: elect the sign of the sum, or the most frequent sign.")  # fmt: skip
@click.option("--rank", type=int, help="svd: rank of the result (default: the largest of the adapters).")
@click.option("--clamp", type=float, help="svd: clamp the factors to this quantile of their values.")
@click.option("--seed", default=0, show_default=True, help="dare: seed for choosing the dropped values.")
@checkpoint_option
@model_option()
@save_path_option("merged_adapter", "adapter")
@click.option("--to", default="mlx-lm", show_default=True, metavar="FORMAT", help="Format to write.")
@force_option
@json_option
@click.pass_context
def merge(
    ctx, adapters, weights, method, density, sign, rank, clamp, seed, checkpoint, model, save_path, to, force, as_json
):
    """Merge several LoRA adapters of the same base model into one, as PEFT's add_weighted_adapter does.

    cat and svd compute the weighted sum of the updates: cat exactly, with the sum of the ranks as its rank; svd as its
    best approximation of a given rank. linear, ties, dare and magnitude_prune combine the matrices A and B separately,
    which is less accurate; with the suffix _svd they combine the products B A.

    With --model, the result is checked against that model, dare draws its random masks in the order of the model's
    modules, and VeRA adapters are converted to LoRA first. A single VeRA adapter becomes an equivalent LoRA adapter.

    \b
    mlx-lora merge adapters_a adapters_b --weights 0.7,0.3 --save-path both
    mlx-lora merge a_vera_adapter --model Qwen/Qwen3-0.6B --to peft --save-path as_lora
    mlx-lora merge a b c --method ties --density 0.5 --to peft --save-path both
    """
    from dataclasses import replace

    from ..formats import check_destination, load_adapter, save_adapter
    from ..merge.combine import as_lora, check_settings, merge_adapters

    settings = dict(density=density, sign=sign, rank=rank, clamp=clamp, seed=seed)
    check_settings(len(adapters), weights, method, **settings)
    _check_method(ctx, len(adapters))
    check_destination(save_path, to, force)
    tic = time.perf_counter()
    loaded, order = [load_adapter(chosen(folder, checkpoint)) for folder in adapters], None
    if model:
        from ..model.attach import mount, unmount
        from ..model.loading import load

        base, _ = load(model, lazy=True)
        order = [path for path, _ in reversed(base.named_modules())]
        loaded = [as_lora(base, one) if one.config.method == "vera" else one for one in loaded]
    merged = merge_adapters(loaded, weights, method, order=order, **settings)
    if model:
        mount(base, merged)
        unmount(base)
        merged = replace(merged, base=model)
    save_adapter(merged, save_path, to, overwrite=force, base=model)
    ranks = sorted({merged.rank_of(path) for path in merged.modules})
    fields = {"path": save_path, "method": method, "modules": len(merged.modules), "rank": ranks}
    if as_json:
        return console.event("Merged", {**fields, "parameters": merged.num_parameters})
    console.note(
        f"{len(loaded)} adapters -> {save_path} ({method}): {len(merged.modules)} modules, rank "
        f"{', '.join(map(str, ranks))}, {merged.num_parameters:,} parameters, {time.perf_counter() - tic:.1f} s"
    )


def _check_method(ctx: click.Context, count: int) -> None:
    if count == 1 and "method" in given_flags(ctx):
        raise ConfigError(
            "--method has no effect on one adapter, which is only multiplied by its weight", "Leave --method out."
        )
