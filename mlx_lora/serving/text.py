"""Convert tokens to text: complete characters, stop words, and the parts of an answer (reasoning, tool calls)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..base import older_mlx_lm


class Segment(NamedTuple):
    """A segment of an answer. An empty one marks a change of kind, such as between two tool calls."""

    kind: str  # "normal", "reasoning", "tool" or another state of the tokenizer's response format
    text: str


class StopWords:
    """Ends a text before the first stop word. Text that may be the beginning of one is held back."""

    def __init__(self, words: Sequence[str] = ()):
        self._words = tuple(words)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The next text that is known to come before any stop word."""
        text, self._held = self._held + text, ""
        hits = [(at, word) for word in self._words if (at := text.find(word)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            return text[:at]
        held = max((self._overlap(text, word) for word in self._words), default=0)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text

    def finish(self) -> str:
        """Return the text held back, at the end of a text without a stop word."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, word: str) -> int:
        """Return how many characters at the end of ``text`` are the beginning of ``word``."""
        longest = min(len(text), len(word) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


class AnswerText:
    """The text of one answer, token by token.

    Args:
        parts: whether to separate reasoning and tool calls by the markers that mlx-lm knows for this tokenizer.
            Otherwise all text is "normal", with the markers in it.
        one_call: whether the text ends after the first tool call.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        parts: bool = False,
        state: str = "normal",
        one_call: bool = False,
    ):
        self._detokenizer, self._stop = tokenizer.detokenizer, StopWords(stop)
        self._machine, self.kind = None, state  # kind: kind of the next text
        self._one_call, self.called = one_call, False  # called: the one call is complete
        if parts:
            self._machine = _machine_of(tokenizer)
            self._state = self._machine.make_state(state)

    @property
    def stopped_at(self) -> str | None:
        """The stop word that ended the text; None if none did."""
        return self._stop.found

    def add(self, token: int) -> list[Segment]:
        """Add ``token`` and return the text that it completes."""
        self._detokenizer.add_token(token)
        return self._split(self._stop.feed(self._detokenizer.last_segment), last=self._stop.found is not None)

    def finish(self) -> list[Segment]:
        """Return the text held back, after the last token."""
        self._detokenizer.finalize()
        text = self._stop.feed(self._detokenizer.last_segment)
        return self._split(text + ("" if self._stop.found else self._stop.finish()), last=True)

    def _split(self, text: str, last: bool) -> list[Segment]:
        if self._machine is None:
            return [Segment("normal", text)] if text else []
        self._state, found = self._machine.split(self._state, text)
        if last:
            self._state, rest, kind = self._machine.flush(self._state)
            found = [*found, (kind, rest)]
        segments = []
        for kind, part in found:
            if self._one_call and self.kind == "tool" and kind != "tool":
                self.called, self.kind = True, kind
                return [*segments, Segment(kind, "")]
            if part or kind != self.kind:
                segments.append(Segment(kind, part))
            self.kind = kind
        return segments


def _machine_of(tokenizer: Any) -> Any:
    """Return mlx-lm's state machine that finds reasoning and tool calls by the tokenizer's markers."""
    if older_mlx_lm.is_used():
        return older_mlx_lm.TextStateMachine(tokenizer)
    from mlx_lm.generate import make_text_state_machine

    return make_text_state_machine(tokenizer)
