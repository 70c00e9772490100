"""``chat``: talk with a model in the terminal, and switch between adapters."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import click

from ..config import GenerateConfig
from ..errors import AdapterError, ConfigError, MLXLoRAError
from . import console
from .generate import load_engine
from .options import adapter_option, build, checkpoint_option, chosen, config_options, model_option, trust_option
from .sections import SectionedCommand

HELP = """\
/adapter NAME   answer with this adapter: a name from /adapters, or a folder
/adapter none   answer with the base model alone
/adapters       list the loaded adapters
/compare        answer the last question again, with and without the adapter
/compare TEXT   answer TEXT with and without the adapter; neither answer joins the conversation
/system TEXT    set the system message and start a new conversation
/reset          start a new conversation
/help           show this list
/quit           leave (or press Ctrl-D)"""


@click.command(cls=SectionedCommand)
@model_option(required=True)
@adapter_option(
    multiple=True, help="Folder of an adapter; repeat the option to switch between several. The first one is active."
)
@checkpoint_option
@click.option("--system-prompt", help="System message.")
@config_options(GenerateConfig)
@trust_option
def chat(**params: Any):
    """Talk with a model in the terminal.

    The model remembers the conversation. Switch adapters with /adapter NAME or /adapter none; the base model is not
    loaded again. /compare shows an answer with and without the adapter, and /help lists all commands.

    \b
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
    mlx-lora chat --model mlx-community/Llama-3.2-3B-Instruct-4bit --adapter-path pirate --adapter-path lawyer
    """
    config = build(GenerateConfig, params)
    paths = params.pop("adapter_path")
    if params["checkpoint"] and not paths:
        chosen(None, params["checkpoint"])
    engine, names = load_engine(params, config, paths)
    conversation = Conversation(engine, config, params["system_prompt"], names[0] if names else None)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        console.note(f"Adapter: {conversation.adapter or 'none'}. /help lists the commands, /quit leaves.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            console.note()
            break
        if line in ("/quit", "/exit", "/q"):
            break
        if not line:
            continue
        try:
            conversation.command(line) if line.startswith("/") else conversation.say(line)
        except MLXLoRAError as error:  # a mistyped command must not end the conversation
            console.warn(str(error))
        except KeyboardInterrupt:
            console.note("\n(interrupted)")


class Conversation:
    """The messages so far, and the commands that change them."""

    def __init__(self, engine, config: GenerateConfig, system: str | None, adapter: str | None = None):
        self.engine, self.config, self.system, self.adapter = engine, config, system, adapter
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        """Answer ``text`` and remember both, unless interrupted."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self.answer(messages, self.adapter)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def answer(self, messages: list[dict], adapter: str | None) -> str:
        """Stream the answer to ``messages`` with an adapter to stdout, and return it."""
        from ..serving.requests import Request

        parts = []
        tokens = self.engine.prompt(messages, config=self.config)
        for piece in self.engine.stream(Request(tokens, self.config, adapter)):
            parts.append(piece.text)
            console.data(piece.text, newline=False)
        console.data("")
        return "".join(parts)

    def command(self, line: str) -> None:
        """Run a line that begins with a slash."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        bank = self.engine.bank
        if name == "adapter":
            if not rest:
                return console.note(f"Adapter: {self.adapter or 'none'}")
            return self.switch(None if rest == "none" else rest)
        if name == "adapters":
            return console.note(", ".join(bank.names) or "No adapters. /adapter FOLDER loads one.")
        if name == "compare":
            return self.compare(rest)
        if name == "system":
            self.system = rest or None
            return self.reset()
        if name == "reset":
            return self.reset()
        if name == "help":
            return console.note(HELP)
        raise ConfigError(f"/{name} is not a command", "/help lists them.")

    def switch(self, name: str | None) -> None:
        """Answer with adapter ``name`` from now on: one of the bank's, or a folder."""
        bank, tic = self.engine.bank, time.perf_counter()
        if name is not None:
            if name not in bank and Path(name).is_dir():
                bank.add(name, chosen(name, None))
            elif name not in bank:
                known = ", ".join(bank.names) or "none"
                raise AdapterError(f"no adapter named {name!r}", f"Known: {known}. An adapter's folder works, too.")
            bank.load(name)
        self.adapter = name
        console.note(f"Adapter: {name or 'none'} ({1000 * (time.perf_counter() - tic):.0f} ms)")

    def compare(self, text: str) -> None:
        """Answer one question with the base model and with the adapter, without remembering either answer."""
        bank = self.engine.bank
        adapter = self.adapter or (bank.names[0] if bank.names else None)
        if adapter is None:
            raise ConfigError("there is no adapter to compare with", "/adapter FOLDER loads one.")
        messages = self.messages
        if not text:
            last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
            if last is None:
                raise ConfigError("there is no question yet", "/compare TEXT asks one.")
            messages = messages[: last + 1]
        else:
            messages = [*messages, {"role": "user", "content": text}]
        for name, label in ((None, "base"), (adapter, adapter)):
            console.data(f"[{label}]")  # beside the answers, also where these are piped
            self.answer(messages, name)
