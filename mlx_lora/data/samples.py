"""A checked row, and functions that read its texts, messages and tools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .faults import Place
from .messages import from_json, read_tools, type_name, without_weights
from .shapes import Shape, Unreadable


class Sample(NamedTuple):
    """A checked row: ``text``, or ``messages``, or a ``pair`` of strings for tokenizers without a chat template."""

    where: Place
    text: str = ""
    messages: tuple[dict, ...] = ()
    tools: list[dict] | None = None
    first: int = 0  # messages before this index are the prompt, in any role
    unlearned: tuple[int, ...] = ()  # the assistant's turns of weight 0
    pair: tuple[str, str] | None = None
    rejected: Sample | None = None  # in rows with pairs: the same prompt with the worse answer
    label: bool | None = None  # in rows with labels: whether the answer is good


def from_json_list(value: Any) -> Any:
    """Parse messages that a CSV cell holds as JSON; return other values unchanged."""
    parsed = from_json(value)
    messages = isinstance(parsed, list) and parsed and all(isinstance(item, dict) and "role" in item for item in parsed)
    return parsed if messages else value


def turns(pairs: Iterable[tuple[str, str]], system: str = "") -> tuple[dict, ...]:
    head = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return (*head, *turns)


def weighed(sample: Sample) -> Sample:
    messages, unlearned = without_weights(sample.messages)
    return sample._replace(messages=messages, unlearned=unlearned)


def tools_of(row: dict, shape: Shape) -> list[dict] | None:
    tools = read_tools(row.get(shape.tools)) if shape.tools else None
    if tools and shape.tools.lower() == "functions":  # OpenAI's old name, without the wrapping
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools  # also an empty list: some templates require one


def optional(row: dict, key: str) -> str:
    value = row.get(key) if key else None
    if value is not None and not isinstance(value, str):
        raise Unreadable(f"{key!r} is {type_name(value)}: write a string")
    return value or ""


def string(row: dict, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise Unreadable(f"{key!r} is {type_name(value)}: write a string")
    if not value:
        raise Unreadable(f"{key!r} is empty: remove the row")
    return value
