"""Rows as questions with known answers, to count how often a model gives exactly that answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config import TOKENS, DataConfig
from ..errors import DataError
from . import sources
from .faults import Fault, listing
from .rows import check
from .samples import Sample
from .template import Template, encode_prompt, said_by, template_of


class Question(NamedTuple):
    """The prompt's tokens, and the answer that the model should generate."""

    tokens: list[int]
    text: str  # the last message before the answer, or the prompt
    answer: str


def questions(
    config: DataConfig, tokenizer: Any, split: str = "test", count: int = -1, kind: str = TOKENS
) -> list[Question]:
    """The last answer of each row, and the prompt before it. The rows are read as ``load_dataset`` reads them.

    Args:
        count: how many rows to take, evenly spread over the split; -1 for all.
        kind: the kind of rows, see ``load_dataset``. With preferences, the expected answers are the chosen ones.

    Raises: DataError: bad rows, or rows without answers.
    """
    faults: list[Fault] = []
    # A validation set that is held out is a part of the training rows.
    source = sources.find(config, ("train", "valid") if split == "valid" else (split,), faults)
    samples: list[Sample] = []
    for part in (part for part in source.parts if part.split == split):
        samples += check(part.rows, part.config, template_of(tokenizer), faults, kind).samples
    samples = [sample for sample in samples if sample.label is not False]
    if not faults and not samples:
        raise DataError(f"the {split} set has no rows", "Write one JSON object on each line.")
    if 0 <= count < len(samples):
        samples = [samples[(2 * k + 1) * len(samples) // (2 * count)] for k in range(count)]
    template = Template(tokenizer)
    found = [_question(sample, template, faults) for sample in samples]
    if faults:
        raise DataError(listing(faults), "Exact match needs rows that end with an answer as text.")
    return found


def _question(sample: Sample, template: Template, faults: list[Fault]) -> Question | None:
    if sample.pair:
        prompt, answer = sample.pair
        return Question(encode_prompt(template.tokenizer, prompt), prompt, answer)
    if not sample.messages:
        faults.append(Fault(sample.where, "a text row has no answer to compare with: write prompt and completion"))
        return None
    *before, last = sample.messages
    if last["role"] != "assistant" or not isinstance(last.get("content"), str) or not before:
        faults.append(
            Fault(
                sample.where, "does not end with an assistant's answer in text: remove the messages after that answer"
            )
        )
        return None
    try:
        ids = template.prompt(before, sample.tools)
    except Exception as error:  # a template that refuses a row raises one of jinja's errors
        faults.append(Fault(sample.where, f"the chat template rejects this row: {said_by(error)}"))
        return None
    text = before[-1].get("content")
    return Question(ids, text if isinstance(text, str) else "", last["content"])
