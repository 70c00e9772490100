"""Which columns of a row are its prompt, its answer or its messages.

mlx-lm's own keys come first: ``prompt`` with ``completion``, then ``messages``, or the names that the ``*_feature``
options give instead. Then the columns of well-known data sets are recognised, in any case: ``instruction``, ``input``
and ``output`` (Alpaca), ``instruction``, ``context`` and ``response`` (Dolly), other pairs of a question and an answer,
and ``conversations`` or ``dialog`` (ShareGPT). A ``text`` column is read if a row has none of these. A row that can be
read in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..config import PAIRS, PREFERENCES, DataConfig
from .faults import printable

# The first group with a column in the row is used. Two columns of one group are an error.
QUESTIONS = (("instruction", "prompt", "question", "query", "problem"), ("input", "inputs"), ("user", "human"))
ANSWERS = (("output", "response", "answer", "completion", "solution", "target", "targets"), ("assistant",))
CONTEXTS = ("input", "context")  # text that belongs to the question
SYSTEMS = (("system", "system_prompt", "system_message"),)
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
PROMPT_PARTS = (*CONTEXTS, *SYSTEMS[0], "history")  # columns that belong to the prompt
_NAMES = {("instruction", "output"): "Alpaca", ("instruction", "response"): "Dolly"}
TOOLS = ("tools", "functions")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))


class Unreadable(Exception):
    """The columns of a row do not determine what to learn. The message has the fix."""


class Shape(NamedTuple):
    """The columns to read; "" for a column that the rows do not have."""

    kind: str  # "text", "completion" (mlx-lm's), "instruction", "chat", or "pairs" and "labels" of preferences
    name: str  # what to call these rows
    main: str  # the text, the question, or the messages
    answer: str = ""
    context: str = ""
    system: str = ""
    history: str = ""  # earlier turns: pairs of a question and its answer
    tools: str = ""
    label: str = ""
    texts: bool = False  # of preferences: prompt and answers are strings, not messages

    def same(self, other: Shape) -> bool:
        """Whether rows of both shapes may be in one file: their required columns are the same."""
        return self.key == other.key

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.main, self.answer


def shape_of(columns: dict[str, type], config: DataConfig) -> Shape:
    """The shape of rows with these columns.

    Args:
        columns: the row's keys with the types of their values, without those whose value is None.

    Raises: Unreadable.
    """
    lower = {key.strip().lower(): key for key in columns}
    tools = next((lower[name] for name in TOOLS if name in lower), "")
    names = {kind: getattr(config, f"{kind}_feature") for kind in _DEFAULTS}
    chosen = {kind: name for kind, name in names.items() if name != _DEFAULTS[kind]}
    shape = _own_keys(columns, lower, names, tools)
    if shape is None and not chosen:
        chat = one_column(
            {name: key for name, key in lower.items() if columns[key] is list}, (CHATS,), "the conversation"
        )
        shape = _chat(chat, lower, tools) if chat else _instruction(lower, tools)
        if shape is None and "text" in columns:
            return Shape("text", "text", "text")
        shape = shape or _fallback(columns, lower, tools)
    _check_chosen(chosen, shape, columns, names)
    return shape


def _own_keys(columns: dict[str, type], lower: dict[str, str], names: dict[str, str], tools: str) -> Shape | None:
    """The shape by mlx-lm's keys, in mlx-lm's order. Rows with ``text`` and other columns are left to later rules."""
    if names["prompt"] in columns and names["completion"] in columns:
        return Shape("completion", "prompt and completion", names["prompt"], names["completion"], tools=tools)
    if names["chat"] in columns:
        return _chat(names["chat"], lower, tools)
    if names["text"] in columns and names["text"] != _DEFAULTS["text"]:
        return Shape("text", "text", names["text"])
    return None


def _check_chosen(chosen: dict[str, str], shape: Shape | None, columns: Iterable[str], names: dict[str, str]) -> None:
    """Refuse a row that does not have, or does not need, a column that an option names."""
    have = _list(columns) or "no columns"
    wrong = []
    for kind, name in chosen.items():
        option, other = f"--{kind}-feature {name}", _OTHER_SIDE.get(kind)
        if name not in columns:
            wrong.append(f"has no column {name!r} for {option} (it has {have}): name one of its columns")
        elif shape is None and other:
            wrong.append(f"has no column {names[other]!r} beside {option} (it has {have}): add --{other}-feature")
        elif shape is None or shape.kind != ("completion" if other else kind):
            read = f"is read by {' and '.join(filter(None, [shape.main, shape.answer]))}, not by"
            wrong.append(f"{read} {option}: leave the option out, or remove the other columns")
    if wrong:
        raise Unreadable("; ".join(wrong))


def _chat(key: str, lower: dict[str, str], tools: str) -> Shape:
    name = "chat" if key.lower() in ("messages", "chat") else key
    return Shape("chat", name, key, system=one_column(lower, SYSTEMS, "the system message"), tools=tools)


def _instruction(lower: dict[str, str], tools: str) -> Shape | None:
    if not all(any(name in lower for names in groups for name in names) for groups in (QUESTIONS, ANSWERS)):
        return None
    question, answer = one_column(lower, QUESTIONS, "the question"), one_column(lower, ANSWERS, "the answer")
    context = one_column({name: key for name, key in lower.items() if key != question}, (CONTEXTS,), "the context")
    name = _NAMES.get((question.strip().lower(), answer.strip().lower()), f"{question} and {answer}")
    system, history = one_column(lower, SYSTEMS, "the system message"), lower.get("history", "")
    return Shape("instruction", name, question, answer, context, system, history, tools)


def _fallback(columns: dict[str, type], lower: dict[str, str], tools: str) -> Shape:
    """The shape of a conversation stored as JSON text or of a text key with capitals; else raises with the reason."""
    if chat := one_column(lower, (CHATS,), "the conversation"):
        return _chat(chat, lower, tools)
    if "text" in lower:
        return Shape("text", "text", lower["text"])
    if {"chosen", "rejected"} <= set(lower):
        raise Unreadable(
            f"is a preference row (chosen, rejected): add --loss ({', '.join(PREFERENCES)}) to learn which answer is "
            "better; to imitate answers, write prompt and completion"
        )
    have = f"only {_list(columns)}" if columns else "no keys at all"
    for groups, side in ((QUESTIONS, 0), (ANSWERS, 1)):
        key = one_column(lower, groups, "the question" if side == 0 else "the answer")
        if key:
            other = next((pair[1 - side] for pair in _PAIRS if pair[side] == key.lower()), _PAIRS[-1][1 - side])
            raise Unreadable(f"has {key!r} but no {other!r}: add it (the row has {have})")
    raise Unreadable(
        f"needs 'messages', 'prompt' with 'completion', or 'text', has {have}: rename its keys, or name them with "
        "--chat-feature, --prompt-feature with --completion-feature, or --text-feature"
    )


def one_column(lower: dict[str, str], groups: Iterable[Iterable[str]], what: str) -> str:
    """The column that the first matching group names; "" if no group matches."""
    for names in groups:
        found = [lower[name] for name in names if name in lower]
        if len(found) > 1:
            raise Unreadable(
                f"has {len(found)} columns that may be {what} ({_list(found)}): remove or rename all but one"
            )
        if found:
            return found[0]
    return ""


def _list(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))


def reading(shapes: Iterable[Shape], columns: Iterable[str], renamed: dict[str, str], template: bool) -> list[str]:
    """One line that says how rows are read, unless they have mlx-lm's keys alone.

    Args:
        shapes: all shapes of the rows of a file (they agree but for optional columns).
        columns: all columns of its rows.
        renamed: keys and roles of messages that were renamed, with the new names.
        template: whether the tokenizer has a chat template.
    """
    shapes = list(shapes)
    if not shapes:
        return []
    first = shapes[0]
    optional = {
        part: max(getattr(shape, part) for shape in shapes) for part in ("context", "system", "history", "tools")
    }
    parts = []
    if first.kind == "instruction":
        question = " + ".join(filter(None, [first.main, optional["context"]]))
        user, assistant = ("user", "assistant") if template else ("prompt", "completion")
        parts = [f"{question} -> {user}", f"{first.answer} -> {assistant}"]
    elif first.kind == "chat" and (renamed or first.main != "messages"):
        parts = [f"{first.main} -> messages", *(f"{old} -> {new}" for old, new in renamed.items())]
    elif first.kind == PAIRS and not optional["context"]:
        parts = [f"what {first.main} and {first.answer} share at the beginning -> prompt"]
    if any(shape.texts for shape in shapes) and template:
        parts.append("the texts are turns of a chat")
    parts += [f"{optional[part]} -> {said}" for part, said in _SAID.items() if optional[part] not in ("", said)]
    if first.kind == "instruction" and not template and (first.main.lower() != "prompt" or optional["context"]):
        parts.append("as text with Alpaca's headings (### Instruction:, ### Input:, ### Response:)")
    read = {first.main, first.answer, first.label, *optional.values()} - {""}
    name = "ShareGPT" if "from" in renamed else first.name
    line = f"Reading {name} rows: {', '.join(parts)}" if parts else f"Reading {name} rows"
    if others := sorted({str(column) for column in columns} - read):
        line += f"; not read: {', '.join(name or 'a column without a name' for name in others)}"
    return [printable(line)] if parts or others else []


_SAID = {"system": "system message", "history": "earlier turns", "tools": "tools"}
_OTHER_SIDE = {"prompt": "completion", "completion": "prompt"}
_DEFAULTS = {kind: getattr(DataConfig(), f"{kind}_feature") for kind in ("prompt", "completion", "chat", "text")}
