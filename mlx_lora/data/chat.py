"""Tokens of a checked sample and the mask of the tokens to learn, for any chat template.

The position of a turn in the rendered text is found without searching for markers, by rendering two prefixes of the
chat: the messages before the turn (``messages[:i]`` with the generation prompt) and up to its end
(``messages[:i + 1]``). Some templates drop the thinking of earlier turns, or put the tools into the last user turn.
Then these renderings are not prefixes of the whole text, and the turn is found by rendering the chat a second time with
only that turn changed. A turn takes two to eight renderings.

The learned part of a turn is everything that the model has to generate: from the end of the generation prompt (with the
thinking, unless the generation prompt contains it) to the end of the text that the template adds after the turn. That
text is the closing token, so that the model learns to stop, and the newline that some templates add, as in mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .batches import Example
from .left_out import LeftOut
from .samples import Sample
from .template import Template, encode_prompt, encode_text, said_by

Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text


class Unrenderable(Exception):
    """A row that the chat template rejects, or whose answers cannot be located in its text. The message has the fix."""


class Encoder:
    """Turns samples into tokens and a mask of the tokens to learn.

    Args:
        mask_turns: ``None`` to learn everything, else which assistant turns to learn: "all" or "last".
    """

    def __init__(self, tokenizer: Any, mask_turns: str | None = None):
        self.tokenizer, self.mask_turns = tokenizer, mask_turns
        self.template = Template(tokenizer)
        self.left_out = LeftOut(self.template)

    def encode(self, sample: Sample) -> list[Example]:
        """The sample as one example, not truncated. Raises: Unrenderable."""
        if sample.messages:
            ids, mask = self._chat(sample)
        elif sample.pair:
            ids, start = _encode_pair(*sample.pair, self.tokenizer)
            mask = np.arange(len(ids)) >= (start if self.mask_turns else 0)
        else:
            ids = encode_text(self.tokenizer, sample.text)
            mask = np.ones(len(ids), bool)
        mask[:1] = False  # nothing predicts the first token
        return [Example(np.array(ids, np.int32), mask)]

    def warnings(self) -> list[str]:
        """What the chat template left out of the samples."""
        return self.left_out.warnings()

    def _chat(self, sample: Sample) -> tuple[list[int], np.ndarray]:
        messages, template = self.template.chat(sample.messages), self.template
        try:
            text = template.text(messages, sample.tools)
            ids, encoding = template.tokens(messages, sample.tools, text)
        except Exception as error:  # templates raise errors of any type, with their own message
            opens = messages[0]["role"] == "assistant"
            order = "; the row begins with an assistant's turn" if opens else ""
            raise Unrenderable(f"the chat template rejects this row: {said_by(error)}{order}") from error
        self.left_out.look(sample.where, messages, sample.tools, text)
        if self.mask_turns is None:
            return ids, np.ones(len(ids), bool)
        turns = [i for i, message in enumerate(messages) if i >= sample.first and message["role"] == "assistant"]
        if self.mask_turns == "last":
            turns = turns[-1:]
        turns = [i for i in turns if i not in sample.unlearned]
        if not turns:
            return ids, np.zeros(len(ids), bool)

        def render(some: Sequence[dict], add_generation_prompt: bool = False) -> str:
            return template.text(some, sample.tools, add_generation_prompt)

        spans = turn_spans(text, render, messages, turns)
        return ids, _to_tokens(spans, text, ids, encoding, self.tokenizer)


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens of prompt, completion and eos, without a template.

    Returns: token ids, and the index of the first one that contains a part of the completion.
    """
    completion = completion.removeprefix(getattr(tokenizer, "bos_token", None) or "")
    ids = encode_text(tokenizer, prompt + completion)
    return ids, common_length(encode_prompt(tokenizer, prompt), ids)


def turn_spans(text: str, render: Render, messages: Sequence[dict], turns: Sequence[int]) -> list[tuple[int, int]]:
    """The positions of the assistant's ``turns`` (indices) in ``text``, the rendering of ``messages``.

    Returns: (start, end) in characters for each turn, in order and without overlap.
    """
    spans, last = [], 0
    for i in turns:
        try:
            span = _span_by_prefix(text, render, messages, i) or _span_by_change(text, render, messages, i, last)
        except Exception:  # the template rejects a part of the chat
            span = None
        if span is None or not last <= span[0] <= span[1] <= len(text):
            raise Unrenderable(
                "the assistant's turns cannot be located in the text that the chat template makes: "
                "split the row so that each new row ends with an answer"
            )
        spans.append(span)
        last = span[1]
    return spans


def _span_by_prefix(text: str, render: Render, messages: Sequence[dict], i: int) -> tuple[int, int] | None:
    """The turn's span, if the prompt is a prefix of the chat up to its end, and that a prefix of ``text``."""
    if i == 0:  # most templates cannot render no messages at all
        return None
    before = render(messages[:i], True)
    through = text if i + 1 == len(messages) else render(messages[: i + 1])
    if text.startswith(through) and through.startswith(before):
        return len(before), len(through)
    return None


