"""From a checked sample to its tokens and the mask of those to be learned, for any chat template.

No markers are searched for. A turn's place in the rendered text is found by rendering: what stands before it
(``messages[:i]`` with the generation prompt) and up to its end (``messages[:i + 1]``). Where these do not open the
whole text (templates that drop the thinking of earlier turns, or place the tools in the last user turn), the turn is
found by rendering everything a second time with that one turn changed. Two to eight renderings a turn.

What is learned of a turn: all that the model has to write itself, from the end of the generation prompt (thinking
included, unless the prompt already holds it) to the end of what the template adds for the turn: the closing token, so
that the model learns to stop, and the newline that some templates put after it, as in mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .rows import Sample

Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text


class Unrenderable(Exception):
    """A row that the chat template refuses, or whose answers cannot be told from its prompt. Says the mend."""


def template_of(tokenizer: Any) -> str | None:
    """The source of the tokenizer's chat template; "" where it is not text, None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return "" if getattr(tokenizer, "has_chat_template", False) else None
    return template if isinstance(template, str) else str(template)


def encode(sample: Sample, tokenizer: Any, mask_turns: str | None) -> tuple[list[int], np.ndarray]:
    """Tokens of a sample.

    Args:
        mask_turns: ``None`` to learn everything, else which assistant turns to learn: "all" or "last".
    Returns: token ids, and a mask [L] bool, True where a token is to be learned (the first token never is).
    """
    if sample.messages:
        ids, mask = _encode_chat(sample, tokenizer, mask_turns)
    elif sample.pair:
        ids, start = _encode_pair(*sample.pair, tokenizer)
        mask = np.arange(len(ids)) >= (start if mask_turns else 0)
    else:
        ids = _with_eos(list(tokenizer.encode(sample.text)), tokenizer)
        mask = np.ones(len(ids), bool)
    mask[:1] = False  # nothing predicts the first token
    return ids, mask


def left_out(samples: Iterable[Sample], tokenizer: Any) -> list[str]:
    """What the template does not show of the rows, a sentence each: some pass over tools or calls without a word.

    Looks at the first row with tools and the first with calls: what is shown makes a difference when it changes.
    """
    notes, seen = [], set()
    for sample in samples:
        found = {"tools"} if sample.tools else set()
        calling = next((i for i, message in enumerate(sample.messages) if message.get("tool_calls")), None)
        found |= {"tool_calls"} if calling is not None else set()
        for what in sorted(found - seen):
            seen.add(what)
            text = _renderer(sample, tokenizer)(sample.messages)
            if what == "tools":
                other = sample._replace(tools=None)
            else:
                changed = _changed(sample.messages[calling], text)[0]
                before, after = sample.messages[:calling], sample.messages[calling + 1 :]
                other = sample._replace(messages=(*before, changed, *after))
            try:
                shown = _renderer(other, tokenizer)(other.messages) != text
            except Exception:  # a template that cannot do without has seen it
                shown = True
            if not shown:
                notes.append(f"the chat template leaves out the rows' {what} (first in {sample.where})")
        if len(seen) == 2:
            break
    return notes


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], int]:
    """Prompt and completion without a template: joined as they are, ended by eos.

    Returns: token ids, and the index of the first one that is not the prompt's alone.
    """
    ids = _with_eos(list(tokenizer.encode(prompt + completion)), tokenizer)
    return ids, _common(list(tokenizer.encode(prompt)), ids)


def _encode_chat(sample: Sample, tokenizer: Any, mask_turns: str | None) -> tuple[list[int], np.ndarray]:
    try:
        ids = tokenizer.apply_chat_template(list(sample.messages), tools=sample.tools, return_dict=False)
    except Exception as error:  # whatever a template raises; its own sentence is the best one
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unrenderable(f"the chat template refuses this row ({said}): change its roles or their order") from error
    ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
    if mask_turns is None:
        return ids, np.ones(len(ids), bool)
    turns = [i for i, message in enumerate(sample.messages) if i >= sample.first and message["role"] == "assistant"]
    if mask_turns == "last":
        turns = turns[-1:]
    if not turns:
        return ids, np.zeros(len(ids), bool)
    render = _renderer(sample, tokenizer)
    text = render(sample.messages)
    spans = turn_spans(text, render, sample.messages, turns)
    return ids, _to_tokens(spans, text, ids, tokenizer)


