"""``report``: the page of a run, made again from its log, or the comparison of several runs."""

from __future__ import annotations

from pathlib import Path

import click

from . import console
from .options import json_option

COMPARISON = "comparison.html"


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option(
    "--output",
    metavar="FILE",
    help=f"File to write (default: report.html in the run's folder; {COMPARISON} here for several).",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@json_option
def report(folders: tuple[str, ...], output: str | None, open_page: bool, as_json: bool):
    """Show what a run did on one page, or compare several runs.

    A run writes report.html into its folder at the end. This command makes the page again from log.jsonl there, also
    while the run goes on. For several runs, it draws the curves in the same charts, and lists the best values and the
    settings that differ. The page is one file and needs no network.

    \b
    mlx-lora report adapters --open
    mlx-lora report rank-8 rank-16 rank-32 --output ranks.html
    """
    from ..runs.log import PAGE
    from ..runs.report import summary, write_report

    target = Path(output) if output else Path(folders[0]) / PAGE if len(folders) == 1 else Path(COMPARISON)
    runs = write_report(folders, target)
    for run in runs:
        if run.unreadable:
            lines = f"{run.unreadable} line{'s' * (run.unreadable > 1)}"
            console.warn(f"{run.name}: {lines} of the log cannot be read; the page leaves them out")
        if as_json:
            console.event("Report", {**summary(run), "page": target})
    if not as_json:
        console.data(str(target))
    if open_page:
        click.launch(target.resolve().as_uri())
