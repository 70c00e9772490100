"""A tokenizer's chat template: what it requires, and the text and tokens it makes. Training data and prompts use it.

Templates differ in what they accept. Calls on a made-up chat find out whether this one needs a list of tools, reads
content only as a list of parts, or writes "None" for a call without content. Messages are then passed in that form. A
text is tokenized with one BOS and one EOS, whether the row, the template or the tokenizer writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from .messages import joined

_MARK = "\ue000"  # a private-use character, which no data contains
_CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def template_of(tokenizer: Any) -> str | None:
    """The text of the tokenizer's chat template; "" if it is not text, None if there is no template."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return "" if getattr(tokenizer, "has_chat_template", False) else None
    return template if isinstance(template, str) else str(template)


def said_by(error: Exception) -> str:
    """A template's error message, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Template:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.source = template_of(tokenizer)
        self._edges = [getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")]
        self._same_tokens: bool | None = None  # whether the text gives the template's tokens

    def chat(self, messages: Iterable[dict]) -> list[dict]:
        """The messages as this template needs them."""
        return [self._message(message) for message in messages]

    def text(self, messages: Sequence[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        """The template's text for messages from ``chat``. Raises what the template raises."""
        return self._apply(messages, tools, add_generation_prompt, tokenize=False)

    def tokens(self, messages: Sequence[dict], tools: list | None, text: str) -> tuple[list[int], Any]:
        """The token ids of ``text``, and the tokenizer's encoding with offsets (None if it has none)."""
        ids, encoding = self._encode(text)
        if self._same_tokens is None:
            self._same_tokens = ids == self._apply_ids(messages, tools)
        return (ids, encoding) if self._same_tokens else (self._apply_ids(messages, tools), None)

    def prompt(
        self,
        messages: Sequence[dict],
        tools: list | None = None,
        variables: dict[str, Any] | None = None,
        begins: str | None = None,
    ) -> list[int]:
        """The tokens of a chat, up to the assistant's next answer. Raises what the template raises.

        Args:
            variables: for the template, such as {"enable_thinking": False}.
            begins: the beginning of the answer, which the prompt ends with.
        """
        options = dict(variables or {})
        if begins:
            messages = [*messages, {"role": "assistant", "content": begins}]
            options["continue_final_message"] = True
        return self._apply_ids(self.chat(messages), tools, add_generation_prompt=not begins, **options)

    def _apply(self, messages: Sequence[dict], tools: list | None, prompt: bool, tokenize: bool, **options: Any) -> Any:
        tools = self._no_tools if tools is None else tools
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=tokenize, add_generation_prompt=prompt, return_dict=False, **options
        )

    def _apply_ids(
        self, messages: Sequence[dict], tools: list | None, add_generation_prompt: bool = False, **options: Any
    ) -> list[int]:
        ids = self._apply(messages, tools, add_generation_prompt, tokenize=True, **options)
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)

    def _encode(self, text: str) -> tuple[list[int], Any]:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if hasattr(fast, "encode"):
            encoding = fast.encode(text, add_special_tokens=False)
            return encoding.ids, encoding
        return list(self.tokenizer.encode(text, add_special_tokens=False)), None

    def _message(self, message: dict) -> dict:
        content = message.get("content")
        if isinstance(content, list):
            content = joined(content)
        if content is None:
            return {**message, "content": self._no_content} if message.get("tool_calls") else message
        bos, eos = self._edges
        # The template writes BOS itself; a second one, from text exported with it, would be learned.
        if bos and (begin := content.lstrip()).startswith(bos):
            content = begin[len(bos) :]
        if eos and (end := content.rstrip()).endswith(eos):
            content = end[: -len(eos)]
        if self._reads_parts_only:
            content = [{"type": "text", "text": content}]
        return message if content is message.get("content") else {**message, "content": content}

    @cached_property
    def _no_tools(self) -> list | None:
        """An empty list of tools if the template fails without a list."""
        none = self._try([_user(_MARK)], None)
        return [] if none is None and self._try([_user(_MARK)], []) is not None else None

    @cached_property
    def _reads_parts_only(self) -> bool:
        if _MARK in (self._try([_user(_MARK)], self._no_tools) or ""):
            return False
        return _MARK in (self._try([_user([{"type": "text", "text": _MARK}])], self._no_tools) or "")

    @cached_property
    def _no_content(self) -> str | None:
        """Content for a message with only a tool call: None, as OpenAI writes, or "" if that prints "None"."""
        texts = [
            self._try([_user(_MARK), {"role": "assistant", "content": content, "tool_calls": [_CALL]}], self._no_tools)
            for content in (None, "")
        ]
        if texts[1] is None:
            return None
        return "" if texts[0] is None or texts[0].count("None") > texts[1].count("None") else None

    def _try(self, messages: list[dict], tools: list | None) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception:  # templates raise errors of any type
            return None


def _user(content: Any) -> dict:
    return {"role": "user", "content": content}


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with exactly one BOS and one EOS, even if both the tokenizer and the text add them."""
    ids, eos = _one_bos(tokenizer, text), tokenizer.eos_token_id
    if eos is None or (_ends(tokenizer, text.rstrip()) and not _ends(tokenizer, text)):
        return ids  # the text's own EOS, and blanks such as the newline that chat templates write after it
    while len(ids) > 1 and ids[-2:] == [eos, eos]:
        ids.pop()
    return ids if ids and ids[-1] == eos else [*ids, eos]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text to continue: one BOS, and no EOS unless the text has one."""
    ids, eos = _one_bos(tokenizer, text), tokenizer.eos_token_id
    if eos is not None and ids[-1:] == [eos] and not _ends(tokenizer, text):
        ids.pop()
    return ids


def _one_bos(tokenizer: Any, text: str) -> list[int]:
    token, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if token and text.lstrip().startswith(token):
        text = text.lstrip()
    ids = list(tokenizer.encode(text))
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _ends(tokenizer: Any, text: str) -> bool:
    """Whether a text ends with the EOS token's text."""
    return text.endswith(getattr(tokenizer, "eos_token", None) or "\0")