def _span_by_change(text: str, render: Render, messages: Sequence[dict], i: int, last: int) -> tuple[int, int] | None:
    """The turn's span, found from what changes in the text when the turn changes.

    The same change is made in the whole chat and in the chat that ends with the turn. The latter shows how much of the
    turn is before and after the change (``lead``, ``close``); the former shows where in ``text`` the change is.
    """
    through = render(messages[: i + 1])
    header, start = _generation_start(render, messages, i, through)
    for changed in _changed(messages[i], text):
        try:
            other = render([*messages[:i], changed, *messages[i + 1 :]])
            short = render([*messages[:i], changed])
        except Exception:
            continue  # a template that checks the calls against their results; try the next change
        if other == text or short == through:
            continue
        left, right = common_length(text, other), _common_end(text, other)
        short_left, close = common_length(through, short), _common_end(through, short)
        begin = _find_header(through, header, 0, short_left) if start is None else min(start, short_left)
        lead = None if begin is None else through[begin:short_left]
        if lead is not None and text.endswith(lead, last, left):
            first = left - len(lead)
        else:  # the lead is not in the text: the template drops its thinking from earlier turns
            first = _find_header(text, header, last, left)
        if first is None:
            continue
        end = len(text) - right
        tail = through[len(through) - close :]
        return first, end + common_length(tail, text[end : end + close])
    return None


def _generation_start(render: Render, messages: Sequence[dict], i: int, through: str) -> tuple[str, int | None]:
    """The text that a generation prompt adds, and where in ``through`` it ends (None if it must be searched for)."""
    if i == 0:
        try:
            probe = [{"role": "user", "content": "x"}]
            return render(probe, True)[len(render(probe)) :], None
        except Exception:
            return "", None
    prompt, bare = render(messages[:i], True), render(messages[:i])
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    same = common_length(prompt, through)
    return header, same if same >= len(bare) else None


def _find_header(text: str, header: str, low: int, high: int) -> int | None:
    """Where the generation prompt, or a prefix of it at the end, ends in ``text[low:high]``.

    The prefix is for generation prompts that switch thinking off, ``<assistant><think></think>``, in templates that
    write earlier turns as ``<assistant>`` alone.
    """
    if not header:
        return high
    at = text.rfind(header, low, high)
    if at >= 0:
        return at + len(header)
    return next((high for n in range(len(header) - 1, 0, -1) if text.endswith(header[:n], low, high)), None)


def _changed(message: dict, text: str) -> list[dict]:
    """The message with another tool name, and with other content: a character that the text does not contain."""
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    out = []
    if calls := message.get("tool_calls"):
        call = calls[0]
        renamed = (
            {**call, "function": {**call["function"], "name": mark}} if "function" in call else {**call, "name": mark}
        )
        out.append({**message, "tool_calls": [renamed, *calls[1:]]})
    content = [{"type": "text", "text": mark}] if isinstance(message.get("content"), list) else mark
    out.append({**message, "content": content})
    return out


def _to_tokens(spans: list[tuple[int, int]], text: str, ids: list[int], encoding: Any, tokenizer: Any) -> np.ndarray:
    """The mask of the tokens with at least one character in one of the spans.

    A token that holds the end of the prompt and the start of the answer is learned, so that no part of an answer is
    lost.
    """
    edges = [edge for span in spans for edge in span]
    starts, ends = _token_positions(text, ids, encoding, tokenizer, edges)
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return mask


def _token_positions(
    text: str, ids: list[int], encoding: Any, tokenizer: Any, edges: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last character of each token, [L] and [L]; exact at least at ``edges``."""
    if encoding is not None:
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers leave blanks out of a token's offsets, although the token contains them.
        return np.minimum(starts, np.concatenate([[0], ends[:-1]])), ends
    if list(tokenizer.encode(text, add_special_tokens=False)) != ids:
        raise Unrenderable(
            "this tokenizer makes other tokens from the chat template's text than from the messages, so the answers "
            "cannot be located: use the model's fast tokenizer (tokenizer.json)"
        )
    # Slow tokenizers give no offsets. A token starts after an edge if the text before the edge, tokenized alone, has
    # the same tokens before it.
    starts, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    low = 0
    for edge in sorted(set(edges)):
        count = common_length(list(tokenizer.encode(text[:edge], add_special_tokens=False)), ids)
        starts[low:count], ends[low:count] = (ends[low - 1] if low else 0), edge
        low = max(low, count)
    starts[low:], ends[low:] = (ends[low - 1] if low else 0), len(text)
    return starts, ends


def common_length(a: Sequence, b: Sequence) -> int:
    """Length of the common prefix, by bisection (comparing slices is fast in Python)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _common_end(a: str, b: str) -> int:
    """Length of the common suffix, without overlap with the common prefix."""
    return min(common_length(a[::-1], b[::-1]), min(len(a), len(b)) - common_length(a, b))
