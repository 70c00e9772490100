"""The ``chat`` command: talk with a model in the terminal, and switch between adapters.

The conversation itself is ``serving/conversation.py``. This package has the slash commands (``commands.py``), the line
editor (``editor.py``) and the output of answers (``screens.py``, and ``rendered.py`` on a terminal).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ...config import GenerateConfig
from ...errors import ConfigError, MLXLoRAError
from .. import console
from ..generate import load_engine
from ..options import (
    adapter_option,
    build,
    checkpoint_option,
    chosen,
    config_options,
    json_option,
    model_option,
    system_option,
    trust_option,
)
from ..sections import SectionedCommand
from .commands import Commands, Leave
from .screens import screen_for


@click.command(cls=SectionedCommand)
@model_option(required=True)
@adapter_option(
    multiple=True, help="Folder of an adapter; repeat the option to switch between several. The first one is active."
)
@checkpoint_option
@system_option
@config_options(GenerateConfig)
@trust_option
@json_option
def chat(**params: Any):
    """Talk with a model in the terminal.

    The model remembers the conversation. Switch adapters with /adapter NAME or /adapter none; the base model is not
    loaded again. /compare shows an answer with and without the adapter, and /help lists all commands. If standard
    input is not a terminal, each line is a message or a command. Answers go to stdout, everything else to stderr.
    MLX_LORA_HISTORY names the file that keeps messages for the next session; if it is empty, no file is written.

    \b
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
    mlx-lora chat --model mlx-community/Llama-3.2-3B-Instruct-4bit --adapter-path pirate --adapter-path lawyer
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters < questions.txt > answers.txt
    """
    config = build(GenerateConfig, params)
    paths = params.pop("adapter_path")
    if params["checkpoint"] and not paths:
        chosen(None, params["checkpoint"])
    engine, names = load_engine(params, config, paths)
    from ...serving.conversation import Conversation

    conversation = Conversation(engine, config, params["system_prompt"], names[0] if names else None)
    commands = Commands(conversation, screen_for(params["as_json"]))
    if sys.stdin.isatty():
        from .editor import Editor

        talk(commands, Editor(commands))
    else:
        for line in lines():
            try:
                attempt(commands, line)
            except Leave:
                return


def talk(commands: Commands, read: Callable[[], str]) -> None:
    """Read and answer until the user leaves. Ctrl-C stops an answer, or empties the line being typed."""
    console.note(f"Adapter: {commands.conversation.adapter or 'none'}. /help lists the commands, /quit leaves.")
    while True:
        try:
            line = read()
        except KeyboardInterrupt:  # the editor has emptied the line
            console.note("Ctrl-D or /quit leaves.")
            continue
        except EOFError:
            return
        try:
            with interruptible(commands.conversation):
                attempt(commands, line)
        except Leave:
            return
        except KeyboardInterrupt:
            console.note("Interrupted.")


def attempt(commands: Commands, line: str) -> None:
    """Run one line and report its errors, so that a mistyped command does not end the chat. Raises: Leave."""
    try:
        commands.do(line)
    except MLXLoRAError as error:
        console.error(error.message, error.hint)


@contextmanager
def interruptible(conversation: Any) -> Iterator[None]:
    """A context in which Ctrl-C stops an answer after the present step. A second one, or one at any other time, raises
    KeyboardInterrupt."""

    def stop(*_: Any) -> None:
        if conversation.stopping or not conversation.answering:
            raise KeyboardInterrupt
        conversation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def lines() -> Iterator[str]:
    """The lines of standard input. Raises: ConfigError: it is not UTF-8."""
    try:
        while True:
            yield input()
    except EOFError:
        return
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8", "Convert it, such as with iconv -f LATIN1 -t UTF-8.") from None
