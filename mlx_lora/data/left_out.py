"""What a chat template leaves out of the rows: tools, whole messages, keys of messages, parts of a text.

A value was left out if changing it does not change the template's text. This is tried once for each kind of
message: its role, its keys, and where it is in the chat, because templates treat earlier turns and the last one
differently. Rows whose own text is not found in the template's text are checked more closely.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .faults import Place
from .template import Template

_LINKS = ("role", "tool_calls", "tool_call_id")  # tried separately, or only used to link a result to its call
_CLOSER = 100  # how many messages of each role to check for partly dropped text


class LeftOut:
    """Collects what the template leaves out of a data set's rows."""

    def __init__(self, template: Template):
        self._template = template
        self._seen: set[tuple] = set()
        self._found: dict[str, dict[bool, Place]] = {}  # what -> (whether in the last answer or later) -> first row
        self._closer = defaultdict(lambda: _CLOSER)

    def look(self, where: Place, messages: list[dict], tools: list | None, text: str) -> None:
        """Check one row; ``text`` is the template's text for it."""
        if tools and ("tools",) not in self._seen:
            self._seen.add(("tools",))
            if self._shows_nothing(messages, None, text):
                self._add("the rows' tools", True, where)
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        end = len(messages) - 1
        for i, message in enumerate(messages):
            late = i > last_user or message["role"] != "assistant"  # templates drop things from earlier answers
            keys = (key for key, value in message.items() if value)
            kind = (message["role"], *keys, i == 0, i == end, i > last_user, messages[end]["role"], bool(tools))
            if kind not in self._seen:
                self._seen.add(kind)
                for what, changed in _changes(message, text):
                    if self._shows_nothing([*messages[:i], changed, *messages[i + 1 :]], tools, text):
                        self._add(what, late, where)
            content = message.get("content")
            if content.__class__ is str and content not in text and self._closer[message["role"]]:
                self._look_closer(where, messages, tools, text, i, late)

    def warnings(self) -> list[str]:
        """A sentence for each thing that is left out."""
        lines = []
        for what, places in self._found.items():
            earlier = "" if True in places else " before the last user message"
            first = places.get(True) or places[False]
            lines.append(f"the chat template ignores {what}{earlier} (first in {first})")
        return lines

    def _add(self, what: str, late: bool, where: Place) -> None:
        self._found.setdefault(what, {}).setdefault(late, where)

    def _shows_nothing(self, messages: list[dict], tools: list | None, text: str) -> bool:
        try:
            return self._template.text(messages, tools) == text
        except Exception:  # the template needs what was changed, so it does not ignore it
            return False

    def _look_closer(
        self, where: Place, messages: list[dict], tools: list | None, text: str, i: int, late: bool
    ) -> None:
        """Mark the beginning, the lines and the end of a text, and see whether all marks are in the template's text.

        Templates change a text in other ways, too, such as trimming it or writing it as JSON; the marks survive these.
        """
        message, mark = messages[i], _mark(text)
        lines = message["content"].strip().split("\n")
        if message["content"].strip() in text:
            return
        self._closer[message["role"]] -= 1
        marked = "\n".join(f"{mark}{line}" for line in lines) + mark
        try:
            shown = self._template.text([*messages[:i], {**message, "content": marked}, *messages[i + 1 :]], tools)
        except Exception:
            return
        if 0 < shown.count(mark) < len(lines) + 1:
            self._add(f"a part of the content of {message['role']} messages", late, where)


def _changes(message: dict, text: str) -> list[tuple[str, dict]]:
    """Parts of a message that a template may leave out, each with a message in which that part is changed."""
    mark, role = _mark(text), message["role"]
    out: list[tuple[str, Any]] = []
    if calls := message.get("tool_calls"):
        call = calls[0]
        inner = call.get("function", call)
        for what, key, value in (("tool_calls", "name", mark), ("arguments of tool calls", "arguments", {mark: mark})):
            changed = {**inner, key: value}
            call_changed = {**call, "function": changed} if "function" in call else changed
            out.append((f"the rows' {what}", {**message, "tool_calls": [call_changed, *calls[1:]]}))
    with_calls = " with tool calls" if calls else ""
    for key, value in message.items():
        if key in _LINKS or not value:
            continue
        new = [{"type": "text", "text": mark}] if isinstance(value, list) and key == "content" else mark
        out.append((f"{key} of {role} messages{with_calls}", {**message, key: new}))
    return out


def _mark(text: str) -> str:
    """A private-use character that the text does not contain."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
