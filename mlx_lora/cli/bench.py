"""``bench``: benchmarks on this machine."""

from __future__ import annotations

import click

from . import console
from .options import json_option

SIZES = {  # hidden, key and value, intermediate, vocabulary sizes of models like these
    "1b": (2048, 512, 8192, 128256),
    "4b": (2560, 1024, 9728, 151936),
    "8b": (4096, 1024, 14336, 128256),
    "tiny": (256, 128, 512, 512),
}


@click.group()
def bench():
    """Run benchmarks on this machine.

    \b
    mlx-lora bench kernels
    """


@bench.command()
@click.option(
    "--size", type=click.Choice(list(SIZES)), default="8b", show_default=True, help="Which model's layer to measure."
)
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16"]),
    default="4",
    help="Bits of the base; 16: not quantized.",
)
@click.option("--rows", type=click.IntRange(1, 8), default=1, show_default=True, help="Tokens at once.")
@click.option("--iters", type=click.IntRange(1), default=20, show_default=True, help="Repeats; the median is reported.")
@json_option
def kernels(size, rank, bits, rows, iters, as_json):
    """Time every kernel beside plain operations and mlx-lm's layers.

    Decoding: a layer's linears, its MLP, DoRA, multi-LoRA, NF4. Training: DoRA's norms, NF4 dequantization, output head
    and loss ("kernels": in chunks of tokens). "base" is the layer without adapter; "host us" is the time Python and MLX
    take to build the graph. On CUDA, set MLX_LORA_KERNELS=on to run the kernels.

    \b
    mlx-lora bench kernels
    mlx-lora bench kernels --size 1b --rows 4 --json
    """
    from ..bench import measure_kernels
    from ..kernels import enabled

    lines = []
    for found in measure_kernels(*SIZES[size], rank, int(bits), rows, iters):
        if as_json:
            console.report_event(found)
            continue
        share = f"{100 * found.share:.0f} %" if found.share else "-"
        ratio = f"{found.over_base:.2f}x" if found.over_base else "-"
        count = "-" if found.launches is None else found.launches
        speed, peak = f"{found.gigabytes_per_second:.1f}", f"{found.peak_megabytes:.1f}"
        host = "-" if found.host_microseconds is None else f"{found.host_microseconds:.1f}"
        lines.append((found.part, found.path, count, f"{found.microseconds:.1f}", ratio, host, speed, share, peak))
    if as_json:
        return
    head = ("part", "path", "launches", "us", "vs base", "host us", "GB/s", "of peak", "temporary MB")
    console.data(console.table(lines, head))
    console.note(f"{found.chip}, {found.backend}; a layer of {size}, rank {rank}, {bits} bits, rows {rows}.")
    if not enabled():
        console.note(
            "Kernels are not used on this machine: the times of `kernels` are those of plain operations; "
            "its launches and host times are the kernels' own."
        )
