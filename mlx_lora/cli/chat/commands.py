"""The slash commands of ``chat``: one table, which ``/help`` shows and the line editor completes."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import AdapterError, ConfigError
from .. import console
from ..generate import add_adapter
from ..options import chosen
from .settings import converted, listing, option_params, pairs, shown

BASE = ("none", "base")  # names for the base model without an adapter


class Leave(Exception):
    """The user leaves."""


class Command(NamedTuple):
    """A row of the table."""

    usages: tuple[tuple[str, str], ...]  # (arguments, what the command then does)
    completes: str = ""  # what the line editor completes after it: adapters, names, options or files


TABLE = {
    "adapter": Command((("NAME", "answer with this adapter: a name from /adapters, a folder, or none"),), "adapters"),
    "adapters": Command((("", "list the loaded adapters"),)),
    "compare": Command(
        (
            ("", "answer the last question again, with the base and with the adapter"),
            ("A B none", "answer it with these adapters; none is the base"),
            ("TEXT", "answer TEXT after the conversation so far; the conversation does not change"),
            ("A B -- TEXT", "answer TEXT with these adapters; /compare -- TEXT never reads TEXT as names"),
        ),
        "names",
    ),
    "system": Command((("TEXT", "set the system message (none: remove it) and start a new conversation"),)),
    "retry": Command((("", "answer the last question again and replace the answer"),)),
    "undo": Command((("", "remove the last question and its answer; repeat it for earlier ones"),)),
    "save": Command((("FILE", "save the conversation as a .jsonl that train reads; /save! replaces a file"),), "files"),
    "load": Command((("FILE [N]", "continue the conversation in a file, or number N of several"),), "files"),
    "set": Command(
        (
            ("", "list the generation options"),
            ("temp 0.7", "set one or several: /set temp 0.7 top_p 0.9; the value default resets an option"),
        ),
        "options",
    ),
    "stats": Command((("", "tokens, speed and memory of the last answer, and the length of the conversation"),)),
    "reset": Command((("", "start a new conversation"),)),
    "help": Command((("", "show this list"),)),
    "quit": Command((("", "leave, as Ctrl-D does"),)),
}
KEYS = """\
Enter sends. Alt+Enter, or a backslash before Enter, begins a new line; pasted text keeps its lines. Tab completes.
Ctrl-C stops an answer and keeps its text so far, or empties the line. // begins a message with a slash."""


