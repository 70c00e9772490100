"""A conversation with one base and its adapters: the messages, and the operations on them.

This module does not use the terminal. Answers are iterators of events; other methods return or raise. A stopped answer
keeps its text so far, as on the chat page. A failed answer changes nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import GenerateConfig
from ..errors import AdapterError, ConfigError, DataError, MLXLoRAWarning
from .engine import Engine
from .requests import Piece, Request
from .sampling import check_sampling, extra_eos
from .transcripts import load_conversation, save_conversation

AT_START = ("draft_model", "prefill_step_size")  # options that are fixed when the engine is created
_KINDS = {"normal": "text", "reasoning": "reasoning"}  # kinds of pieces; all others belong to tool calls


@dataclass(frozen=True)
class Event:
    """New text in answer ``number``, or its end."""

    number: int
    kind: str  # "text", "reasoning", "tool" (an empty text begins another call) or "end"
    text: str = ""


class Answer:
    """One answer while it is generated.

    Args:
        begins: the beginning of its text, which is the end of the prompt.
    """

    def __init__(self, adapter: str | None, begins: str = ""):
        self.adapter, self.text, self.reasoning = adapter, begins, ""
        self.tools: list[str] = []  # the text of each tool call
        self.last: Piece | None = None
        self.first_token: float | None = None  # seconds until the first token

    @property
    def complete(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    @property
    def worth_keeping(self) -> bool:
        """Whether an answer that was stopped has text. Half a tool call would break the next prompt."""
        return self.last is not None and bool(self.text.strip()) and not self.tools

    def feed(self, piece: Piece) -> str:
        """Add ``piece``, and return the kind of its event."""
        before, self.last = self.last, piece
        kind = _KINDS.get(piece.kind, "tool")
        if kind == "tool":
            if before is None or before.kind != piece.kind or not piece.text or not self.tools:
                self.tools.append("")
            self.tools[-1] += piece.text
        elif kind == "reasoning":
            self.reasoning += piece.text
        else:
            self.text += piece.text
        return kind

    def message(self, tokenizer: Any) -> dict:
        """The answer as a message. The chat template decides what later prompts show of its reasoning."""
        begin, end = (getattr(tokenizer, f"tool_call_{name}", None) or "" for name in ("start", "end"))
        calls = "".join(f"{begin}{text}{end}" for text in self.tools if text.strip())
        message = {"role": "assistant", "content": self.text + calls}
        return {**message, "reasoning_content": self.reasoning.strip()} if self.reasoning.strip() else message


class Conversation:
    """The messages so far, the adapter that answers, and the options.

    Args:
        system: the system message.
        adapter: a name in the engine's bank; None for the base.

    Raises: ConfigError: the chat template is missing, or takes no system message.
    """

    def __init__(
        self,
        engine: Engine,
        config: GenerateConfig | None = None,
        system: str | None = None,
        adapter: str | None = None,
    ):
        self.engine, self.config, self.adapter = engine, config or GenerateConfig(), adapter
        self.tools: list[dict] | None = None  # of a loaded conversation
        self.messages: list[dict] = []
        self.answers: list[Answer] = []  # the latest answer, or the compared answers
        self.unanswered: str | None = None  # the question if its answer failed, or was stopped before its text began
        self.answering = self.stopping = False
        self._retries = 0
        self.start(system)

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    @property
    def questions(self) -> int:
        """The number of questions so far."""
        return sum(message["role"] == "user" for message in self.messages)

    # Answers.

    def say(self, text: str) -> Iterator[Event]:
        """Answer ``text`` and add both to the conversation. Raises: the engine's errors for a request."""
        self._retries, self.unanswered = 0, text
        yield from self._reply([*self.messages, {"role": "user", "content": text}], self.config)

    def retry(self) -> Iterator[Event]:
        """Answer the last question again and replace its answer, if there is one.

        If a seed is set, each retry adds one to it, so that answers differ but the conversation is reproducible.
        Raises: ConfigError: there is no question.
        """
        messages = self._asked()
        config, seed = self.config, self.config.seed
        self._retries += 1
        if seed is not None and config.temp > 0:
            config = replace(config, seed=(seed + self._retries) % 2**64)
        yield from self._reply(messages, config)

    def compare(self, adapters: Sequence[str | None], text: str | None = None) -> Iterator[Event]:
        """Answer the last question, or ``text`` after the messages so far, with each of ``adapters`` in one batch.

        The conversation does not change. Raises: ConfigError: there is no question.
        """
        messages = self._asked() if text is None else [*self.messages, {"role": "user", "content": text}]
        yield from self._answer(messages, adapters, self.config)

    def stop(self) -> None:
        """Stop all answers before the next token. A signal handler may call this."""
        self.stopping = True

    def _reply(self, messages: list[dict], config: GenerateConfig) -> Iterator[Event]:
        yield from self._answer(messages, [self.adapter], config)
        if self.answers[0].complete or (self.stopping and self.answers[0].worth_keeping):
            self.messages = [*messages, self.answers[0].message(self.engine.tokenizer)]
            self.unanswered = None

    def _answer(self, messages: list[dict], adapters: Sequence[str | None], config: GenerateConfig) -> Iterator[Event]:
        engine, begins = self.engine, config.prefill_response or ""
        tokens = engine.prompt(messages, self.tools, config)
        self._check_length(len(tokens), config.max_tokens)
        state = engine.state_after(tokens)
        requests = [Request(tokens, config, adapter, parts=True, state=state) for adapter in adapters]
        self.answers = [Answer(adapter, begins) for adapter in adapters]
        self.answering, self.stopping = True, False
        try:
            yield from self._events(requests, begins)
        except KeyboardInterrupt:  # in the middle of a step, so the caches may be inconsistent
            engine.close()
            raise
        finally:
            self.answering = False

    def _events(self, requests: list[Request], begins: str) -> Iterator[Event]:
        since = time.perf_counter()
        for number, piece in self.engine.stream_all(requests, lambda: self.stopping):
            answer = self.answers[number]
            if answer.first_token is None:
                answer.first_token = time.perf_counter() - since
                if begins:
                    yield Event(number, "text", begins)
            kind = answer.feed(piece)
            if piece.text or kind == "tool":
                yield Event(number, kind, piece.text)
            if answer.complete:
                yield Event(number, "end")

    def _check_length(self, tokens: int, more: int) -> None:
        most = self.engine.context_length
        if most is not None and tokens + more > most:
            warnings.warn(
                f"the conversation has {tokens} tokens, an answer may have {more}, and the model supports "
                f"{most}: answers may get worse. Use /undo or /reset, or /set max_tokens N for shorter answers.",
                MLXLoRAWarning,
                stacklevel=2,
            )

    def _asked(self) -> list[dict]:
        """The messages up to the last question."""
        if self.unanswered is not None:
            return [*self.messages, {"role": "user", "content": self.unanswered}]
        return self.messages[: self._last_question() + 1]

    def _last_question(self) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise ConfigError("there is no question yet", "Ask one first.")

    # Changes.

    def start(self, system: str | None) -> None:
        """Start a new conversation with this system message, or none. Raises: ConfigError: the template refuses it."""
        messages = [{"role": "system", "content": system}] if system else []
        self.engine.prompt([*messages, {"role": "user", "content": "Hello"}], config=self.config)
        self._replace(messages)
        self.tools = None

    def undo(self) -> str:
        """Remove the last question and its answer. Returns the question. Raises: ConfigError: there is none."""
        last = self._last_question()
        question = self.messages[last]["content"]
        self._replace(self.messages[:last])
        return question

    def _replace(self, messages: list[dict]) -> None:
        self.messages, self.unanswered, self._retries = messages, None, 0

    def switch(self, adapter: str | None) -> None:
        """Answer with another adapter of the bank from now on, or with the base. Raises: AdapterError; FormatError."""
        if adapter is not None:
            self.engine.bank.load(adapter)
        self.adapter = adapter

    def rivals(self, adapters: Sequence[str | None] = ()) -> list[str | None]:
        """Return the adapters to compare, without duplicates. If fewer than two are named, add the base and the active
        adapter, or the bank's first one.

        Raises: AdapterError: there is no adapter.
        """
        found = list(dict.fromkeys(adapters))
        if len(found) < 2:
            names = [*([self.adapter] if self.adapter else []), *self.engine.bank.names]
            found = list(dict.fromkeys([None, *found, *names[:1]]))[:2]
        if len(found) < 2:
            raise AdapterError("there is no adapter to compare with", "/adapter FOLDER loads one.")
        return found

    def set(self, values: dict[str, Any]) -> None:
        """Change all given options, or none. Raises: ConfigError: a value that the config or the vocabulary forbids."""
        config = replace(self.config, **values)
        fixed = [name for name in AT_START if getattr(config, name) != getattr(self.config, name)]
        if fixed:
            flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
            raise ConfigError(
                f"{', '.join(fixed)}: cannot be changed while the model is loaded", f"Start chat again with {flags}."
            )
        check_sampling(config, self.engine.vocab_size)
        extra_eos(config, self.engine.tokenizer, self.engine.vocab_size)  # raises where one is unknown
        self.config = config

    # Files.

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write the messages to a JSON lines file that ``train`` reads. Raises: FormatError; DataError: no messages."""
        if not self.questions:
            raise DataError("there is nothing to save yet", "Ask something first.")
        save_conversation(path, self.messages, self.tools, overwrite)

    def load(self, path: Path, number: int | None = None) -> None:
        """Replace the conversation by one from a data file. If it ends with a question, ``retry`` answers it.

        Raises: DataError; ConfigError: the template refuses the messages.
        """
        sample = load_conversation(path, number, self.engine.template.source or "")
        messages, tools = list(sample.messages), sample.tools or None
        self.engine.prompt(messages, tools, replace(self.config, prefill_response=None))
        asked = messages.pop()["content"] if messages[-1]["role"] == "user" else None
        self._replace(messages)
        self.tools, self.unanswered = tools, asked