def _renderer(sample: Sample, tokenizer: Any) -> Render:
    def render(messages: Sequence[dict], add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tools=sample.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return render


def turn_spans(text: str, render: Render, messages: Sequence[dict], turns: Sequence[int]) -> list[tuple[int, int]]:
    """Where in ``text``, the rendering of ``messages``, the assistant's ``turns`` (indices) stand.

    Returns: a (start, end) in characters for each turn, in order and without overlap.
    """
    spans, last = [], 0
    for i in turns:
        try:
            span = _span_by_opening(text, render, messages, i) or _span_by_change(text, render, messages, i, last)
        except Exception:  # the template refuses a part of the row
            span = None
        if span is None or not last <= span[0] <= span[1] <= len(text):
            raise Unrenderable(
                f"cannot tell message {i + 1} (assistant) from its surroundings in the chat template's text: "
                "leave mask_prompt out, or split the row so that each ends with its answer"
            )
        spans.append(span)
        last = span[1]
    return spans


def _span_by_opening(text: str, render: Render, messages: Sequence[dict], i: int) -> tuple[int, int] | None:
    """The turn's span where its prompt opens the text up to its end, and that opens the whole text."""
    if i == 0:  # most templates cannot render no messages at all
        return None
    before = render(messages[:i], True)
    through = text if i + 1 == len(messages) else render(messages[: i + 1])
    if text.startswith(through) and through.startswith(before):
        return len(before), len(through)
    return None


def _span_by_change(text: str, render: Render, messages: Sequence[dict], i: int, last: int) -> tuple[int, int] | None:
    """The turn's span by what changes in the text when the turn changes.

    The same change is made in the whole row and in the row that ends with the turn. The latter tells how much of the
    turn stands before and after the change (``lead``, ``close``); the former where the change is in ``text``.
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
        left, right = _common(text, other), _common_end(text, other)
        short_left, close = _common(through, short), _common_end(through, short)
        begin = _find_header(through, header, 0, short_left) if start is None else min(start, short_left)
        lead = None if begin is None else through[begin:short_left]
        if lead is not None and text.endswith(lead, last, left):
            first = left - len(lead)
        else:  # thinking that is dropped from earlier turns is not there to lead
            first = _find_header(text, header, last, left)
        if first is None:
            continue
        end = len(text) - right
        tail = through[len(through) - close :]
        return first, end + _common(tail, text[end : end + close])
    return None


def _generation_start(render: Render, messages: Sequence[dict], i: int, through: str) -> tuple[str, int | None]:
    """The text a generation prompt adds, and where in ``through`` it ends (None where only a search can tell)."""
    if i == 0:
        try:
            probe = [{"role": "user", "content": "x"}]
            return render(probe, True)[len(render(probe)) :], None
        except Exception:
            return "", None
    prompt, bare = render(messages[:i], True), render(messages[:i])
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    same = _common(prompt, through)
    return header, same if same >= len(bare) else None


def _find_header(text: str, header: str, low: int, high: int) -> int | None:
    """Where the generation prompt ends in ``text[low:high]``: the whole of it, or an opening of it that ends there.

    The latter is for generation prompts that switch thinking off, ``<assistant><think></think>``, in templates that
    write earlier turns as ``<assistant>`` alone.
    """
    if not header:
        return high
    at = text.rfind(header, low, high)
    if at >= 0:
        return at + len(header)
    return next((high for n in range(len(header) - 1, 0, -1) if text.endswith(header[:n], low, high)), None)


def _changed(message: dict, text: str) -> list[dict]:
    """The message with another tool name, or with other content; in a character that the row does not use."""
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


def _to_tokens(spans: list[tuple[int, int]], text: str, ids: list[int], tokenizer: Any) -> np.ndarray:
    """The mask of the tokens with a character in one of the spans.

    A token that holds the last of the prompt and the first of the answer counts, so that no answer is lost.
    """
    starts, ends = _places(text, ids, tokenizer, [edge for span in spans for edge in span])
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return mask


def _places(text: str, ids: list[int], tokenizer: Any, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-last character of each token, [L] and [L]; exact at ``edges`` at least."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    encoding = fast.encode(text, add_special_tokens=False) if hasattr(fast, "encode") else None
    if encoding is not None and encoding.ids == ids:
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers leave blanks out of the offsets of their tokens; the blanks belong to the token all the same.
        return np.minimum(starts, np.concatenate([[0], ends[:-1]])), ends
    if list(tokenizer.encode(text, add_special_tokens=False)) != ids:
        raise Unrenderable(
            "this tokenizer makes other tokens of the chat template's text than of the messages, so answers cannot be "
            "told from prompts: leave mask_prompt out"
        )
    # Slow tokenizers tell no offsets: a token stands where the text so far, tokenized alone, stops to agree.
    starts, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    low = 0
    for edge in sorted(set(edges)):
        count = _common(list(tokenizer.encode(text[:edge], add_special_tokens=False)), ids)
        starts[low:count], ends[low:count] = (ends[low - 1] if low else 0), edge
        low = max(low, count)
    starts[low:], ends[low:] = (ends[low - 1] if low else 0), len(text)
    return starts, ends


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common beginning, by halving (comparing slices is the fast way in Python)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _common_end(a: str, b: str) -> int:
    """Length of the common end that does not reach into the common beginning."""
    return min(_common(a[::-1], b[::-1]), min(len(a), len(b)) - _common(a, b))
