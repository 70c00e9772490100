"""Rows with preferences: which columns are read, and the row as samples. The formats are TRL's.

Pairs: ``prompt``, ``chosen`` and ``rejected``, each a text or messages. Without ``prompt``, the prompt is the common
beginning of ``chosen`` and ``rejected``. Labels: ``prompt``, ``completion`` and ``label`` (true for a good answer);
pairs are read as one good and one bad answer. As in rows with a prompt and a completion, texts become turns if there is
a chat template. Texts without ``prompt`` already contain the template's markers, so they are tokenized unchanged.
"""

from __future__ import annotations

from typing import Any

from ..config import LABELS, PAIRS, DataConfig
from .faults import Place
from .messages import read_messages, type_name
from .samples import Sample, from_json_list, optional, string, tools_of, turns, weighed
from .shapes import ANSWERS, QUESTIONS, SYSTEMS, TOOLS, Shape, Unreadable, one_column

_LABELS = {"true": True, "1": True, "false": False, "0": False}  # of a CSV cell, too


def preference_shape(columns: dict[str, type], config: DataConfig, kind: str) -> Shape:
    """The shape of rows with these columns (see ``shape_of``), for a loss that takes ``kind``. Raises: Unreadable."""
    shape = _shape(columns, config, kind)
    read = [name for name in (shape.context, shape.main, shape.answer) if name]
    for part in ("prompt", "completion", "chat", "text"):
        name = getattr(config, f"{part}_feature")
        if name != getattr(DataConfig, f"{part}_feature") and (name not in read or part in ("chat", "text")):
            raise Unreadable(f"is read by {' and '.join(read)}, not by --{part}-feature {name}: leave the option out")
    return shape


def _shape(columns: dict[str, type], config: DataConfig, kind: str) -> Shape:
    lower = {key.strip().lower(): key for key in columns}
    tools = next((lower[name] for name in TOOLS if name in lower), "")
    prompt, completion = _named(columns, config, "prompt"), _named(columns, config, "completion")
    prompt = prompt or one_column(lower, QUESTIONS[:1], "the prompt")
    have = ", ".join(sorted(columns)) or "no keys at all"
    system = one_column(lower, SYSTEMS, "the system message")
    if {"chosen", "rejected"} <= set(lower):
        chosen, rejected = lower["chosen"], lower["rejected"]
        texts = bool(prompt) and columns[chosen] is columns[prompt] is str
        return Shape(PAIRS, "preference", chosen, rejected, prompt, system, tools=tools, texts=texts)
    label = lower.get("label", "")
    if kind == PAIRS:
        fix = "rows with a label are for --loss kto" if label else "add them, or leave --loss out to imitate answers"
        raise Unreadable(f"has no 'chosen' and 'rejected' (it has {have}): {fix}")
    completion = completion or one_column(lower, ANSWERS, "the answer")
    columns_needed = {config.prompt_feature: prompt, config.completion_feature: completion, "label": label}
    if missing := [repr(name) for name, found in columns_needed.items() if not found]:
        raise Unreadable(
            f"has no {' and no '.join(missing)} (it has {have}): kto needs prompt, completion and label, "
            "or prompt, chosen and rejected"
        )
    texts = columns[prompt] is columns[completion] is str
    return Shape(LABELS, "labelled", prompt, completion, "", system, tools=tools, label=label, texts=texts)


def _named(columns: dict[str, type], config: DataConfig, part: str) -> str:
    """The column that ``--prompt-feature`` or ``--completion-feature`` names, if the row has it."""
    name = getattr(config, f"{part}_feature")
    if name not in columns and name != getattr(DataConfig, f"{part}_feature"):
        raise Unreadable(f"has no column {name!r} for --{part}-feature {name}: name one of its columns")
    return name if name in columns else ""


