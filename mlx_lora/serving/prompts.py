"""Convert messages to the tokens of a prompt with the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..config import GenerateConfig
from ..data.template import Template, encode_prompt, said_by
from ..errors import ConfigError


class Prompts:
    """Creates prompts for one tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.template = tokenizer, Template(tokenizer)

    def prompt(
        self, messages: Sequence[dict], tools: list | None = None, config: GenerateConfig | None = None
    ) -> list[int]:
        """Return the tokens of a conversation, up to the assistant's next answer.

        Args:
            config: supplies ``chat_template_config`` and ``prefill_response``.

        Raises: ConfigError: the model has no chat template, or the template refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "this model's tokenizer has no chat template", "Use generate --ignore-chat-template with plain text."
            )
        config = config or GenerateConfig()
        if tools and not self.shows_tools:
            raise ConfigError("the chat template of this model does not support tools", "Leave tools out.")
        try:
            return self.template.prompt(messages, tools, config.chat_template_config, config.prefill_response)
        except Exception as error:  # jinja's errors, among others
            raise ConfigError(
                f"the chat template refuses these messages: {said_by(error)}",
                "Change the messages as the template says, or use generate --ignore-chat-template with plain text.",
            ) from None

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        asked = [{"role": "user", "content": "Hi"}]
        tool = {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}}
        try:
            return self.template.prompt(asked) != self.template.prompt(asked, [{"type": "function", "function": tool}])
        except Exception:  # of any type; the request itself reports the error
            return True

    def state_after(self, tokens: list[int]) -> str:
        """Return the kind of the text after a prompt: "reasoning" if the template has opened it, else "normal"."""
        tokenizer = self.tokenizer
        state = "normal"
        if getattr(tokenizer, "has_thinking", False):
            opened, closed = tokenizer.rfind_think_start(tokens), tokenizer.rfind_think_end(tokens)
            state = "reasoning" if opened > closed else "normal"
        return getattr(tokenizer, "response_initial_state", None) or state

    def plain_prompt(self, text: str) -> list[int]:
        """The tokens of a text to continue, without a chat template."""
        return encode_prompt(self.tokenizer, text)
