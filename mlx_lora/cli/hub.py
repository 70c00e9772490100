"""``push`` and ``pull``: adapters on the Hugging Face Hub."""

from __future__ import annotations

import click

from . import console
from .options import force_option, json_option, model_option


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
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to.")
@click.option("--message", default="Upload adapter", show_default=True, help="Of the commit.")
@click.option("--metric", "metrics", type=Metric(), multiple=True, help="A number for the card, such as val_loss=1.2.")
@click.option("--from", "source", metavar="FORMAT", help="Format of SRC; by default it is told by the files.")
@json_option
def push(path, repo, model, private, revision, message, metrics, source, as_json):
    """Upload the adapter SRC to the Hugging Face Hub, with a model card made from it.

    A README.md in the folder is uploaded in place of the card; states of training stay here. The card names the base
    model where it is a repository's (--model, or as the adapter tells it).

    \b
    mlx-lora push adapters me/my-adapter --model Qwen/Qwen3-0.6B --metric val_loss=1.21
    """
    from ..hub import push as upload

    where = upload(
        path,
        repo,
        private=private,
        revision=revision,
        message=message,
        base=model,
        metrics=dict(metrics),
        format=source,
    )
    if as_json:
        return console.event("Pushed", {"path": path, "repository": repo, "commit": where})
    console.note(f"{path} -> {repo}: {where}")


@click.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.argument("folder", metavar="FOLDER", default="adapters")
@click.option("--revision", metavar="BRANCH", help="Branch, tag or commit.")
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
