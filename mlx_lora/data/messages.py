"""Messages of a chat as OpenAI and the chat templates write them: ``role``, ``content``, ``tool_calls``.

Other spellings are rewritten: ShareGPT's ``from`` and ``value`` with its roles, OpenAI's old ``function_call``, content
as a list of text parts, messages and tools as JSON text in a CSV cell. What was rewritten is noted in ``renamed``.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from .shapes import Unreadable

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "tool_results", "observation")
_ALIASES = {
    **dict.fromkeys(("human", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "bard", "bing", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
# Roles that some templates know under this name. For others they are rewritten.
_KNOWN_TO_SOME = {
    "developer": "system",
    **dict.fromkeys(("function", "ipython", "tool_results", "observation"), "tool"),
    **dict.fromkeys(("function_response", "function-response", "tool_response", "tool_result"), "tool"),
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_PLAIN = frozenset({"system", "user", "assistant"})


class BadPart(Unreadable):
    """What is wrong with one message, and the fix; ``part`` names the message."""

    def __init__(self, text: str, part: str):
        super().__init__(text)
        self.part = part


def read_messages(value: Any, key: str, template: str, renamed: dict[str, str]) -> tuple[dict, ...]:
    """The messages of a row, checked and rewritten.

    Args:
        template: the text of the chat template, to see which roles it knows.
        renamed: receives what was rewritten, the old name and the new one.

    Raises: Unreadable.
    """
    value = from_json(value)
    if isinstance(value, str):
        raise Unreadable(f"{key!r} is text that is not a JSON list: write a list of messages")
    if not isinstance(value, list):
        raise Unreadable(f"{key!r} is {type_name(value)}: write a list of messages")
    if not value:
        raise Unreadable(f"{key!r} is empty: give at least one message, or remove the row")
    out, calls = [], []
    for number, message in enumerate(_turns(value, renamed), 1):
        if (
            isinstance(message, dict)
            and len(message) == 2
            and type(message.get("content")) is str
            and message.get("role") in _PLAIN
        ):
            out.append(message)  # nothing to rewrite
            continue
        try:
            message = _message(message, template, renamed)
            if "function_call" in message:
                message["tool_calls"] = _old_calls(message.pop("function_call"), number, message.get("tool_calls"))
                calls = list(message["tool_calls"])  # the calls whose results follow
            elif message["role"] in ("tool", "function") and calls and "tool_call_id" not in message:
                message["tool_call_id"] = calls.pop(0)["id"]
        except Unreadable as fault:
            raise BadPart(str(fault), f"message {number}") from None
        out.append(message)
    return tuple(out)


def _turns(value: list, renamed: dict[str, str]) -> list:
    """The messages of a list whose objects hold a question and its answer each (XTuner's and Capybara's format)."""
    if not all(isinstance(turn, dict) and {"input", "output"} <= set(turn) and "role" not in turn for turn in value):
        return value
    renamed |= {"input": "user", "output": "assistant"}
    names = {"system": "system", "input": "user", "output": "assistant"}
    return [{"role": role, "content": turn[key]} for turn in value for key, role in names.items() if turn.get(key)]


def _message(message: Any, template: str, renamed: dict[str, str]) -> dict:
    if not isinstance(message, dict):
        raise Unreadable(f'is {type_name(message)}: write {{"role": ..., "content": ...}}')
    # A null key is an absent one: Arrow fills them in, and templates ask "is defined".
    message = {key: item for key, item in message.items() if item is not None}
    for new, keys in (("role", _ROLE_KEYS), ("content", _CONTENT_KEYS)):
        old = next((key for key in keys if key in message), new)
        if old != new:
            message = {new if key == old else key: item for key, item in message.items()}
            renamed[old] = new
    if "role" not in message:
        raise Unreadable(f'has no role (its keys: {", ".join(map(str, message))}): add "role"')
    message["role"] = role = _role(message["role"], template, renamed)
    if role == "function_call":
        message["role"] = "assistant"
        if "function_call" in message:
            raise Unreadable(
                "has a call in its content (role function_call) and another one in function_call: keep one of them"
            )
        message["function_call"] = message.pop("content", None)
    elif "function_call" in message:
        renamed["function_call"] = "tool_calls"
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    else:
        message.pop("tool_calls", None)  # templates ask "is defined", and an empty list is
    if message.get("weight", 1) not in (0, 1):
        raise Unreadable(f"has the weight {message['weight']!r}: write 0 (not learned) or 1 (learned)")
    if "content" in message:
        message["content"] = joined(message["content"])
    elif not message.get("tool_calls") and "function_call" not in message:
        raise Unreadable(f'({role}) has neither content nor tool_calls: add "content"')
    return message


def _role(role: Any, template: str, renamed: dict[str, str]) -> str:
    """The role's name in chat templates. "function_call" is a turn whose content is a call."""
    if not isinstance(role, str):
        raise Unreadable(f"has a role that is {type_name(role)}: write one of {', '.join(ROLES[:5])}")
    name = role.strip().lower()
    known = f"'{role}'" in template or f'"{role}"' in template
    new = _ALIASES.get(name) or (_KNOWN_TO_SOME.get(name) if not known else None)
    if new is None and name in ROLES and not known:
        new = name
    if new is None and not known:
        near = next(iter(difflib.get_close_matches(name, ROLES, 1)), None)
        # Templates silently ignore unknown roles.
        raise Unreadable(f"has the unknown role {role!r}: write {near or 'one of ' + ', '.join(ROLES[:5])}")
    if new is None or new == role:
        return role
    calls = name in ("function_call", "tool_call")
    renamed[role] = "tool_calls" if calls else new
    return "function_call" if calls else new