def pair_sample(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    """The chosen answer after its prompt, with the rejected one in ``rejected``."""
    chosen, rejected = from_json_list(row[shape.main]), from_json_list(row[shape.answer])
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise Unreadable(
            f"{shape.main!r} is {type_name(chosen)} and {shape.answer!r} {type_name(rejected)}: write both as the "
            "same type"
        )
    prompt = from_json_list(row[shape.context]) if shape.context and row.get(shape.context) is not None else None
    if isinstance(chosen, list):
        read = (
            read_messages(answer, key, _needed(template), renamed)
            for answer, key in ((chosen, shape.main), (rejected, shape.answer))
        )
        chosen, rejected = read
        prompt, chosen, rejected = _shared_messages(prompt, chosen, rejected, shape, template, renamed)
    else:
        chosen, rejected = string(row, shape.main), string(row, shape.answer)
        if prompt is None:
            prompt, chosen, rejected = _shared_text(chosen, rejected)
            return Sample(where, pair=(prompt, chosen), rejected=Sample(where, pair=(prompt, rejected)))
    good, bad = (_sample(where, row, shape, template, renamed, prompt, answer) for answer in (chosen, rejected))
    return good._replace(rejected=bad)


def label_sample(where: Place, row: dict, shape: Shape, template: str | None, renamed: dict) -> Sample:
    """The answer after its prompt, with its ``label``."""
    label = _LABELS.get(str(row[shape.label]).strip().lower())
    if label is None:
        raise Unreadable(
            f"{shape.label!r} is {row[shape.label]!r}: write true for a good answer and false for a bad one"
        )
    answer = from_json_list(row[shape.answer])
    answer = (
        read_messages(answer, shape.answer, _needed(template), renamed)
        if isinstance(answer, list)
        else string(row, shape.answer)
    )
    prompt = from_json_list(row[shape.main])
    return _sample(where, row, shape, template, renamed, prompt, answer)._replace(label=label)


def _sample(
    where: Place, row: dict, shape: Shape, template: str | None, renamed: dict, prompt: Any, answer: Any
) -> Sample:
    """A prompt (text or messages) and an answer (text or checked messages) as a sample."""
    system = optional(row, shape.system)
    if isinstance(prompt, str):
        if template is None and isinstance(answer, str):
            return Sample(where, pair=((f"{system}\n\n" if system else "") + prompt, answer))
        before = turns([(prompt, "")], system)[:-1]
    elif isinstance(prompt, tuple):
        before = prompt
    else:
        before = read_messages(prompt, shape.context or shape.main, _needed(template), renamed)
    if system and not isinstance(prompt, str):
        if before[0]["role"] == "system" and before[0].get("content") != system:
            raise Unreadable(f"has a system message and another one in {shape.system!r}: keep one of them")
        before = before if before[0]["role"] == "system" else ({"role": "system", "content": system}, *before)
    after = ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer
    if after[0]["role"] != "assistant":
        raise Unreadable(
            f"has an answer that begins with a message of the {after[0]['role']}: begin with the assistant's"
        )
    sample = weighed(Sample(where, messages=(*before, *after), tools=tools_of(row, shape), first=len(before)))
    if sample.unlearned:
        raise Unreadable("has messages of weight 0, which preference losses do not support: remove the weights")
    return sample


def _needed(template: str | None) -> str:
    if template is None:
        raise Unreadable(
            "messages need a chat template, and this tokenizer has none: "
            "use an instruct model, add chat_template.jinja to the model's folder, or write strings"
        )
    return template


def _shared_messages(
    prompt: Any, chosen: tuple, rejected: tuple, shape: Shape, template: str | None, renamed: dict
) -> tuple:
    """(prompt, chosen, rejected), with the common first messages of both answers as the prompt."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:  # equal, or one begins with the other: the shorter one's last message is its answer
        shared = min(len(chosen), len(rejected)) - 1
    if isinstance(prompt, list):
        before = read_messages(prompt, shape.context, _needed(template), renamed)
        if chosen[: len(before)] == before and len(chosen) > len(before):
            raise Unreadable(
                f"has the messages of {shape.context!r} in {shape.main!r}, too: "
                f"remove {shape.context!r} from the rows, or these messages from the answers"
            )
        return before, chosen, rejected
    if chosen[0]["role"] == "assistant":
        if prompt is None:
            raise Unreadable(f"has no prompt: add {'prompt'!r}, or write the whole chat in both answers")
        return prompt, chosen, rejected
    if not shared:
        raise Unreadable("has answers without a common first message, so there is no prompt: add 'prompt'")
    asked = chosen[shared - 1].get("content")
    if isinstance(prompt, str) and prompt.strip() not in (str(asked).strip(), str(chosen[0].get("content")).strip()):
        raise Unreadable(
            f"has a {shape.context!r} that is not the question in the answers' messages: remove one of the two"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the prompt ends where the texts differ, before a blank."""
    if chosen == rejected:
        raise Unreadable("has equal answers and no prompt, so the prompt cannot be separated from them: remove the row")
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if length and chosen[length - 1] == " ":
        length -= 1
    if not length:
        raise Unreadable("has answers without a common beginning, so there is no prompt: add 'prompt'")
    return chosen[:length], chosen[length:], rejected[length:]
