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

    Args:
        parser: mlx-lm's parser of this model's tool calls; None where it has none.
    """

    def __init__(self, parser: Any, tools: list[dict] | None):
        self._parser, self._tools, self._call = parser, tools, ""
        self.text = self.reasoning = ""
        self.calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprobs] = []
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
            self._call += piece.text
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
            events += [Event("reasoning", piece.text)] if piece.text else []
        elif piece.text or piece.logprobs is not None:
            self.text += piece.text
            events.append(Event("text", piece.text, logprobs=piece.logprobs))
        if piece.finish_reason is not None:
            events += self._called()
        return events

    def _called(self) -> list[Event]:
        """The calls in the text of a tool call that has ended. A text that cannot be read is given as it is."""
        raw, self._call = self._call, ""
        if not raw.strip():
            return []
        try:
            parsed = self._parser(raw, self._tools)
            parsed = parsed if isinstance(parsed, list) else [parsed]
            calls = [_call(each) for each in parsed]
        except Exception:  # cut off by max_tokens, or not what the model was trained to write
            self.text += raw
            return [Event("text", raw)]
        self.calls += calls
        return [Event("tool_call", call=call) for call in calls]


def _call(parsed: dict) -> ToolCall:
    arguments = parsed["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(parsed.get("id") or f"call_{uuid.uuid4().hex[:24]}", parsed["name"], text)
