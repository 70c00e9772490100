"""``push`` and ``pull``: adapters on the Hugging Face Hub."""

from __future__ import annotations

import click

from . import console
from .options import checkpoint_option, chosen, force_option, json_option, model_option


class Metric(click.ParamType):
    """``NAME=NUMBER``."""

    name = "name=number"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        name, equals, number = str(value).partition("=")
        try:
            return name.strip(), float(number) if equals and name.strip() else float("")
        except ValueError:
            self.fail(f"{value!r} is not of the form NAME=NUMBER", param, ctx)


@click.command()
@click.argument("path", metavar="SRC")
@click.argument("repo", metavar="OWNER/NAME")
@model_option()
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to.")
@click.option("--message", default="Upload adapter", show_default=True, help="Commit message.")
@click.option(
    "--metric", "metrics", type=Metric(), multiple=True, help="Add a number to the model card, such as val_loss=1.2."
)
@click.option("--from", "source", metavar="FORMAT", help="Format of SRC (default: detected from its files).")
@checkpoint_option
@json_option
def push(path, repo, model, private, revision, message, metrics, source, checkpoint, as_json):
    """Upload the adapter SRC to the Hugging Face Hub, with a generated model card.

    A README.md in the folder is used as the card. Training states are not uploaded. Paths of this machine are removed
    from the uploaded files. The base model's path is replaced by its name on the Hub: give it with --model unless the
    adapter records it.

    \b
    mlx-lora push adapters me/my-adapter --model Qwen/Qwen3-0.6B --metric val_loss=1.21
    """
    from ..hub import push as upload

    chosen(path, checkpoint)  # push reads the card in the run's folder, too
    notes: list[str] = []
    where = upload(
        path,
        repo,
        private=private,
        revision=revision,
        message=message,
        base=model,
        metrics=dict(metrics),
        format=source,
        notes=notes,
        checkpoint=checkpoint,
    )
    for text in notes:
        console.warn(text)
    if as_json:
        return console.event("Pushed", {"path": path, "repository": repo, "commit": where})
    console.note(f"{path} -> {repo}: {where}")


@click.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.argument("folder", metavar="FOLDER", default="adapters")
@click.option("--revision", metavar="BRANCH", help="Branch, tag or commit to download.")
@force_option
@json_option
def pull(repo, folder, revision, force, as_json):
    """Download an adapter from the Hugging Face Hub into FOLDER (default: adapters).

    \b
    mlx-lora pull someone/some-adapter adapters
    """
    from ..hub import pull as download

    format = download(repo, folder, revision=revision, overwrite=force)
    if as_json:
        return console.event("Pulled", {"repository": repo, "path": folder, "format": format})
    console.note(f"{repo} -> {folder} ({format})")
