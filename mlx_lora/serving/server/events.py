"""From the engine's pieces to what every interface tells: text, reasoning, tool calls, and why an answer ended."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from ..requests import Piece, TokenLogprobs


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class Event:
    """Something new in an answer."""

    kind: str  # "text", "reasoning" or "tool_call"
    text: str = ""
    call: ToolCall | None = None
    logprobs: TokenLogprobs | None = None


class Answer:
    """One answer as it grows.

    Without ``tools``, what looks like a tool call is text. Blanks around tool calls are layout and left out.

    Args:
        tokenizer: mlx-lm's, for its parser of this model's tool calls and the markers around them.
        tools: those of the request.
        one_call: whether the first call is all that is told.
    """

    def __init__(self, tokenizer: Any = None, tools: list[dict] | None = None, one_call: bool = False):
        self._tokenizer, self._tools, self._one_call = tokenizer, tools, one_call
        self._call: str | None = None  # the text of a tool call that has begun
        self._blanks = ""  # that are text only if text follows
        self.text = self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reasoning_tokens = 0
        self.last: Piece | None = None

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's: "stop", "length" or "tool_calls"; None while the answer grows."""
        reason = self.last.finish_reason if self.last else None
        return "tool_calls" if reason == "stop" and self.calls else reason

    def feed(self, piece: Piece) -> list[Event]:
        """What ``piece`` adds."""
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
        """The calls in the text of a tool call that has begun. A text that cannot be read is given as it is.

        Args:
            ended: whether the marker of its end was there.
        """
        raw, self._call = self._call, None
        if raw is None:
            return []
        tokenizer = self._tokenizer
        try:
            parsed = tokenizer.tool_parser(raw, self._tools) if self._tools else []
            calls = [_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
        except Exception:  # cut off by max_tokens, or not what the model was trained to write
            calls = []
        if not calls:
            return [self._said(f"{tokenizer.tool_call_start}{raw}{tokenizer.tool_call_end if ended else ''}")]
        if self._one_call:  # several between one pair of markers
            calls = calls[: 1 - len(self.calls)]
        self.calls, self._blanks = self.calls + calls, ""
        return [Event("tool_call", call=call) for call in calls]


def _call(parsed: dict) -> ToolCall:
    """Raises: an exception of any kind: this is no call, or one that JSON cannot hold."""
    name, arguments = parsed["name"], parsed["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a tool call has a name, and arguments by name")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    (name + text).encode()  # half of a surrogate pair cannot be sent
    # Nine letters and digits: Mistral's chat templates refuse any other id when the call comes back.
    return ToolCall(parsed.get("id") or uuid.uuid4().hex[:9], name, text)
