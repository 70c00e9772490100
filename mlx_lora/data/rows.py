"""Rows of one file to samples: texts, pairs of a prompt and a completion, or chats. All faults are collected.

``shapes.py`` decides which columns are read, ``messages.py`` checks and rewrites messages, and ``chat.py`` makes the
tokens. Rows with instructions become one turn by the user and one by the assistant. Without a chat template they become
``alpaca_prompt`` and the answer; the rows with ``prompt`` and ``completion`` stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..config import DataConfig
from .faults import Fault, Place
from .files import Row
from .messages import from_json, read_messages, read_tools, type_name
from .shapes import Shape, Unreadable, reading, shape_of

_NO_INPUT = ("", "<noinput>", "<no input>")  # how Alpaca files say that there is no input


class Sample(NamedTuple):
    """A checked row: ``text``, or ``messages``, or a ``pair`` of strings for tokenizers without a chat template."""

    where: Place
    text: str = ""
    messages: tuple[dict, ...] = ()
    tools: list[dict] | None = None
    first: int = 0  # messages before this index are the prompt, whatever their role
    pair: tuple[str, str] | None = None


class Checked(NamedTuple):
    """The valid rows of a file, and a line about how they were read, where that is not plain."""

    samples: list[Sample]
    reading: list[str]


class _KindFault(Unreadable):
    """A fault of all rows of a file."""


def check(rows: Iterable[Row], config: DataConfig, template: str | None, faults: list[Fault]) -> Checked:
    """Check the rows of one file.

    Args:
        template: the tokenizer's chat template; None where it has none.
        faults: receives all that is wrong.
    """
    samples: list[Sample] = []
    shapes: dict[tuple, Shape | Unreadable] = {}  # by the columns of a row and the types of their values
    renamed: dict[str, str] = {}
    first: Shape | None = None
    seen = None
    for where, value in rows:
        try:
            if not isinstance(value, dict):
                raise Unreadable(f"{type_name(value)} where an object is needed: write one {{...}} on each line")
            columns = tuple((key, item.__class__) for key, item in value.items() if item is not None)
            shape = shapes.get(columns) or shapes.setdefault(columns, _shape(dict(columns), config))
            if isinstance(shape, Unreadable):
                raise shape
            if first is None:
                first, seen = shape, where
                _check_kind(shape, config, template)
            elif not shape.same(first):
                raise Unreadable(f"a {shape.name} row among {first.name} rows (first: {seen}): use one kind a file")
            samples.append(_SAMPLES[shape.kind](where, value, shape, template, renamed))
        except _KindFault as fault:  # true of every row, so one line is enough
            faults.append(Fault(where, str(fault)))
            return Checked([], [])
        except Unreadable as fault:
            faults.append(Fault(where, str(fault), getattr(fault, "part", "")))
    used = [shape for shape in shapes.values() if isinstance(shape, Shape)]
    keys = {key for columns in shapes for key, _ in columns}
    return Checked(samples, reading(used, keys, renamed, template is not None) if samples else [])


def _shape(columns: dict[str, type], config: DataConfig) -> Shape | Unreadable:
    try:
        return shape_of({str(key): kind for key, kind in columns.items()}, config)
    except Unreadable as fault:
        return fault


def _check_kind(shape: Shape, config: DataConfig, template: str | None) -> None:
    if shape.kind == "text" and config.mask_prompt:
        raise _KindFault(
            "mask_prompt learns answers only, and text rows have none: "
            "write prompt and completion, or messages; to learn whole texts, leave mask_prompt out"
        )
    if shape.kind == "chat" and template is None:
        raise _KindFault(
            "chat rows need a chat template, and this tokenizer has none: "
            "use an instruct model, add chat_template.jinja to the model's folder, or use text or completion rows"
        )


def _text(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    return Sample(where, text=_string(row, shape.main))


def _completion(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    prompt, completion = from_json_list(row[shape.main]), from_json_list(row[shape.answer])
    if isinstance(prompt, list) and isinstance(completion, list):
        if template is None:
            raise Unreadable("messages need a chat template, and this tokenizer has none: write strings")
        before = read_messages(prompt, shape.main, template, renamed)
        after = read_messages(completion, shape.answer, template, renamed)
        return Sample(where, messages=before + after, tools=_tools(row, shape), first=len(before))
    if not isinstance(prompt, str):
        raise Unreadable(f"{shape.main!r} is {type_name(prompt)}: write a string (or messages in both)")
    completion = _string(row, shape.answer)
    if template is None:
        return Sample(where, pair=(prompt, completion))
    return Sample(where, messages=_turns([(prompt, completion)]), tools=_tools(row, shape), first=1)


def from_json_list(value: Any) -> Any:
    """Messages that a CSV cell holds as JSON; other values as they are."""
    parsed = from_json(value)
    messages = isinstance(parsed, list) and parsed and all(isinstance(item, dict) and "role" in item for item in parsed)
    return parsed if messages else value


def _instruction(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    if isinstance(row[shape.main], list):  # TRL's conversational prompt and completion under other names
        return _completion(where, row, shape, template, renamed)
    question = row[shape.main]
    if not isinstance(question, str):
        raise Unreadable(f"{shape.main!r} is {type_name(question)}: write a string")
    answer, context = _string(row, shape.answer), _optional(row, shape.context)
    context = "" if context.strip().lower() in _NO_INPUT else context
    if not (question.strip() or context):
        raise Unreadable(f"{shape.main!r} is empty: remove the row")
    system, history = _optional(row, shape.system), _history(row, shape.history)
    if template is None:
        if shape.main.lower() == "prompt" and not (system or history or context):
            return Sample(where, pair=(question, answer))
        return Sample(where, pair=(alpaca_prompt(question, context, system, history), answer))
    asked = "\n".join(filter(None, [question, context]))
    messages = _turns([*history, (asked, answer)], system)
    return Sample(where, messages=messages, tools=_tools(row, shape), first=1)


def alpaca_prompt(question: str, context: str = "", system: str = "", history: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt of an instruction for models without a chat template, with Alpaca's headings."""
    earlier = [f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n" for asked, answer in history]
    more = f"### Input:\n{context}\n\n" if context and question.strip() else ""
    head = f"{system}\n\n" if system else ""
    asked = question if question.strip() else context
    return f"{head}{''.join(earlier)}### Instruction:\n{asked}\n\n{more}### Response:\n"


def _turns(pairs: Iterable[tuple[str, str]], system: str = "") -> tuple[dict, ...]:
    head = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return (*head, *turns)


def _chat(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    messages = read_messages(row[shape.main], shape.main, template, renamed)
    if system := _optional(row, shape.system):
        if messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        elif messages[0].get("content") != system:
            raise Unreadable(f"has a system message and another one in {shape.system!r}: keep one of them")
    return Sample(where, messages=messages, tools=_tools(row, shape))


_SAMPLES = {"text": _text, "completion": _completion, "instruction": _instruction, "chat": _chat}


def _history(row: dict, key: str) -> list[tuple[str, str]]:
    pairs = from_json(row.get(key)) if key else None
    if pairs is None or pairs == "" or pairs == []:
        return []
    turns = isinstance(pairs, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    if not turns or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise Unreadable(f"{key!r} is not a list of pairs of texts: write [[question, answer], ...]")
    return [tuple(pair) for pair in pairs]


def _tools(row: dict, shape: Shape) -> list[dict] | None:
    tools = read_tools(row.get(shape.tools)) if shape.tools else None
    if tools and shape.tools.lower() == "functions":  # OpenAI's old name, without the wrapping
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools  # also an empty list: some templates require one


def _optional(row: dict, key: str) -> str:
    value = row.get(key) if key else None
    if value is not None and not isinstance(value, str):
        raise Unreadable(f"{key!r} is {type_name(value)}: write a string")
    return value or ""


def _string(row: dict, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise Unreadable(f"{key!r} is {type_name(value)}: write a string")
    if not value:
        raise Unreadable(f"{key!r} is empty: remove the row")
    return value
