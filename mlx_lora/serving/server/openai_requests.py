"""Bodies of OpenAI's chat completions and completions, and the conversion of messages for chat templates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic_core import from_json

from ...errors import ConfigError
from . import shapes
from .body import Body, integer

TOP = 20  # OpenAI's maximum of top_logprobs
PROMPTS = 64  # maximum of prompts in one request
PROMPTS_OF_SEVERAL = 4  # the same with n > 1
_TEXTS = ("text", "input_text", "output_text", "refusal")  # types of content parts
_TopLogprobs = integer(0, TOP)
_Token = integer(0)

Model = Annotated[str, Field(min_length=1, max_length=500)]
# A limit, not a length: an answer may be shorter.
Tokens = integer(1, description="More than the server's --max-tokens-limit counts as that limit.")
StopWord = Annotated[str, Field(max_length=1000)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # passed to the chat template
ToolChoice = Annotated[str | dict[str, Any], WithJsonSchema(shapes.TOOL_CHOICE)]


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema, shown to the model
    strict: bool | None = None


class ChatTool(Body):
    """A tool of chat completions."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool in the form that chat templates expect."""
        return self.model_dump(exclude_none=True)


class StreamOptions(Body):
    """Extra information in a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: usage in every event
    include_obfuscation: bool | None = None  # accepted only: this server adds no padding


class Bookkeeping(Body):
    """Fields that clients send and that change no answer. The server accepts and ignores them.

    They belong to OpenAI's API, to Open WebUI, and to llama.cpp's slots and prompt caches.
    """

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None  # a draft of the answer that could speed it up
    chat_id: str | None = None
    id: str | None = None
    session_id: str | None = None
    message_id: str | None = None
    request_id: str | None = None
    background_tasks: dict[str, Any] | None = None  # Open WebUI's, as are the next fields
    features: dict[str, Any] | None = None
    cache_prompt: bool | None = None
    id_slot: integer(-1) | None = None
    priority: integer(-(2**31)) | None = None
    # The text of an answer never contains the special token that ended it.
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None


class AdapterScale(Body):
    """An entry of llama.cpp's ``lora`` list: an adapter by its id in /lora-adapters."""

    id: integer(0)
    scale: float


class Sampling(Bookkeeping):
    """Fields of both chat completions and completions."""

    model: Model | None = None  # the base by default
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: integer(-1) | None = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    xtc_probability: Annotated[float | None, Field(ge=0, le=1)] = None
    xtc_threshold: Annotated[float | None, Field(ge=0, le=0.5)] = None
    presence_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-100, le=100)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]*)$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=1024),
    ] = None
    seed: integer(0, 2**53) | None = None
    min_tokens_to_keep: integer(1) | None = None
    repetition_context_size: integer(1) | None = None
    presence_context_size: integer(1) | None = None
    frequency_context_size: integer(1) | None = None
    min_tokens: integer(0) | None = None  # the answer cannot end before this many tokens
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Token] | None, Field(max_length=64)] = None
    lora: Annotated[list[AdapterScale] | None, Field(max_length=64)] = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=64)] | None = None
    n: integer(1, 16) | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self) -> dict[str, Any]:
        """The sampling options as fields of ``GenerateConfig``."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return {
            "temp": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "xtc_probability": self.xtc_probability,
            "xtc_threshold": self.xtc_threshold if self.xtc_probability else None,
            "presence_penalty": self.presence_penalty or None,
            "frequency_penalty": self.frequency_penalty or None,
            "repetition_penalty": self.repetition_penalty,
            # Clients send these even without a penalty; they then have no effect.
            **{
                f"{name}_context_size": getattr(self, f"{name}_context_size")
                for name in ("repetition", "presence", "frequency")
                if getattr(self, f"{name}_penalty")
            },
            "min_tokens_to_keep": self.min_tokens_to_keep if self.min_p else None,
            "extra_eos_token": tuple(map(str, self.stop_token_ids or ())) or None,
            "logit_bias": self.logit_bias or None,
            "seed": self.seed,
            "stop": tuple(text for text in stop or () if text) or None,
        }

    @property
    def usage_in_stream(self) -> str | None:
        """Where a stream contains the usage: at its "end", in "all" events, or None for nowhere."""
        wanted = self.stream_options
        return ("all" if wanted.continuous_usage_stats else "end") if wanted and wanted.include_usage else None


class ChatCompletion(Sampling):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra=shapes.TOP_LOGPROBS_NEED_LOGPROBS)

    messages: Annotated[
        list[Annotated[dict[str, Any], WithJsonSchema(shapes.MESSAGE)]], Field(min_length=1, max_length=10_000)
    ]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: _TopLogprobs | None = None
    tools: Annotated[list[ChatTool] | None, Field(max_length=256)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    verbosity: Literal["medium"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Annotated[list[Literal["text"]] | None, Field(max_length=1)] = None
    response_format: Annotated[dict[str, Any] | None, WithJsonSchema(shapes.nullable(shapes.RESPONSE_FORMAT))] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, WithJsonSchema(shapes.nullable(shapes.TEMPLATE_VARIABLES))
    ] = None

    @property
    def most_tokens(self) -> int | None:
        """The smaller of max_tokens and max_completion_tokens; None if neither is given."""
        return min((limit for limit in (self.max_tokens, self.max_completion_tokens) if limit), default=None)

    def conversation(self) -> tuple[list[dict[str, Any]], str | None]:
        """Return the messages, and the beginning of the answer if it continues the last one. Raises: ConfigError."""
        messages = [read_message(message) for message in self.messages]
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                raise ConfigError(
                    "add_generation_prompt: false needs continue_final_message: true",
                    "Set it, and end the messages with the assistant message to continue.",
                )
            return messages, None
        last = messages.pop()
        if self.add_generation_prompt or last["role"] != "assistant" or not last.get("content") or not messages:
            raise ConfigError(
                "continue_final_message: the last of several messages must be an assistant message with text",
                "Send add_generation_prompt: false and such a message, or leave continue_final_message out.",
            )
        return messages, last["content"]


class Completion(Sampling):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra=shapes.few_prompts_of_several(PROMPTS_OF_SEVERAL))

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=PROMPTS)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=PROMPTS)]
    )
    max_tokens: Tokens | None = None
    logprobs: _TopLogprobs | None = None
    echo: bool | None = None
    best_of: integer(1, 16) | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts. Raises: ConfigError: too many prompts for n > 1."""
        if self.best_of not in (None, self.n or 1):
            raise ConfigError("best_of: must equal n", "Leave best_of out.")
        prompts = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        if (self.n or 1) > 1 and len(prompts) > PROMPTS_OF_SEVERAL:
            raise ConfigError(
                f"n: above 1 a request may have at most {PROMPTS_OF_SEVERAL} prompts, not {len(prompts)}",
                "Send fewer prompts in one request.",
            )
        return prompts


