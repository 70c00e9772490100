"""Convert the engine's pieces to events of every API: text, reasoning, tool calls, and why an answer ended."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from ..requests import Piece, TokenLogprobs


@dataclass(frozen=True)
class ToolCall:
    """A tool call that the model generated."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class Event:
    """New text, new reasoning or a complete tool call in an answer."""

    kind: str  # "text", "reasoning" or "tool_call"
    text: str = ""
    call: ToolCall | None = None
    logprobs: TokenLogprobs | None = None


class Answer:
    """One answer while it is generated.

    Without ``tools``, a tool call in the output stays text. Blanks around tool calls are only layout and are dropped.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper, which has the parser and the markers of this model's tool calls.
        tools: the tools in the request.
        one_call: whether to report only the first tool call.
    """

    def __init__(self, tokenizer: Any = None, tools: list[dict] | None = None, one_call: bool = False):
        self._tokenizer, self._tools, self._one_call = tokenizer, tools, one_call
        self._call: str | None = None  # the text so far of an unfinished tool call
        self._blanks = ""  # blanks that belong to the answer only if more text follows
        self.text = self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reasoning_tokens = 0
        self.last: Piece | None = None

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish reason: "stop", "length" or "tool_calls"; None while the answer is generated."""
        reason = self.last.finish_reason if self.last else None
        return "tool_calls" if reason == "stop" and self.calls else reason

    def feed(self, piece: Piece) -> list[Event]:
        """Add ``piece`` and return the new events."""
        self.last, events = piece, []
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)
        if piece.kind != "tool":
            events += self._called()
        if piece.kind == "tool":
            self._call = (self._call or "") + piece.text
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
            self.reasoning_tokens += piece.token is not None
            events += [Event("reasoning", piece.text)] if piece.text else []
        elif piece.text or piece.logprobs is not None:
            said = self._said(piece.text, piece.logprobs)
            events += [said] if said.text or said.logprobs else []
        if piece.finish_reason is not None:
            events += self._called(ended=False)
            if self._blanks and not self.calls:
                self.text += self._blanks
                events.append(Event("text", self._blanks))
        return events

    def _said(self, text: str, logprobs: TokenLogprobs | None = None) -> Event:
        text, self._blanks = self._blanks + text, ""
        if self._tools:
            known = text.rstrip()
            text, self._blanks = known, text[len(known) :]
        self.text += text
        return Event("text", text, logprobs=logprobs)

    def _called(self, ended: bool = True) -> list[Event]:
        """Parse the collected text of a tool call. Text that cannot be parsed is returned as answer text.

        Args:
            ended: whether the model wrote the closing marker.
        """
        raw, self._call = self._call, None
        if raw is None:
            return []
        tokenizer = self._tokenizer
        try:
            parsed = tokenizer.tool_parser(raw, self._tools) if self._tools else []
            calls = [_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # cut off by max_tokens, or not in the format that the parser expects
            calls = []
        if not calls:
            return [self._said(f"{tokenizer.tool_call_start}{raw}{tokenizer.tool_call_end if ended else ''}")]
        if self._one_call:  # one pair of markers can hold several calls
            calls = calls[: 1 - len(self.calls)]
        self.calls, self._blanks = self.calls + calls, ""
        return [Event("tool_call", call=call) for call in calls]


def _call(parsed: dict) -> ToolCall:
    """Convert a parsed call. Raises an exception of any type if it is not a tool call or cannot be written as JSON."""
    name, arguments = parsed["name"], parsed["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a tool call needs a name, and arguments by name")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + text).encode()  # raises for a lone surrogate, which cannot be sent
    # Nine letters and digits: Mistral's chat templates refuse any other id when the call comes back.
    return ToolCall(parsed.get("id") or uuid.uuid4().hex[:9], name, text)
