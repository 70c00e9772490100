"""A few held-out prompts and the model's greedy answers to them, which show what training changed.

The prompts are rows of the validation set. Answering draws no random numbers and does not change the model.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..base.modes import mode
from ..config import LABELS, TOKENS, DataConfig
from ..data import Dataset, Question, Splits, questions
from ..errors import DataError
from .evaluation import answers
from .reports import Answer

MAX_TOKENS = 64  # of an answer
_TEXT_PROMPT = 48  # the most tokens of a text row that are its prompt


class HeldOut:
    """Prompts from the validation set. ``why`` is the reason if there are none, else "".

    Args:
        data: a DataConfig or the loaded ``Splits``.
        sets: the loaded sets.
        batch_size: prompts to answer at once; a training batch of this size fits in memory.
    """

    def __init__(self, data: Any, sets: Splits, tokenizer: Any, count: int, batch_size: int):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.asked: list[Question] = []
        self.why = _obstacle(sets.valid, tokenizer, count)
        if not self.why:
            try:
                self.asked = _questions(data, sets.valid, tokenizer, count)
            # an error of the caller's own tokenizer or data set; the run goes on without answers
            except Exception as problem:
                self.why = f"the validation rows cannot be read as prompts: {_said(problem)}"

    def answer(self, model: nn.Module) -> list[Answer]:
        """The answers of ``model``; none if it cannot generate, and ``why`` then holds the reason."""
        if not self.asked:
            return []
        try:
            with mode(model, training=False):
                return list(answers(model, self.tokenizer, self.asked, MAX_TOKENS, self.batch_size))
        except Exception as problem:  # a model that mlx-lm can train but not generate with
            self.asked, self.why = [], f"the model cannot generate: {_said(problem)}"
            return []


def _obstacle(valid: Any, tokenizer: Any, count: int) -> str:
    if count == 0:
        return "report_prompts is 0"
    if valid is None or len(valid) == 0:
        return "the run has no validation rows"
    return "" if hasattr(tokenizer, "decode") else "the run was given no tokenizer"


def _questions(data: Any, valid: Dataset, tokenizer: Any, count: int) -> list[Question]:
    """``count`` rows, evenly spread: from the data's files, or made from the tokens if the files hold no answers."""
    if isinstance(data, DataConfig):
        try:
            found = questions(data, tokenizer, "valid", count, valid.kind)
            longest = data.max_seq_length
            return [question for question in found if len(question.tokens) <= longest] or found[:1]
        except DataError:  # rows of text, or that end without an answer
            pass
    among: Any = range(len(valid))
    if getattr(valid, "kind", TOKENS) == LABELS:  # answers labelled bad are not expected answers
        among = [i for i in among if valid[i].label]
    count = min(count, len(among))
    return [_split_row(valid[among[(2 * k + 1) * len(among) // (2 * count)]], tokenizer) for k in range(count)]


def _split_row(row: Any, tokenizer: Any) -> Question:
    """A row's last learned tokens as the answer to the tokens before them; a text is split after its first part."""
    tokens, mask = row.tokens.tolist(), row.mask.tolist()
    start = max(i for i, learned in enumerate(mask) if learned and not (i and mask[i - 1]))
    if start <= 1:
        start = max(1, min(_TEXT_PROMPT, len(tokens) // 2))
    prompt, answer = tokens[:start], tokens[start : start + MAX_TOKENS]
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, answer)]
    return Question(prompt, *texts)


def _said(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
