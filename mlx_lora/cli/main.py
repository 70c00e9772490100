"""The ``mlx-lora`` command group, and the one place that turns errors into messages and exit codes.

Exit codes: 0 success, 1 an expected error (``Error:`` and ``Hint:``), 2 wrong usage, 130 Ctrl-C. A traceback is shown
only with ``MLX_LORA_DEBUG=1``.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from pathlib import Path

import click

from .. import __version__
from ..errors import ConfigError, LostProcessError, MLXLoRAError
from . import console

# Command -> (module, line in `mlx-lora --help`). A module is imported when its command is used.
COMMANDS = {
    "demo": ("demo", "Fine-tune a built-in tiny model and compare its answers before and after."),
    "plan": ("plan", "Estimate a run before it starts: memory, steps, time, and the Macs that it fits on."),
    "train": ("train", "Fine-tune a model."),
    "test": ("train", "Measure loss, perplexity and exact match on a test set."),
    "report": ("report", "Show what a run did on one page, or compare several runs."),
    "generate": ("generate", "Answer one prompt."),
    "chat": ("chat", "Chat with a model in the terminal, with and without adapters."),
    "serve": ("serve", "Serve a model and its adapters over HTTP, as OpenAI and Anthropic do."),
    "fuse": ("adapters", "Merge an adapter into the model's weights."),
    "quantize": ("quantize", "Quantize a model with MLX's modes or NF4."),
    "merge": ("merge", "Merge several adapters into one."),
    "convert": ("adapters", "Convert an adapter from one format to another."),
    "inspect": ("adapters", "Describe an adapter without loading a model."),
    "bench": ("bench", "Benchmark the kernels on this machine, or run all checks that need a GPU."),
    "tables": ("tables", "Recompute the parameter and memory tables of the LoRA papers, or of a model."),
    "push": ("hub", "Upload an adapter to the Hugging Face Hub, with a model card."),
    "pull": ("hub", "Download an adapter from the Hugging Face Hub."),
    "doctor": ("doctor", "Show what MLX computes with on this machine, and how to make it faster."),
}
_LAUNCHER = 4.0  # seconds within which mlx.launch ends the other processes after one has failed


class Lazy(click.Group):
    """Commands by name, imported when used; `mlx-lora --help` imports none."""

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
    """Fine-tune language models on Apple silicon with LoRA, and convert adapters between formats.

    \b
    mlx-lora demo                                        from training to export, in a minute
    mlx-lora train --model Qwen/Qwen3-0.6B --data my_data
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
    mlx-lora convert adapters my_peft_adapter --to peft
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Without PyTorch, transformers warns that it is missing; mlx-lora does not need it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.showwarning = lambda message, *_: console.warn(str(message))
    try:
        code = cli.main(args, prog_name="mlx-lora", standalone_mode=False)
    except MLXLoRAError as error:
        _leave_to_rank_0(error)
        fail(error.message, error.hint, 2 if isinstance(error, ConfigError) else 1)
    except click.ClickException as error:
        _leave_to_rank_0(error)
        _misused(error, sys.argv[1:] if args is None else args)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the output has ended
        sys.stdout = None
        sys.exit(0)
    except Exception as error:
        if os.environ.get("MLX_LORA_DEBUG"):
            raise
        _failed_write(error)
        text = str(error).strip().splitlines()
        fail(
            f"{type(error).__name__}: {text[0] if text else 'no message'}",
            "This is a bug. Set MLX_LORA_DEBUG=1 to see where it happened, and please report it.",
            1,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _leave_to_rank_0(error: Exception) -> None:
    """In a distributed run, let only rank 0 show an error that all processes raise.

    ``mlx.launch`` ends the other processes a second or two after rank 0 has failed. If it has not, this process shows
    its error after the wait.
    """
    lost = isinstance(error, LostProcessError) and error.rank == 0
    if os.environ.get("MLX_RANK", "0") != "0" and not lost:
        time.sleep(_LAUNCHER)


def _failed_write(error: Exception) -> None:
    """Exit with a message if the error is a failed write that no other code has caught; return otherwise."""
    if isinstance(error, OSError):
        from ..base.writing import WRITE_ERRORS, failed_write

        if error.errno in WRITE_ERRORS:
            known = failed_write(Path(error.filename or "the output"), error)
            fail(known.message, known.hint, 1)


def _misused(error: click.ClickException, args: list[str]) -> None:
    """Show the usage, the error and the help to read for a wrong option or argument. ``mlx-lora`` alone shows help."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        error.show()
        sys.exit(error.exit_code)
    context = getattr(error, "ctx", None)  # not every click error has one
    command = context.command_path if context else " ".join(["mlx-lora", *[a for a in args[:1] if a in COMMANDS]])
    if context:
        click.echo(context.get_usage(), err=True)
    what = getattr(getattr(error, "param", None), "help", None)  # help text of the wrong option
    if isinstance(error, click.NoSuchOption):
        from .old_names import did_you_mean, instead_of

        names = {opt for param in context.command.params for opt in param.opts} if context else ()
        new, error.possibilities = instead_of(error.option_name, names), None
        near = "" if new else did_you_mean(error.option_name, names)
        error.message = f"No such option {error.option_name!r}{near or '.'}"
        what = f"Write {new} instead." if new else None
    there = "the commands" if command == "mlx-lora" else "its options and arguments"
    fail(error.format_message(), f"{what + ' ' if what else ''}See {command} --help for {there}.", error.exit_code)


def fail(message: str, hint: str, code: int) -> None:
    """``Error:`` and ``Hint:`` on stderr, then exit."""
    if os.environ.get("MLX_LORA_DEBUG"):
        import traceback

        traceback.print_exc()
    console.error(message, hint)
    sys.exit(code)