def joined(content: Any) -> str:
    """The text of a message's content. A list of text parts is joined, as mlx-lm's server does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unreadable(f"has content that is {type_name(content)}: write a string (json.dumps for data)")
    texts = []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else type_name(part)
        text = part if isinstance(part, str) else part.get("text") if kind in _TEXTS else None
        if not isinstance(text, str):
            fix = "write the parts as one string" if kind in _TEXTS else "only text can be learned; remove the part"
            raise Unreadable(f"has a part that is not text ({kind}): {fix}")
        texts.append(text)
    return "".join(texts)


_TEXTS = ("text", "input_text", "output_text")


def _tool_calls(calls: Any) -> list[dict]:
    """The calls with their arguments as objects. OpenAI writes a JSON string, which templates would quote again."""
    calls = from_json(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unreadable("has tool_calls that are not a list of objects: write [{...}]")
    out = []
    for call in calls:
        function = call["function"] if isinstance(call.get("function"), dict) else call
        if not isinstance(function.get("name"), str):
            raise Unreadable('has a tool call without a name: write {"function": {"name": ..., "arguments": ...}}')
        if function.get("arguments") is not None:
            function = {**function, "arguments": _arguments(function["arguments"])}
        out.append({**call, "function": function} if isinstance(call.get("function"), dict) else function)
    return out


def _arguments(value: Any) -> dict:
    found = {} if value == "" else from_json(value)  # OpenAI writes "" for a call without arguments
    if not isinstance(found, dict):
        kind = "a string that is not a JSON object" if isinstance(found, str) else type_name(found)
        raise Unreadable(f'has a tool call whose arguments are {kind}: write {{"name of the argument": value}}')
    return found


def _old_calls(value: Any, number: int, beside: list[dict] | None) -> list[dict]:
    """Tool calls made from the names and arguments of functions, given as objects or JSON text.

    These calls have no ids, but some templates require ids; Mistral's requires nine letters and digits.

    Args:
        beside: the message's ``tool_calls``, if it has both; they must be the same calls, and are returned.
    """
    value = from_json(value)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Unreadable('has a function call that is not {"name": ..., "arguments": {...}}: write it as JSON')
    made = []
    for k, call in enumerate(calls):
        function = {"name": call["name"], "arguments": call.get("arguments", call.get("parameters", {}))}
        made.append({"id": f"call{number:03}{k:02}", "type": "function", "function": function})
    made = _tool_calls(made)
    if beside and _called(beside) != _called(made):
        raise Unreadable("has tool_calls and another call in function_call: keep one of them")
    return [{**call, **given} for call, given in zip(made, beside or made, strict=True)]


def _called(calls: list[dict]) -> list[tuple[str, Any]]:
    functions = [call.get("function", call) for call in calls]
    return [(function["name"], function.get("arguments") or {}) for function in functions]


def without_weights(messages: tuple[dict, ...]) -> tuple[tuple[dict, ...], tuple[int, ...]]:
    """The messages without the key ``weight``, and the indices of the assistant's turns whose weight is 0."""
    if not any("weight" in message for message in messages):
        return messages, ()
    zero = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("weight", 1)]
    kept = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return tuple(kept), tuple(zero)


def read_tools(value: Any) -> list[dict] | None:
    """The tools of a row; OpenAI's old ``functions`` are wrapped as tools. An empty list stays one."""
    value = from_json(value)
    if value is None or value == "":
        return None
    if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise Unreadable(f"has tools that are {type_name(value)}: write a list of objects")
    return value


def from_json(value: Any) -> Any:
    """Parse text that holds a JSON list or object; return other values unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or ("a number" if isinstance(value, (int, float)) else type(value).__name__)
