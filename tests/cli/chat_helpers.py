"""A chat whose model writes what a test says, one question after the other."""

from __future__ import annotations

from types import SimpleNamespace

from mlx_lora.cli.chat.commands import Commands
from mlx_lora.cli.chat.screens import Plain
from mlx_lora.formats import detect_format
from mlx_lora.serving.conversation import Conversation
from mlx_lora.serving.requests import Piece


class Bank:
    """Names of adapters, and what was loaded."""

    def __init__(self, *names: str):
        self.names, self.loaded = list(names), []

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def load(self, name: str) -> None:
        self.loaded.append(name)

    def add(self, name: str, adapter: str) -> None:
        detect_format(adapter)
        self.names.append(name)

    def listed(self) -> list:
        return []


class Scripted:
    """An engine without a model: ``answers`` are texts, or pairs of a kind and a text; by turn, and then by request."""

    tokenizer = SimpleNamespace(tool_call_start="<call>", tool_call_end="</call>")
    template = SimpleNamespace(source="")
    vocab_size, context_length = 100, None

    def __init__(self, *answers, names: tuple[str, ...] = ()):
        import mlx.nn as nn

        self.model, self.bank = nn.Linear(1, 1), Bank(*names)
        self.answers, self.requests, self.prompts = list(answers), [], []

    def prompt(self, messages, tools=None, config=None):
        self.prompts.append(list(messages))
        return [1, 2, 3]

    def state_after(self, tokens):
        return "normal"

    def stream_all(self, requests, stopped):
        self.requests = list(requests)
        turn = self.answers.pop(0)
        for number, parts in enumerate(turn if isinstance(turn, list) else [turn]):
            parts = [("normal", parts)] if isinstance(parts, str) else parts
            for at, (kind, text) in enumerate(parts):
                last = at == len(parts) - 1
                yield number, Piece(text, kind, 1, "stop" if last else None, None, None, 3, 2, 9.0, 4, 8.0, 0.1)


def scripted(*answers, names: tuple[str, ...] = (), screen=None, **config) -> Commands:
    """A chat with such an engine."""
    from mlx_lora.config import GenerateConfig

    return Commands(Conversation(Scripted(*answers, names=names), GenerateConfig(**config)), screen or Plain())
