"""``bench``: benchmarks on this machine."""

from __future__ import annotations

import click

from . import console
from .options import json_option

SIZES = ("1b", "4b", "8b", "tiny")  # keys of ``bench.SIZES``


@click.group()
def bench():
    """Run benchmarks on this machine.

    \b
    mlx-lora bench kernels
    mlx-lora bench check
    mlx-lora bench estimate --report check-gpu/report.json
    """


@bench.command()
@click.option(
    "--size", type=click.Choice(SIZES), default="8b", show_default=True, help="Which model's layer to measure."
)
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16"]),
    default="4",
    help="Bits of the base; 16: not quantized.",
)
@click.option("--rows", type=click.IntRange(1, 8), default=1, show_default=True, help="Tokens processed at once.")
@click.option("--iters", type=click.IntRange(1), default=20, show_default=True, help="Repeats; the median is reported.")
@json_option
def kernels(size, rank, bits, rows, iters, as_json):
    """Time every kernel next to plain operations and mlx-lm's layers.

    Decoding: a layer's linears, its MLP, DoRA, multi-LoRA, NF4. Training: DoRA's norms, NF4 dequantization, output head
    and loss ("kernels": in chunks of tokens). "base" is the layer without adapter; "host us" is the time that Python
    and MLX take to build the graph. On CUDA, set MLX_LORA_KERNELS=on to run the kernels.

    \b
    mlx-lora bench kernels
    mlx-lora bench kernels --size 1b --rows 4 --json
    """
    from ..bench import SIZES as MODELS
    from ..bench import measure_kernels
    from ..kernels import enabled

    lines = []
    for found in measure_kernels(MODELS[size], rank, int(bits), rows, iters):
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


@bench.command()
@click.option(
    "--out", type=click.Path(file_okay=False), default="check-gpu", show_default=True, help="Folder for the report."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=6.0, show_default=True, help="Budget.")
@click.option("--emulate", is_flag=True, help="Dry run on the Metal emulator in a checkout's tests/, with tiny models.")
@click.option("--tests", type=click.IntRange(1), help="Run at most this many kernel tests (default: all).")
def check(out, minutes, emulate, tests):
    """Run every check and measurement that needs a GPU, and write report.json and report.md.

    In this order: the doctor's facts, the kernel tests on the GPU, bench kernels, decoding, training steps, prompts,
    and a swap of adapters, next to mlx-lm's layers. The models have random weights; nothing is downloaded. The report
    is complete after every part, even if the run is stopped. scripts/check_gpu installs what it needs first.

    \b
    mlx-lora bench check
    mlx-lora bench check --out my_mac --minutes 12
    """
    from ..bench import Check, markdown

    running = Check(out, minutes, emulate, tests)
    try:
        for part in running.run():
            console.note(f"{part.name}: {part.state}" + (f" after {part.seconds:.0f} s" if part.seconds else ""))
            for text in part.notes if part.state != "running" else ():
                console.warn(f"{part.name}: {text}")
    finally:
        console.note(f"The report is in {running.out / 'report.md'} and report.json.")
    console.data(markdown(running.report), newline=False)
    if running.report.tests.failures:
        raise click.exceptions.Exit(1)


@bench.command()
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="A report.json of bench check, whose bandwidth and cost of a launch are used. May be given several times.",
)
@click.option(
    "--efficiency",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the data sheet's bandwidth that is reached.",
)
@click.option("--microseconds", type=click.FloatRange(0), help="Cost of a dependent launch.")
def estimate(reports, efficiency, microseconds):
    """Print the table of estimated decoding speeds in metal/README.md.

    \b
    mlx-lora bench estimate
    mlx-lora bench estimate --report check-gpu/report.json
    """
    import dataclasses

    from ..bench import assumptions_of, counts, read_report, table

    found = {path: read_report(path) for path in reports}
    for path, report in found.items():
        if not counts(report):
            console.warn(f"{path} is not of a run on Metal, so the estimates for Macs do not use it.")
    given = assumptions_of(found.values())
    changes = {"efficiency": efficiency, "microseconds": microseconds}
    changes = {name: value for name, value in changes.items() if value is not None}
    given = dataclasses.replace(given, **changes, **({"source": "the command line"} if changes else {}))
    console.data(table(given))
    console.note(
        f"{100 * given.efficiency:.0f} % of the bandwidth in the data sheet, {given.microseconds:.1f} us for each "
        f"dependent launch ({given.source})."
    )
