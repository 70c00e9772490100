"""The line editor of ``chat``: prompt_toolkit's, with history over sessions, several lines and completion."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from .commands import TABLE, Commands


def history_file() -> Path | None:
    """Return the history file: MLX_LORA_HISTORY (empty: no file), or a file in the user's folder."""
    named = os.environ.get("MLX_LORA_HISTORY")
    if named is not None:
        return Path(named).expanduser() if named else None
    return Path(click.get_app_dir("mlx-lora")) / "chat_history"


def _history(path: Path | None) -> Any:
    """The history in a file that only the user can read, or in memory where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Forgiving(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the conversation
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fchmod(file.fileno(), 0o600)
    except OSError:
        return InMemoryHistory()
    return Forgiving(str(path))


class Editor:
    """Reads a message or a command, which may have several lines.

    Args:
        extra: prompt_toolkit's ``input`` and ``output``, for tests.
    """

    def __init__(self, commands: Commands, **extra: Any):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.utils import is_dumb_terminal

        self._commands = commands
        if not is_dumb_terminal():  # for one that is, prompt_toolkit has an editor without control codes
            extra = {"output": create_output(always_prefer_tty=True), **extra}
        self._session = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(history_file()),
            completer=_completer(commands),
            key_bindings=_keys(),
            bottom_toolbar=self._toolbar,
            **extra,
        )

    def __call__(self) -> str:
        """The next message. Raises: KeyboardInterrupt: Ctrl-C; EOFError: Ctrl-D."""
        return self._session.prompt()

    def _toolbar(self) -> str:
        conversation = self._commands.conversation
        last = conversation.answers[-1].last if conversation.answers else None
        facts = [f"adapter: {conversation.adapter or 'none'}"]
        if last is not None:
            facts += [f"{last.prompt_tokens + last.generation_tokens} tokens", f"{last.generation_tps:.1f} tokens/s"]
        return "  ".join(facts)


def _keys() -> Any:
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER")

    @keys.add("enter", filter=typing)
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # take what Tab has chosen
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Commands) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    folders, files = PathCompleter(only_directories=True, expanduser=True), PathCompleter(expanduser=True)

    class Slash(Completer):
        """Completes commands, and what may follow them."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            name, blank, rest = text[1:].partition(" ")
            if not blank:
                yield from _words(name, {word: row.usages[0][1] for word, row in TABLE.items()})
                return
            kind = TABLE[name.removesuffix("!")].completes if name.removesuffix("!") in TABLE else ""
            names = dict.fromkeys([*commands.conversation.engine.bank.names, "none"], "")
            if kind == "adapters":
                yield from _words(rest, names)
            elif kind == "names":
                yield from _words(rest.rpartition(" ")[2], names)
            elif kind == "options" and rest.count(" ") % 2 == 0:
                options = {name: param.help for name, param in commands.options.items()}
                yield from _words(rest.rpartition(" ")[2], options)
            if kind in ("adapters", "files"):
                paths = folders if kind == "adapters" else files
                yield from paths.get_completions(Document(rest, len(rest)), complete_event)

    def _words(begun: str, words: dict[str, str]) -> Iterator[Completion]:
        for word, text in words.items():
            if word.startswith(begun):
                yield Completion(word, -len(begun), display_meta=text)

    return Slash()