class Commands:
    """Runs the lines of one conversation and shows the results on one screen."""

    def __init__(self, conversation: Any, screen: Any):
        self.conversation, self.screen = conversation, screen
        self.options = option_params()

    def do(self, line: str) -> None:
        """Answer a message, or run a command. Raises: Leave; what is wrong with the line or the request."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            return self._run(line)
        if line:
            self._show(self.conversation.say(line.removeprefix("/") if line.startswith("//") else line))

    def _run(self, line: str) -> None:
        name, text = [*line[1:].split(maxsplit=1), "", ""][:2]
        name = name.lower()
        if name in ("exit", "q"):
            name = "quit"
        if name == "save!":
            return self.save(text, overwrite=True)
        if name not in TABLE:
            raise ConfigError(
                f"/{name} is not a command{_meant(name, TABLE, '/')}",
                "/help lists them. To send a message that begins with /, write //.",
            )
        if text and not any(usage for usage, _ in TABLE[name].usages):
            raise ConfigError(f"/{name} takes no arguments, not {text!r}", f"Write /{name} alone.")
        getattr(self, name)(*([text] if any(usage for usage, _ in TABLE[name].usages) else []))

    def _show(self, events: Any, labels: list[str] | None = None) -> None:
        before = self.conversation.messages
        try:
            self.screen.show(events, self.conversation, labels)
        finally:
            if self.conversation.stopping:
                kept = "nothing of the answer" if before is self.conversation.messages else "the answer so far"
                console.note("Stopped." if labels else f"Stopped: {kept} is kept. /retry asks the question again.")
            self.conversation.stopping = False

    # One method for each row of the table.

    def adapter(self, name: str) -> None:
        if name:
            tic, bank = time.perf_counter(), self.conversation.engine.bank
            found = None if name == "none" else self._named(name)
            if found is None and name not in BASE:
                if not Path(name).expanduser().exists():
                    known = ", ".join([*bank.names, "none"])
                    raise AdapterError(
                        f"no adapter named {name!r}{_meant(name, bank.names)}",
                        f"Known: {known}. An adapter's folder works, too.",
                    )
                path = str(Path(name).expanduser())
                found = add_adapter(bank, path, chosen(path, None))
            self.conversation.switch(found)
            console.note(f"Adapter: {found or 'none'} ({1000 * (time.perf_counter() - tic):.0f} ms)")
        else:
            console.note(f"Adapter: {self.conversation.adapter or 'none'}")

    def adapters(self) -> None:
        names = self.conversation.engine.bank.names
        shown = [f"{name} (active)" if name == self.conversation.adapter else name for name in names]
        console.note(", ".join(shown) or "No adapters. /adapter FOLDER loads one.")

    def compare(self, text: str) -> None:
        names, question = self._names_and_text(text)
        adapters = self.conversation.rivals(names)
        if question is not None:
            count = self.conversation.questions
            so_far = f"after the {count} question{'s' * (count != 1)} so far" if count else "as a first question"
            console.note(f"Asked {so_far}, without adding it to the conversation: {question}")
        self._show(self.conversation.compare(adapters, question), [name or "base" for name in adapters])

    def _names_and_text(self, text: str) -> tuple[list[str | None], str | None]:
        """The adapters and the question after ``/compare``."""
        before, dashes, after = f" {text} ".partition(" -- ")
        names = self._names(before.strip(), text)
        if names is None:
            return [], text
        if dashes and not after.strip():
            raise ConfigError("there is no text after --", "Write /compare A B -- TEXT, or leave -- out.")
        return names, after.strip() or None

    def _names(self, text: str, whole: str) -> list[str | None] | None:
        """The adapters that a text names, None if it is another text. Raises: AdapterError: one is nearly a name."""
        try:
            words = shlex.split(text)
        except ValueError:  # an apostrophe
            return None
        known = [*self.conversation.engine.bank.names, *BASE]
        unknown = [word for word in words if word not in known]
        if not unknown:
            return [self._named(word) for word in words]
        near = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.8) for word in unknown}
        if not all(near.values()):
            return None
        meant = " ".join(near[word][0] if word in near else word for word in words)
        raise AdapterError(
            f"no adapter named {', '.join(map(repr, unknown))}; did you mean /compare {meant}?",
            f"/compare -- {whole} asks that as a text.",
        )

    def _named(self, word: str) -> str | None:
        """The adapter's name, None for the base. An adapter may be called base, but none is always the base."""
        return word if word != "none" and word in self.conversation.engine.bank else None

    def system(self, text: str) -> None:
        if text:
            self.conversation.start(None if text == "none" else text)
        console.note(f"System message: {self.conversation.system or 'none'}")

    def retry(self) -> None:
        earlier = self.conversation.messages[-1:]
        self._show(self.conversation.retry())
        answers, latest = self.conversation.answers, self.conversation.messages[-1:]
        if self.conversation.config.temp == 0 and earlier == latest and answers[0].complete:
            console.note("The same answer as before: with temp 0 answers do not vary. /set temp 0.7 makes them vary.")

    def undo(self) -> None:
        console.note(f"Removed: {self.conversation.undo()}")

    def save(self, file: str, overwrite: bool = False) -> None:
        path = _file(file, "/save chat.jsonl")
        self.conversation.save(path, overwrite)
        console.note(f"Saved {path}")

    def load(self, file: str) -> None:
        path, number = _file(file, "/load chat.jsonl"), None
        name, _, last = file.rpartition(" ")
        if not path.exists() and name and last.isdecimal():
            path, number = _file(name, ""), int(last)
        self.conversation.load(path, number)
        count, asked = self.conversation.questions, self.conversation.unanswered
        more = ", and a question that /retry answers" if asked is not None else ""
        console.note(f"Loaded {path}: {count} question{'s' * (count != 1)} with answers{more}")

    def set(self, text: str) -> None:
        if not text:
            return console.note(listing(self.conversation.config))
        values, faults = {}, []
        for name, value in pairs(text):
            try:
                option = self._option(name)
                if value is None:
                    return console.note(f"{self._now(name)}. {option.help}")
                values[name] = converted(option, value)
            except ConfigError as error:
                faults.append(error)
        if faults:
            try:
                replace(self.conversation.config, **values)  # says what is wrong with those that could be read
            except ConfigError as error:
                faults.append(error)
            raise ConfigError("\n".join(e.message for e in faults), "\n".join(dict.fromkeys(e.hint for e in faults)))
        self.conversation.set(values)
        console.note(", ".join(map(self._now, values)))

    def _option(self, name: str) -> Any:
        if name not in self.options:
            raise ConfigError(f"there is no option {name!r}{_meant(name, self.options)}", "/set lists the options.")
        return self.options[name]

    def _now(self, name: str) -> str:
        return f"{name}: {shown(getattr(self.conversation.config, name))}"

    def stats(self) -> None:
        facts = {answer.adapter or "base": _facts(answer) for answer in self.conversation.answers if answer.last}
        if not facts:
            raise ConfigError("there is no answer yet", "Ask something first.")
        rows = [(name, *(fact[name] for fact in facts.values())) for name in next(iter(facts.values()))]
        console.note(console.table(rows, ("", *facts)))
        most = self.conversation.engine.context_length
        console.note(f"Questions so far: {self.conversation.questions}. Context length: {most or 'not known'}")

    def reset(self) -> None:
        self.conversation.start(self.conversation.system)
        console.note("New conversation")

    def help(self) -> None:
        usages = [(f"/{name} {usage}".rstrip(), text) for name, row in TABLE.items() for usage, text in row.usages]
        width = max(len(usage) for usage, _ in usages)
        console.note("\n".join(f"{usage:<{width}}  {text}" for usage, text in usages) + f"\n{KEYS}")

    def quit(self) -> None:
        raise Leave


def _meant(word: str, names: Iterable[str], mark: str = "") -> str:
    """``; did you mean ...?``: the names that a word begins, or the one that is spelled nearly like it."""
    names = list(names)
    begun = [name for name in names if word and name.startswith(word)]
    near = begun or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {' or '.join(mark + name for name in near)}?" if near else ""


def _file(text: str, example: str) -> Path:
    if not text:
        raise ConfigError("which file?", f"Name one, such as {example}.")
    return Path(text).expanduser()


def _facts(answer: Any) -> dict[str, str]:
    """Return the lines of ``/stats`` for an answer that has begun."""
    last = answer.last
    return {
        "prompt tokens": str(last.prompt_tokens),
        "of these cached": str(last.cached_tokens),
        "prompt tokens/s": f"{last.prompt_tps:.0f}",
        "answer tokens": str(last.generation_tokens),
        "answer tokens/s": f"{last.generation_tps:.1f}",
        "first token after": f"{answer.first_token:.2f} s",
        "peak memory": f"{last.peak_memory:.2f} GB",
        "ended by": last.finish_reason or "Ctrl-C",
    }
