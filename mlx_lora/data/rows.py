"""Checks rows: finds the kind of rows in a file, and lists everything that is wrong with them.

There are three kinds, in mlx-lm's order of preference: completions (``prompt`` and ``completion``), chat (``messages``
and perhaps ``tools``) and ``text``. The ``*_feature`` options rename these keys. Faults are collected in a list, one
``file:line: what is wrong: the fix`` each, so that all can be reported at once. Tokens are made in ``chat.py``.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..config import DataConfig

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "tool_results", "observation")
# Names in other tools' data for the same roles and keys.
_ROLE_ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}
_ROLE_ALIASES |= {"model": "assistant", "chatgpt": "assistant"}
_KEY_ALIASES = {
    "prompt": ("instruction", "question", "query", "input", "problem"),
    "completion": ("response", "answer", "output", "target", "solution", "chosen"),
    "chat": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns", "message"),
    "text": ("content", "body", "document", "story"),
}


class Row(NamedTuple):
    """A value as read, and where it was read."""

    where: str  # "train.jsonl:12"
    value: Any


class Sample(NamedTuple):
    """A checked row: ``text``, or ``messages``, or a ``pair`` of strings for tokenizers without a chat template."""

    where: str
    text: str = ""
    messages: tuple[dict, ...] = ()
    tools: list[dict] | None = None
    first: int = 0  # messages before this index are the prompt, whatever their role
    pair: tuple[str, str] | None = None


def check(rows: Iterable[Row], config: DataConfig, template: str | None, faults: list[str]) -> list[Sample]:
    """Check the rows of one file.

    Args:
        template: the tokenizer's chat template; None where it has none.
        faults: a line is added for each fault.

    Returns: the valid rows as samples.
    """
    samples, kind, seen = [], None, ""
    for where, value in rows:
        try:
            if not isinstance(value, dict):
                raise _Fault(f"{_type(value)} where an object is needed: write one {{...}} on each line")
            this = _kind(value, config)
            if kind is None:
                kind, seen = this, where
                _check_kind(kind, config, template)
            elif this != kind:
                raise _Fault(f"a {this} row among {kind} rows (first: {seen}): a file must have one kind of rows")
            samples.append(_SAMPLES[kind](where, value, config, template))
        except _KindFault as fault:  # true of every row, so one line is enough
            faults.append(f"{where}: {fault}")
            return []
        except _Fault as fault:
            faults.append(f"{where}: {fault}")
    return samples


class _Fault(Exception):
    """What is wrong with a row, and the fix."""


class _KindFault(_Fault):
    """A fault of all rows of a file."""


def _kind(row: dict, config: DataConfig) -> str:
    keys = {key for key, value in row.items() if value is not None}
    if config.prompt_feature in keys and config.completion_feature in keys:
        return "completion"
    if config.chat_feature in keys:
        return "chat"
    if config.text_feature in keys:
        return "text"
    raise _Fault(_missing_keys(sorted(map(str, keys)), config))


def _missing_keys(keys: list[str], config: DataConfig) -> str:
    names = {kind: getattr(config, f"{kind}_feature") for kind in _KEY_ALIASES}
    missing = [kind for kind in ("prompt", "completion") if names[kind] not in keys]
    flags = {}
    for kind, name in names.items():
        taken = [key for key in keys if key not in names.values()]
        near = [key for key in taken if key.lower() in (name.lower(), *_KEY_ALIASES[kind])]
        near = near or difflib.get_close_matches(name, taken, 1, 0.75)
        if near:
            flags[kind] = f"--{kind}-feature {near[0]}"
    if len(missing) == 1 and missing[0] not in flags:  # one half of a pair is missing
        other = "completion" if missing[0] == "prompt" else "prompt"
        return f"has {names[other]!r} but no {names[missing[0]]!r}: add it (keys here: {', '.join(keys)})"
    pair = [flags[kind] for kind in missing if kind in flags]
    fix = " ".join(pair) if len(pair) == len(missing) else flags.get("chat") or flags.get("text") or ""
    wanted = f"{names['chat']!r}, {names['prompt']!r} with {names['completion']!r}, or {names['text']!r}"
    have = f"only {', '.join(keys)}" if keys else "no keys at all"
    return f"needs {wanted}, has {have}: " + (f"try {fix}" if fix else "rename its keys, or name them with --*-feature")


def _check_kind(kind: str, config: DataConfig, template: str | None) -> None:
    if kind == "text" and config.mask_prompt:
        raise _KindFault(
            "mask_prompt learns answers only, and text rows have none: "
            "use prompt and completion, or messages, or leave mask_prompt out"
        )
    if kind == "chat" and template is None:
        raise _KindFault(
            "chat rows need a chat template, and this tokenizer has none: "
            "use an instruct model, add chat_template.jinja to the model's folder, or use text or completion rows"
        )


def _text(where: str, row: dict, config: DataConfig, template: str | None) -> Sample:
    return Sample(where, text=_string(row, config.text_feature))


def _completion(where: str, row: dict, config: DataConfig, template: str | None) -> Sample:
    prompt, completion = row[config.prompt_feature], row[config.completion_feature]
    if isinstance(prompt, list) and isinstance(completion, list):
        if template is None:
            raise _Fault("messages need a chat template, and this tokenizer has none: write strings")
        before = _messages(prompt, config.prompt_feature, template)
        after = _messages(completion, config.completion_feature, template)
        return Sample(where, messages=before + after, tools=_tools(row), first=len(before))
    if not isinstance(prompt, str):
        raise _Fault(f"{config.prompt_feature!r} is {_type(prompt)}: write a string (or messages in both)")
    completion = _string(row, config.completion_feature)
    if template is None:
        return Sample(where, pair=(prompt, completion))
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Sample(where, messages=messages, tools=_tools(row), first=1)


def _chat(where: str, row: dict, config: DataConfig, template: str | None) -> Sample:
    messages = _messages(row[config.chat_feature], config.chat_feature, template)
    return Sample(where, messages=messages, tools=_tools(row))


_SAMPLES = {"text": _text, "completion": _completion, "chat": _chat}


def _messages(value: Any, key: str, template: str | None) -> tuple[dict, ...]:
    if not isinstance(value, list):
        raise _Fault(f"{key!r} is {_type(value)}: write a list of messages")
    if not value:
        raise _Fault(f"{key!r} is empty: give at least one message, or remove the row")
    return tuple(_message(message, f"message {i}", template) for i, message in enumerate(value, 1))


def _message(message: Any, name: str, template: str | None) -> dict:
    if not isinstance(message, dict):
        raise _Fault(f'{name} is {_type(message)}: write {{"role": ..., "content": ...}}')
    if "role" not in message:
        hint = '"from" is "role", "value" is "content"' if {"from", "value"} <= set(message) else 'add "role"'
        raise _Fault(f"{name} has no role (its keys: {', '.join(map(str, message))}): {hint}")
    role = message["role"]
    if not isinstance(role, str):
        raise _Fault(f"{name} has {_type(role)} as its role: write one of {', '.join(ROLES[:5])}")
    # Templates silently ignore unknown roles. A template whose text contains the role knows it.
    if role not in ROLES and template and f"'{role}'" not in template and f'"{role}"' not in template:
        fix = _ROLE_ALIASES.get(role.lower()) or next(iter(difflib.get_close_matches(role.lower(), ROLES, 1)), None)
        raise _Fault(f"{name} has the unknown role {role!r}: write {fix or 'one of ' + ', '.join(ROLES[:5])}")
    calls = message.get("tool_calls")
    if calls:
        message = {**message, "tool_calls": _tool_calls(calls, name)}
    content = message.get("content")
    if content is None:
        if not calls:
            raise _Fault(f'{name} ({role}) has neither content nor tool_calls: add "content"')
    elif isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise _Fault(f'{name} has a part that is not text: only {{"type": "text", "text": ...}} can be learned')
    elif not isinstance(content, str):
        raise _Fault(f"{name} has {_type(content)} as its content: write a string (json.dumps where it is data)")
    return message


def _tool_calls(calls: Any, name: str) -> list[dict]:
    """The calls with their arguments as objects. OpenAI writes a JSON string, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _Fault(f"{name} has tool_calls that are not a list of objects: write [{{...}}]")
    out = []
    for call in calls:
        function = call["function"] if isinstance(call.get("function"), dict) else call
        if not isinstance(function.get("name"), str):
            raise _Fault(
                f'{name} has a tool call without a name: write {{"function": {{"name": ..., "arguments": ...}}}}'
            )
        if isinstance(function.get("arguments"), str):
            try:
                parsed = json.loads(function["arguments"])
            except ValueError:
                parsed = None
            if isinstance(parsed, dict):
                function = {**function, "arguments": parsed}
        out.append({**call, "function": function} if isinstance(call.get("function"), dict) else function)
    return out


def _tools(row: dict) -> list[dict] | None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Fault(f"'tools' is {_type(tools)}: write a list of objects")
    return tools  # also an empty list: some templates require one


def _string(row: dict, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise _Fault(f"{key!r} is {_type(value)}: write a string")
    if not value:
        raise _Fault(f"{key!r} is empty: remove the row")
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or ("a number" if isinstance(value, (int, float)) else type(value).__name__)


def listing(faults: list[str], most: int = 20) -> str:
    """The first ``most`` faults, a line each, and how many more there are."""
    if len(faults) <= most:
        return "\n".join(faults)
    files = Counter(fault.split(":", 1)[0] for fault in faults[most:])
    more = ", ".join(f"{count} in {name}" for name, count in files.items())
    return "\n".join([*faults[:most], f"and {len(faults) - most} more ({more})"])