def template_variables(effort: str | None, given: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return chat template variables for a reasoning effort; ``given`` takes precedence. None if there are none."""
    known = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        known["enable_thinking"] = False
    return {**known, **(given or {})} or None


def read_message(message: dict[str, Any]) -> dict[str, Any]:
    """Convert a message for chat templates. Raises: ConfigError: it has no role, or its content is not text."""
    role, content = message.get("role"), message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")
    if role not in ("system", "developer", "user", "assistant", "tool", "function"):
        raise ConfigError(f"messages: {role!r} is not a known role", "Use system, user, assistant or tool.")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in _TEXTS]
        texts = [part.get("text") for part in parts]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            kinds = {str(part.get("type") if isinstance(part, dict) else part)[:50] for part in content} - {*_TEXTS}
            raise ConfigError(
                f"messages: only text content is supported, not {', '.join(sorted(kinds)) or 'a part without text'}",
                'Send parts of {"type": "text", "text": ...}.',
            )
        content = "".join(texts)
    elif content is not None and not isinstance(content, str):
        raise ConfigError(f"messages: content must be text, not {type(content).__name__}", "Send a string.")
    if content is None and not message.get("tool_calls"):
        raise ConfigError(f"messages: the {role} message has no content", "Send its text in content.")
    shown = {key: value for key, value in message.items() if value is not None}
    shown |= {"role": "system" if role == "developer" else role}
    if content is not None:
        shown["content"] = content
    if (calls := message.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise ConfigError("messages: tool_calls must be a list", "Send back the model's tool calls unchanged.")
        shown["tool_calls"] = [_read_call(call) for call in calls]
        if not calls:
            del shown["tool_calls"]
    return shown


def _read_call(call: Any) -> dict[str, Any]:
    """Convert a tool call: templates expect its arguments as an object. Raises: ConfigError."""
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = _read_arguments(function["arguments"])
        elif not isinstance(function["arguments"], dict):
            raise TypeError
        if not isinstance(function["name"], str):
            raise TypeError
        return {**call, "type": "function", "function": function}
    except (TypeError, KeyError, ValueError):
        raise ConfigError(
            "messages: a tool call has no function with a name and arguments",
            "Send back the tool calls that the model generated.",
        ) from None


def _read_arguments(text: str) -> Any:
    """Parse ``text`` as a JSON object. If it is not one, return the text unchanged."""
    try:
        read = from_json(text or "{}")
    except ValueError:
        return text
    return read if isinstance(read, dict) else text
