"""Data sets of preferences: rows with a chosen and a rejected answer, or with an answer and a label; their batches.

Only the tokens of answers are learned. An answer begins where the tokens of the prompt alone and those of the prompt
with its answer differ, for both answers of a pair at the same token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..config import LABELS, PAIRS
from .batches import Dataset, Example, epoch_batches, pad, plan_widths
from .chat import Unrenderable, common_length
from .faults import Place, counted, ranges
from .left_out import LeftOut
from .samples import Sample
from .template import Template, encode_prompt, encode_text, said_by


class Pair(NamedTuple):
    """Two answers to the same prompt. tokens, mask: of the prompt with the chosen answer."""

    tokens: np.ndarray  # [L] int32
    mask: np.ndarray  # [L] bool: the answer
    rejected: Example

    @property
    def sequences(self) -> tuple[Example, Example]:
        return Example(self.tokens, self.mask), self.rejected

    def cut(self, limit: int) -> Pair:
        return Pair(self.tokens[:limit], self.mask[:limit], self.rejected.cut(limit))


class Labelled(NamedTuple):
    """A prompt with an answer, and whether the answer is good."""

    tokens: np.ndarray  # [L] int32
    mask: np.ndarray  # [L] bool: the answer
    label: bool
    start: int  # of the answer
    answer: np.ndarray  # [A] int32: all tokens of the answer, also where `tokens` are cut

    @property
    def sequences(self) -> tuple[Example]:
        return (Example(self.tokens, self.mask),)

    def cut(self, limit: int) -> Labelled:
        return self._replace(tokens=self.tokens[:limit], mask=self.mask[:limit])


class PairBatch(NamedTuple):
    """B pairs: the chosen answers in the first half, the rejected ones, in the same order, in the second."""

    tokens: np.ndarray  # [2B, T] int32, padded on the right with 0
    mask: np.ndarray  # [2B, T - 1] bool: whether the target tokens[:, j + 1] is of the answer
    lengths: np.ndarray  # [2B] int32: tokens of each sequence
    reference: np.ndarray  # [2B] float32: log-probability of each answer by the reference, 0 without one


class LabelBatch(NamedTuple):
    """B answers. In ``other_tokens`` each prompt is followed by the answer to another prompt of the batch."""

    tokens: np.ndarray  # [B, T] int32, padded on the right with 0
    mask: np.ndarray  # [B, T - 1] bool: whether the target tokens[:, j + 1] is of the answer
    label: np.ndarray  # [B] bool
    other_tokens: np.ndarray  # [B, T] int32
    other_mask: np.ndarray  # [B, T - 1] bool
    reference: np.ndarray  # [B, 2] float32: log-probabilities of the answer and of the other answer by the reference


class PairDataset(Dataset):
    """Pairs. reference: [N, 2] float32, the log-probabilities of the chosen and the rejected answers; None at first."""

    kind = PAIRS
    reference: np.ndarray | None = None

    def with_reference(self, reference: np.ndarray) -> PairDataset:
        """A copy with the log-probabilities ``reference`` [N, 2]; the rows are shared."""
        found = copy.copy(self)
        found.reference = np.asarray(reference, np.float32)
        return found

    def with_batches(self, batches: Iterable[Sequence[int]]) -> PairDataset:
        """Return the data set unchanged, because pairs do not depend on the other rows of a batch."""
        return self

    def collate(self, rows: np.ndarray, size: int, rank: int = 0, world: int = 1) -> PairBatch:
        width, here = self.width(rows), rows[rank::world]
        slots = size // world
        pairs = [self[int(row)] for row in here]
        chosen, rejected = (pad([pair.sequences[k] for pair in pairs], slots, width) for k in (0, 1))
        lengths, reference = np.zeros((2, slots), np.int32), np.zeros((2, slots), np.float32)
        for k in (0, 1):
            lengths[k, : len(here)] = [len(pair.sequences[k].tokens) for pair in pairs]
            if self.reference is not None:
                reference[k, : len(here)] = self.reference[here, k]
        tokens, mask = (np.concatenate(both) for both in zip(chosen, rejected, strict=True))
        return PairBatch(tokens, mask, lengths.ravel(), reference.ravel())


class LabelDataset(PairDataset):
    """Answers with labels. reference: [N, 2] float32, the log-probabilities of each answer and of its other answer.

    The other answer is the answer of the previous row in the batch, as in TRL. In about one row of a hundred it answers
    the same prompt. The rows of a batch stay together, so that its log-probability stays valid: later epochs have the
    same batches in another order.
    """

    kind = LABELS

    def __init__(self, examples: Iterable[Labelled], *args: Any):
        super().__init__(examples, *args)
        self.other = np.roll(np.arange(len(self)), 1)  # [N] the row whose answer follows the row's prompt

    def with_batches(self, batches: Iterable[Sequence[int]]) -> LabelDataset:
        """A copy in which a row's other answer is that of the previous row in its batch (the last, for the first row).

        A row that is alone in its batch keeps its other answer. Log-probabilities of other answers are dropped.
        """
        found = copy.copy(self)
        for name in ("widths", "_room"):  # they follow from the other answers
            found.__dict__.pop(name, None)
        found.other = self.other.copy()
        for rows in batches:
            if len(rows) > 1:
                found.other[rows] = np.roll(rows, 1)
        if not np.array_equal(found.other, self.other):
            found.reference = None
        return found

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        batches = epoch_batches(self.lengths, plan_widths(self.lengths), batch_size, seed, 0)
        order = np.random.RandomState([seed, epoch, 1]).permutation(len(batches)) if epoch else range(len(batches))
        return [batches[k] for k in order]

    def collate(self, rows: np.ndarray, size: int, rank: int = 0, world: int = 1) -> LabelBatch:
        width, here = self.width(rows), rows[rank::world]
        slots = size // world
        tokens, mask = pad([self[int(row)] for row in here], slots, width)
        others, other_mask = pad([self._with_other(int(row)) for row in here], slots, width)
        label, reference = np.zeros(slots, bool), np.zeros((slots, 2), np.float32)
        label[: len(here)] = [self[int(row)].label for row in here]
        if self.reference is not None:
            reference[: len(here)] = self.reference[here]
        return LabelBatch(tokens, mask, label, others, other_mask, reference)

    def _with_other(self, row: int) -> Example:
        """The prompt of a row with its other answer, as long as the longest row may be."""
        example, answer = self[row], self[int(self.other[row])].answer
        prompt = example.tokens[: example.start]
        tokens = np.concatenate([prompt, answer])[: self.limit]
        return Example(tokens, np.arange(len(tokens)) >= max(1, len(prompt)))

    @cached_property
    def _room(self) -> np.ndarray:
        return np.maximum(self.lengths, [len(self._with_other(row).tokens) for row in range(len(self))])

    def _hashed(self) -> bytes:
        return np.packbits([example.label for example in self]).tobytes()


def as_dataset(rows: Sequence[Any]) -> Dataset:
    """A data set of examples, pairs or labelled answers, whichever the first row is."""
    kinds = {Pair: PairDataset, Labelled: LabelDataset}
    return kinds.get(type(next(iter(rows), None)), Dataset)(rows)


class AnswerEncoder:
    """Makes pairs and labelled answers from samples.

    Args:
        kind: PAIRS or LABELS. With LABELS, a sample of a pair becomes a good and a bad answer.
    """

    def __init__(self, tokenizer: Any, kind: str):
        self._tokenizer, self._kind = tokenizer, kind
        self._template = Template(tokenizer)
        self._left_out = LeftOut(self._template)
        self._differs: list[Place] = []  # rows whose prompt has other tokens alone than with the answer
        self._equal: list[Place] = []  # rows with the same answer twice

    def encode(self, sample: Sample) -> list[Pair] | list[Labelled]:
        """The row or rows of a sample, not truncated. Raises: Unrenderable."""
        answers = [sample] if sample.rejected is None else [sample, sample.rejected]
        prompt = self._prompt(sample)
        tokens = [self._tokens(answer) for answer in answers]
        shared = [common_length(prompt, ids) for ids in tokens]
        if min(shared) < len(prompt):
            self._differs.append(sample.where)
        if len(tokens) == 2 and tokens[0] == tokens[1]:
            self._equal.append(sample.where)
        if self._kind == LABELS:
            labels = [sample.label] if sample.rejected is None else [True, False]
            rows = zip(tokens, shared, labels, strict=True)
            return [
                Labelled(*_example(ids, start), label, start, np.array(ids[start:], np.int32))
                for ids, start, label in rows
            ]
        chosen, rejected = (_example(ids, min(shared)) for ids in tokens)
        return [Pair(*chosen, rejected)]

    def warnings(self) -> list[str]:
        """Warnings about all samples encoded so far."""
        lines = self._left_out.warnings()
        if self._differs:
            lines.append(
                f"{_numbered(self._differs)}: the prompt has other tokens alone than before the answer; "
                "the answer begins at the first difference"
            )
        if self._equal:
            lines.append(f"{_numbered(self._equal)}: the chosen and the rejected answer are the same")
        return lines

    def _prompt(self, sample: Sample) -> list[int]:
        if sample.pair:
            return encode_prompt(self._tokenizer, sample.pair[0])
        with _rejected_by_template():
            return self._template.prompt(sample.messages[: sample.first], sample.tools)

    def _tokens(self, sample: Sample) -> list[int]:
        if sample.pair:
            return encode_text(self._tokenizer, "".join(sample.pair))
        with _rejected_by_template():
            messages = self._template.chat(sample.messages)
            text = self._template.text(messages, sample.tools)
            ids, _ = self._template.tokens(messages, sample.tools, text)
        self._left_out.look(sample.where, messages, sample.tools, text)
        return ids


@contextmanager
def _rejected_by_template() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # templates raise errors of any type, with their own message
        raise Unrenderable(f"the chat template rejects this row: {said_by(error)}") from error


def _example(ids: Sequence[int], start: int) -> Example:
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= max(1, start))


def _numbered(places: Sequence[Place]) -> str:
    """The name of the rows' file, how many rows there are, and their numbers."""
    numbers = ranges(sorted({place.number for place in places if place.number is not None}))
    return f"{places[0].name}, {counted(len(places), 'row')} ({numbers})"
