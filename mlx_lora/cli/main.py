"""The ``mlx-lora`` group, and the one place where errors become words and exit codes.

0: done. 1: an expected error (``Error:`` and ``Hint:``). 2: usage. 130: Ctrl-C. A traceback only with
``MLX_LORA_DEBUG=1``.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from .. import __version__
from ..errors import ConfigError, MLXLoRAError

# Command -> (module, one line for the overview). Modules are imported when their command is asked for.
COMMANDS = {
    "demo": ("demo", "See a small model learn, speak differently, and leave as a Hugging Face adapter."),
    "train": ("train", "Fine-tune a model."),
    "test": ("train", "Measure loss, perplexity and exact match on a test set."),
    "generate": ("talk", "Answer one prompt."),
    "chat": ("talk", "Talk with a model in the terminal, with and without adapters."),
    "fuse": ("adapters", "Merge an adapter into the model's weights."),
    "quantize": ("quantize", "Store a model in fewer bits: MLX's modes and NF4."),
    "merge": ("merge", "Add up several adapters into one, by weights."),
    "convert": ("adapters", "Convert an adapter from one format to another."),
    "inspect": ("adapters", "Describe an adapter without loading a model."),
    "bench": ("bench", "Measure the kernels on this machine."),
    "tables": ("tables", "The papers' parameter and memory tables, and those of a model at hand."),
    "push": ("hub", "Upload an adapter to the Hugging Face Hub, with a model card."),
    "pull": ("hub", "Download an adapter from the Hugging Face Hub."),
    "doctor": ("doctor", "Tell what this machine computes with, and how to make it faster."),
}


class Lazy(click.Group):
    """Commands by name, imported on demand: the overview needs none of them."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f".{COMMANDS[name][0]}", __package__), name)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(self, ctx, args):
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                error.message += f" Did you mean {near[0]!r}?"
            raise


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-lora")
def cli():
    """Fine-tune language models on Apple silicon, and take the adapter anywhere.

    \b
    mlx-lora demo                                        the whole way, in a minute
    mlx-lora train --model Qwen/Qwen3-0.6B --data my_data
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
    mlx-lora convert adapters my_peft_adapter --to peft
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers says without PyTorch that it has none; nobody here wants it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = cli.main(args, prog_name="mlx-lora", standalone_mode=False)
    except MLXLoRAError as error:
        fail(error.message, error.hint, 2 if isinstance(error, ConfigError) else 1)
    except click.ClickException as error:
        _misused(error, sys.argv[1:] if args is None else args)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = None
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MLX_LORA_DEBUG"):
            raise
        text = str(error).strip().splitlines()
        fail(
            f"{type(error).__name__}: {text[0] if text else 'no message'}",
            "This was not expected. MLX_LORA_DEBUG=1 shows where it happened; please report it.",
            1,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _misused(error: click.ClickException, args: list[str]) -> None:
    """A wrong option or argument: the usage, the error and where to read on. Bare ``mlx-lora`` gets its help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)  # not every parser error of click knows where it was
    command = context.command_path if context else " ".join(["mlx-lora", *[a for a in args[:1] if a in COMMANDS]])
    if context:
        click.echo(context.get_usage(), err=True)
    what = getattr(getattr(error, "param", None), "help", None)  # of the option that is wrong
    there = "the commands" if command == "mlx-lora" else "its options and arguments"
    fail(error.format_message(), f"{what + ' ' if what else ''}See {command} --help for {there}.", error.exit_code)


def fail(message: str, hint: str, code: int) -> None:
    """``Error:`` and ``Hint:`` on stderr, then exit."""
    if os.environ.get("MLX_LORA_DEBUG"):
        import traceback

        traceback.print_exc()
    click.echo(click.style("Error: ", fg="red", bold=True) + message, err=True)
    click.echo(click.style("Hint: ", bold=True) + hint, err=True)
    sys.exit(code)
