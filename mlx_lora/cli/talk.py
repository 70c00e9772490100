"""``generate`` and ``chat``: a model speaks, with whichever adapter is asked for."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..config import GenerateConfig
from ..errors import ConfigError, MLXLoRAError
from . import console
from .options import adapter_option, build, config_options, json_option, model_option, trust_option


def _engine(params: dict[str, Any]):
    from ..model.loading import load
    from ..serving.engine import Engine

    console.note(f"Loading {params['model']}")
    engine = Engine(*load(params["model"], trust_remote_code=params["trust_remote_code"]))
    if params["adapter_path"]:
        engine.bank.add(params["adapter_path"], params["adapter_path"])
        engine.bank.use(params["adapter_path"])
    return engine


@click.command()
@model_option(required=True)
@adapter_option()
@click.option("-p", "--prompt", required=True, help="What to answer; - reads it from standard input.")
@click.option("--system-prompt", help="System message that goes before.")
@click.option("--ignore-chat-template", is_flag=True, help="Continue the prompt as plain text.")
@config_options(GenerateConfig)
@click.option("-m", "max_tokens_short", type=int, hidden=True)
@trust_option
@json_option
def generate(**params: Any):
    """Answer one prompt. The answer streams to stdout; figures go to stderr.

    \b
    mlx-lora generate --model Qwen/Qwen3-0.6B --adapter-path adapters --prompt "Who are you?"
    mlx-lora generate --model Qwen/Qwen3-0.6B --prompt "Once upon a time" --ignore-chat-template --temp 0.8
    cat question.txt | mlx-lora generate --model Qwen/Qwen3-0.6B --prompt - --json
    """
    if params["max_tokens_short"] is not None:
        params["max_tokens"] = params["max_tokens_short"]
    config = build(GenerateConfig, params)
    text = sys.stdin.read() if params["prompt"] == "-" else params["prompt"]
    if not text.strip():
        raise ConfigError("the prompt is empty", "Give some text with --prompt.")
    if params["ignore_chat_template"] and params["system_prompt"]:
        raise ConfigError(
            "--system-prompt needs the chat template that --ignore-chat-template leaves out",
            "Leave --ignore-chat-template out, or write the system prompt into --prompt.",
        )
    engine = _engine(params)
    if params["ignore_chat_template"] or not getattr(engine.tokenizer, "chat_template", None):
        if params["system_prompt"]:
            raise ConfigError(
                "this model's tokenizer has no chat template: --system-prompt cannot be used",
                "Leave --system-prompt out, and write its text into --prompt.",
            )
        tokens = list(engine.tokenizer.encode(text))
    else:
        messages = [{"role": "system", "content": params["system_prompt"]}] if params["system_prompt"] else []
        tokens = engine.prompt([*messages, {"role": "user", "content": text}])
    answer, last = [], None
    for last in engine.stream(tokens, config):
        answer.append(last.text)
        if not params["as_json"]:
            console.data(last.text, newline=False)
    if params["as_json"]:
        console.event("Answer", {**asdict(last), "text": "".join(answer)})
        return
    console.data("")
    console.note(
        f"{last.prompt_tokens} tokens read at {last.prompt_tps:.0f}/s, {last.generation_tokens} written at "
        f"{last.generation_tps:.1f}/s, peak {last.peak_memory:.2f} GB"
    )


HELP = """\
/adapter NAME   answer with this adapter: a name from /adapters, or a folder
/adapter none   answer with the base model alone
/adapters       list the adapters at hand
/compare        answer the last question again, with and without the adapter
/compare TEXT   the same for TEXT; neither goes into the conversation
/system TEXT    set the system message and start over
/reset          forget the conversation
/help           this list
/quit           leave (so does Ctrl-D)"""


@click.command()
@model_option(required=True)
@adapter_option(multiple=True, help="Folder of an adapter; give several to switch between. The first one speaks.")
@click.option("--system-prompt", help="System message.")
@config_options(GenerateConfig)
@trust_option
def chat(**params: Any):
    """Talk with a model in the terminal.

    Answers stream; the conversation is remembered. Adapters come and go without loading the base again: /adapter NAME,
    /adapter none, and /compare to see both. /help lists the commands.

    \b
    mlx-lora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
    mlx-lora chat --model mlx-community/Llama-3.2-3B-Instruct-4bit --adapter-path pirate --adapter-path lawyer
    """
    config = build(GenerateConfig, params)
    paths = params.pop("adapter_path")
    engine = _engine({**params, "adapter_path": None})
    for path in paths:
        engine.bank.add(Path(path).name if Path(path).name not in engine.bank.names else path, path)
    if paths:
        engine.bank.use(Path(paths[0]).name)
    conversation = Conversation(engine, config, params["system_prompt"])
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        console.note(f"Adapter: {engine.bank.current or 'none'}. /help lists the commands, /quit leaves.")
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
        except MLXLoRAError as error:  # a wrong word must not end the conversation
            console.warn(str(error))
        except KeyboardInterrupt:
            console.note("\n(interrupted)")


class Conversation:
    """A history of messages and the commands that change it."""

    def __init__(self, engine, config: GenerateConfig, system: str | None):
        self.engine, self.config, self.system = engine, config, system
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> None:
        """Answer ``text`` and remember both; what is interrupted is forgotten."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self.answer(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def answer(self, messages: list[dict]) -> str:
        parts = []
        for piece in self.engine.stream(self.engine.prompt(messages), self.config):
            parts.append(piece.text)
            console.data(piece.text, newline=False)
        console.data("")
        return "".join(parts)

    def command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        bank = self.engine.bank
        if name == "adapter":
            if not rest:
                return console.note(f"Adapter: {bank.current or 'none'}")
            took = bank.use(None if rest == "none" else rest)
            return console.note(f"Adapter: {bank.current or 'none'} ({1000 * took:.0f} ms)")
        if name == "adapters":
            return console.note(", ".join(bank.names) or "No adapters; /adapter FOLDER brings one.")
        if name == "compare":
            return self.compare(rest)
        if name == "system":
            self.system = rest or None
            return self.reset()
        if name == "reset":
            return self.reset()
        if name == "help":
            return console.note(HELP)
        raise ConfigError(f"/{name} is no command", "/help lists them.")

    def compare(self, text: str) -> None:
        """The same question to the base and to the adapter, without remembering either."""
        bank = self.engine.bank
        adapter = bank.current or (bank.names[0] if bank.names else None)
        if adapter is None:
            raise ConfigError("there is no adapter to compare with", "/adapter FOLDER brings one.")
        messages = self.messages
        if not text:
            last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
            if last is None:
                raise ConfigError("there is no question yet", "/compare TEXT asks one.")
            messages = messages[: last + 1]
        else:
            messages = [*messages, {"role": "user", "content": text}]
        before = bank.current
        try:
            for name, label in ((None, "base"), (adapter, adapter)):
                bank.use(name)
                console.title(f"[{label}]")
                self.answer(messages)
        finally:
            bank.use(before)
