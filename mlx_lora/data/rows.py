"""Rows of one file to samples: texts, pairs of a prompt and a completion, or chats. All faults are collected.

``shapes.py`` decides which columns are read, ``messages.py`` checks and rewrites messages, and ``chat.py`` makes the
tokens. Rows with instructions become one turn by the user and one by the assistant. Without a chat template they become
``alpaca_prompt`` and the answer; the rows with ``prompt`` and ``completion`` stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..config import LABELS, PAIRS, TOKENS, DataConfig
from .faults import Fault, Place, printable
from .files import Row
from .messages import from_json, read_messages, type_name
from .preference_rows import label_sample, pair_sample, preference_shape
from .samples import Sample, from_json_list, optional, string, tools_of, turns, weighed
from .shapes import CHATS, PROMPT_PARTS, Shape, Unreadable, reading, shape_of

_NO_INPUT = ("", "<noinput>", "<no input>")  # values in Alpaca files that stand for an empty input


class Checked(NamedTuple):
    """The valid rows of a file, warnings, and a line about how the rows were read unless that is obvious."""

    samples: list[Sample]
    reading: list[str]
    warnings: list[str]


def check(
    rows: Iterable[Row], config: DataConfig, template: str | None, faults: list[Fault], kind: str = TOKENS
) -> Checked:
    """Check the rows of one file.

    Args:
        template: the tokenizer's chat template; None if it has none.
        faults: receives everything that is wrong.
        kind: what the loss takes, see ``config.preference``.
    """
    rows = list(rows)
    shapes: dict[tuple, Shape | Unreadable] = {}  # keyed by the columns of a row and the types of their values
    found = [_shape_of_row(value, config, kind, shapes) for _, value in rows]
    main = _most_common([shape for shape in found if isinstance(shape, Shape)])
    samples: list[Sample] = []
    renamed: dict[str, str] = {}
    left_out: set[str] = set()  # columns of the prompt that are not read with mlx-lm's keys
    strings = template is not None  # whether these rows could be read as instructions instead
    seen = next((row.where for row, shape in zip(rows, found, strict=True) if shape is main), None)
    if main is not None:
        try:
            _check_kind(main, config, template)
        except Unreadable as fault:  # true of every row, so one line is enough
            faults.append(Fault(seen, str(fault)))
            return Checked([], [], [])
    for (where, value), shape in zip(rows, found, strict=True):
        try:
            if main is None or isinstance(shape, Unreadable) or not shape.same(main):
                raise _odd_one(value, shape, main, seen)
            sample = _SAMPLES[shape.kind](where, value, shape, template, renamed)
            _check_text(sample[1:])
            samples.append(sample)
            if shape.kind == "completion":
                beside = {key for key in value if str(key).strip().lower() in PROMPT_PARTS and value[key]}
                left_out |= beside
                strings = strings and not (beside and isinstance(from_json_list(value[shape.main]), list))
        except Unreadable as fault:
            faults.append(Fault(where, str(fault), getattr(fault, "part", "")))
    if not samples:
        return Checked([], [], [])
    used = [shape for shape in shapes.values() if isinstance(shape, Shape) and shape.same(main)]
    keys = {key for columns in shapes for key, _ in columns}
    warnings = []
    if left_out:
        warnings.append(_left_out_of_prompts(main, rows[0].where.name, sorted(left_out), strings))
    if not config.mask_prompt and any(sample.unlearned for sample in samples):
        warnings.append(f"{rows[0].where.name}: messages of weight 0 are learned, too: --mask-prompt leaves them out")
    return Checked(samples, reading(used, keys, renamed, template is not None), warnings)


def _shape_of_row(
    value: Any, config: DataConfig, rows: str, shapes: dict[tuple, Shape | Unreadable]
) -> Shape | Unreadable:
    if not isinstance(value, dict):
        return Unreadable(f"{type_name(value)} where an object is needed: write one {{...}} on each line")
    columns = tuple((key, _kind(key, item)) for key, item in value.items() if item is not None)
    if columns not in shapes:
        try:
            named = {str(key): kind for key, kind in columns}
            shapes[columns] = shape_of(named, config) if rows == TOKENS else preference_shape(named, config, rows)
        except Unreadable as fault:
            shapes[columns] = fault
    return shapes[columns]


def _kind(key: Any, value: Any) -> type:
    """The type of a value; list for messages that a CSV cell holds as JSON."""
    if value.__class__ is str and value.lstrip()[:1] == "[" and str(key).strip().lower() in CHATS:
        return list
    return value.__class__


def _most_common(shapes: list[Shape]) -> Shape | None:
    """The first shape of the most common kind, so that one odd first row does not make the others faults."""
    counts = Counter(shape.key for shape in shapes)
    return max(shapes, key=lambda shape: counts[shape.key], default=None)


def _odd_one(value: Any, shape: Shape | Unreadable, main: Shape | None, seen: Place | None) -> Unreadable:
    """What is wrong with a row that has no shape, or another shape than ``main``, the shape of the row ``seen``."""
    needed = (main.main, main.answer) if main and isinstance(value, dict) else ()
    if empty := [repr(key) for key in needed if key in value and value[key] is None]:
        return Unreadable(
            f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} null: write a value, or remove the row"
        )
    if isinstance(shape, Unreadable):
        return shape
    article = "an" if shape.name[:1].lower() in "aeiou" else "a"
    return Unreadable(f"{article} {shape.name} row among {main.name} rows (first: {seen}): use one kind per file")


def _check_text(value: Any) -> None:
    """Refuse half surrogate pairs, which JSON can write ("\\ud800") and which no tokenizer takes."""
    if isinstance(value, str):
        if not value.isascii() and printable(value) != value:
            at = next(char for char in value if "\ud800" <= char <= "\udfff")
            raise Unreadable(
                f"has half of a surrogate pair (\\u{ord(at):04x}) in a text: remove it, or write the whole character"
            )
    elif isinstance(value, dict):
        _check_text([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item)


def _left_out_of_prompts(shape: Shape, name: str, columns: list[str], strings: bool) -> str:
    fix = f"write them into {shape.main!r}"
    if strings:
        old = f"{shape.main!r} and {shape.answer!r}"
        fix = f"write messages, or name the columns 'prompt' and 'response' instead of {old}"
    return printable(
        f"{name}: the prompts do not include {', '.join(columns)}: mlx-lm reads {shape.main} and {shape.answer} alone; "
        f"to include them, {fix}"
    )


def _check_kind(shape: Shape, config: DataConfig, template: str | None) -> None:
    if shape.kind == "text" and config.mask_prompt:
        raise Unreadable(
            "mask_prompt learns answers only, and text rows have none: "
            "write prompt and completion, or messages; to learn whole texts, leave mask_prompt out"
        )
    if shape.kind == "chat" and template is None:
        raise Unreadable(
            "chat rows need a chat template, and this tokenizer has none: "
            "use an instruct model, add chat_template.jinja to the model's folder, or use text or completion rows"
        )


def _text(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    return Sample(where, text=string(row, shape.main))


def _completion(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    prompt, completion = from_json_list(row[shape.main]), from_json_list(row[shape.answer])
    if isinstance(prompt, list) and isinstance(completion, list):
        if template is None:
            raise Unreadable("messages need a chat template, and this tokenizer has none: write strings")
        before = read_messages(prompt, shape.main, template, renamed)
        after = read_messages(completion, shape.answer, template, renamed)
        return weighed(Sample(where, messages=before + after, tools=tools_of(row, shape), first=len(before)))
    if not isinstance(prompt, str):
        raise Unreadable(f"{shape.main!r} is {type_name(prompt)}: write a string (or messages in both)")
    completion = string(row, shape.answer)
    if template is None:
        return Sample(where, pair=(prompt, completion))
    return Sample(where, messages=turns([(prompt, completion)]), tools=tools_of(row, shape), first=1)


def _instruction(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    if isinstance(row[shape.main], list):  # TRL's conversational prompt and completion, under other column names
        if beside := [key for key in (shape.context, shape.system, shape.history) if key and row.get(key)]:
            raise Unreadable(
                f"has messages in {shape.main!r} and more of the prompt in {', '.join(beside)}: "
                f"write it as messages in {shape.main!r}"
            )
        return _completion(where, row, shape, template, renamed)
    question = row[shape.main]
    if not isinstance(question, str):
        raise Unreadable(f"{shape.main!r} is {type_name(question)}: write a string")
    answer, context = string(row, shape.answer), optional(row, shape.context)
    context = "" if context.strip().lower() in _NO_INPUT else context
    if not (question.strip() or context):
        raise Unreadable(f"{shape.main!r} is empty: remove the row")
    system, history = optional(row, shape.system), _history(row, shape.history)
    if template is None:
        if shape.main.lower() == "prompt" and not (system or history or context):
            return Sample(where, pair=(question, answer))
        return Sample(where, pair=(alpaca_prompt(question, context, system, history), answer))
    asked = "\n".join(filter(None, [question, context]))
    messages = turns([*history, (asked, answer)], system)
    return Sample(where, messages=messages, tools=tools_of(row, shape), first=1)


def alpaca_prompt(question: str, context: str = "", system: str = "", history: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt of an instruction for models without a chat template, with Alpaca's headings."""
    earlier = [f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n" for asked, answer in history]
    more = f"### Input:\n{context}\n\n" if context and question.strip() else ""
    head = f"{system}\n\n" if system else ""
    asked = question if question.strip() else context
    return f"{head}{''.join(earlier)}### Instruction:\n{asked}\n\n{more}### Response:\n"


def _chat(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    messages = read_messages(row[shape.main], shape.main, template, renamed)
    if system := optional(row, shape.system):
        if messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        elif messages[0].get("content") != system:
            raise Unreadable(f"has a system message and another one in {shape.system!r}: keep one of them")
    return weighed(Sample(where, messages=messages, tools=tools_of(row, shape)))


_SAMPLES = {
    "text": _text,
    "completion": _completion,
    "instruction": _instruction,
    "chat": _chat,
    PAIRS: pair_sample,
    LABELS: label_sample,
}


def _history(row: dict, key: str) -> list[tuple[str, str]]:
    pairs = from_json(row.get(key)) if key else None
    if pairs is None or pairs == "" or pairs == []:
        return []
    turns = isinstance(pairs, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    if not turns or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise Unreadable(f"{key!r} is not a list of pairs of texts: write [[question, answer], ...]")
    return [tuple(pair) for pair in pairs]
