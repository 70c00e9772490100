"""JSON schemas of requests and answers for the OpenAPI description, where Python types do not give them."""

from __future__ import annotations

from typing import Any

from ...config.generate import TEMPLATE_ARGUMENTS

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def listed(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def closed(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these fields and no others."""
    fields = {**required, **(optional or {})}
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def opened(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these fields and any others; the chat template may use them."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def _parts(*kinds: str) -> Schema:
    return listed(opened({"type": one_of(*kinds), "text": TEXT}))


# Requests.

_PARTS = _parts("text", "input_text", "output_text", "refusal")
_ARGUMENTS = {"anyOf": [{"type": "object"}, {"type": "string", "contentMediaType": "application/json"}]}
_CALL = opened({"function": opened({"name": TEXT, "arguments": _ARGUMENTS})})
_CONTENT = {"anyOf": [TEXT, _PARTS]}
MESSAGE: Schema = {
    **opened(
        {"role": one_of("system", "developer", "user", "assistant", "tool", "function")},
        {"content": nullable(_CONTENT), "tool_calls": nullable(listed(_CALL)), "refusal": nullable(TEXT)},
    ),
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
    ],
}
_SCHEMA = {"type": "object"}
_PLAIN_FORMAT = opened({"type": one_of("text", "json_object")}, {"schema": _SCHEMA})
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        _PLAIN_FORMAT,
        opened({"type": one_of("json_schema"), "json_schema": opened({"schema": _SCHEMA})}),
    ]
}
TEXT_FORMAT: Schema = {"anyOf": [_PLAIN_FORMAT, opened({"type": one_of("json_schema"), "schema": _SCHEMA})]}
TEXT_OPTIONS: Schema = closed({}, {"format": nullable(TEXT_FORMAT), "verbosity": one_of("medium")})
_NAMED = {"anyOf": [opened({"name": TEXT}), opened({"function": opened({"name": TEXT})})]}
_ALLOWED = opened({"mode": one_of("auto", "required"), "tools": listed(_NAMED, minItems=1)})
TOOL_CHOICE: Schema = {
    "anyOf": [
        one_of("none", "auto", "required"),
        {**_NAMED, **opened({"type": one_of("function")})},
        opened({"type": one_of("allowed_tools"), "allowed_tools": _ALLOWED}),
    ]
}
TEMPLATE_VARIABLES: Schema = {
    "type": "object",
    "propertyNames": {"not": {"enum": sorted(TEMPLATE_ARGUMENTS)}},
}
TOP_LOGPROBS_NEED_LOGPROBS: Schema = {
    "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}


def few_prompts_of_several(most: int) -> Schema:
    """Allow at most ``most`` prompts if ``n`` is above 1."""
    several = {"properties": {"n": {"type": "integer", "minimum": 2}}, "required": ["n"]}
    one = {"anyOf": [TEXT, listed({"type": "integer"}), {"type": "array", "maxItems": most}]}
    return {"if": several, "then": {"properties": {"prompt": one}}}


INPUT_ITEM: Schema = {
    "anyOf": [
        opened(
            {"role": one_of("system", "developer", "user", "assistant", "tool", "function"), "content": _CONTENT},
            {"type": one_of("message")},
        ),
        opened({"type": one_of("function_call"), "name": TEXT, "arguments": _ARGUMENTS}),
        opened({"type": one_of("function_call_output"), "output": _CONTENT}),
        opened(
            {"type": one_of("reasoning")},
            {name: nullable(listed({"type": "object"})) for name in ("content", "summary")},
        ),
    ]
}
TEXT_BLOCKS: Schema = _parts("text")
TEXT_OR_BLOCKS = (TEXT, TEXT_BLOCKS)
_BLOCK_OF_USER = {
    "anyOf": [
        opened({"type": one_of("text"), "text": TEXT}),
        opened({"type": one_of("tool_result")}, {"content": {"anyOf": [TEXT, TEXT_BLOCKS, {"type": "null"}]}}),
        opened({"type": one_of("redacted_thinking")}),
    ]
}
_BLOCK_OF_ASSISTANT = {
    "anyOf": [
        opened({"type": one_of("text"), "text": TEXT}),
        opened({"type": one_of("tool_use"), "name": TEXT, "input": {"type": "object"}}),
        opened({"type": one_of("thinking")}, {"thinking": TEXT}),
        opened({"type": one_of("redacted_thinking")}),
    ]
}
ANTHROPIC_MESSAGE: Schema = {
    "anyOf": [
        opened({"role": one_of("user"), "content": {"anyOf": [TEXT, listed(_BLOCK_OF_USER)]}}),
        opened({"role": one_of("assistant"), "content": {"anyOf": [TEXT, listed(_BLOCK_OF_ASSISTANT)]}}),
    ]
}

# Answers.

_ID = TEXT
_BOOL: Schema = {"type": "boolean"}
_FREE: Schema = {"type": "object"}
_NUMBER: Schema = {"type": "number"}
_REASON = one_of("stop", "length", "tool_calls")
_MODEL = {"id": TEXT, "object": one_of("model"), "created": COUNT, "owned_by": TEXT}
MODEL: Schema = closed(_MODEL, {"parent": TEXT})
MODELS: Schema = closed({"object": one_of("list"), "data": listed(MODEL, minItems=1)})
_USAGE = closed(
    {
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT),
        "prompt_tokens_details": closed({"cached_tokens": COUNT}),
    },
    {"completion_tokens_details": closed({"reasoning_tokens": COUNT})},
)
_ABOUT = {"id": _ID, "created": COUNT, "model": TEXT}
_TOKEN = {"token": TEXT, "logprob": _NUMBER, "bytes": listed(COUNT)}
_LOGPROBS = closed({"content": listed(closed({**_TOKEN, "top_logprobs": listed(closed(_TOKEN))}))})
_TOOL_CALL = closed({"id": _ID, "type": one_of("function"), "function": closed({"name": TEXT, "arguments": TEXT})})
_ANSWER = closed(
    {"role": one_of("assistant"), "content": nullable(TEXT)},
    {"reasoning_content": TEXT, "tool_calls": listed(_TOOL_CALL, minItems=1)},
)
CHAT: Schema = closed(
    {
        **_ABOUT,
        "object": one_of("chat.completion"),
        "choices": listed(
            closed({"index": COUNT, "message": _ANSWER, "finish_reason": _REASON, "logprobs": nullable(_LOGPROBS)}),
            minItems=1,
        ),
        "usage": _USAGE,
    }
)
_TEXT_LOGPROBS = closed(
    {
        "tokens": listed(TEXT),
        "token_logprobs": listed(_NUMBER),
        "top_logprobs": listed({"type": "object", "additionalProperties": _NUMBER}),
        "text_offset": listed(COUNT),
    }
)
COMPLETION: Schema = closed(
    {
        **_ABOUT,
        "object": one_of("text_completion"),
        "choices": listed(
            closed({"index": COUNT, "text": TEXT, "finish_reason": _REASON, "logprobs": nullable(_TEXT_LOGPROBS)}),
            minItems=1,
        ),
        "usage": _USAGE,
    }
)
_STATUS = one_of("completed", "incomplete")
_ITEM = {"id": _ID, "status": TEXT}
_OUTPUT = {
    "anyOf": [
        closed({"type": one_of("message"), **_ITEM, "role": one_of("assistant"), "content": listed(_FREE)}),
        closed({"type": one_of("reasoning"), **_ITEM, "summary": listed(_FREE), "content": listed(_FREE)}),
        closed({"type": one_of("function_call"), **_ITEM, "call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    ]
}
RESPONSE: Schema = closed(
    {
        "id": _ID,
        "object": one_of("response"),
        "created_at": COUNT,
        "model": TEXT,
        "instructions": nullable(TEXT),
        "metadata": _FREE,
        "parallel_tool_calls": _BOOL,
        "temperature": _NUMBER,
        "top_p": _NUMBER,
        "tool_choice": {"anyOf": [TEXT, _FREE]},
        "tools": listed(_FREE),
        "error": {"type": "null"},
        "status": _STATUS,
        "incomplete_details": nullable(closed({"reason": TEXT})),
        "usage": closed(
            {
                **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), COUNT),
                "input_tokens_details": closed({"cached_tokens": COUNT}),
                "output_tokens_details": closed({"reasoning_tokens": COUNT}),
            }
        ),
        "output": listed(_OUTPUT, minItems=1),
    }
)
MESSAGES: Schema = closed(
    {
        "id": _ID,
        "type": one_of("message"),
        "role": one_of("assistant"),
        "model": TEXT,
        "content": listed(
            {
                "anyOf": [
                    closed({"type": one_of("text"), "text": TEXT}),
                    closed({"type": one_of("thinking"), "thinking": TEXT, "signature": TEXT}),
                    closed({"type": one_of("tool_use"), "id": _ID, "name": TEXT, "input": _FREE}),
                ]
            },
            minItems=1,
        ),
        "stop_reason": one_of("end_turn", "max_tokens", "tool_use", "stop_sequence"),
        "stop_sequence": nullable(TEXT),
        "usage": closed(dict.fromkeys(("input_tokens", "cache_read_input_tokens", "output_tokens"), COUNT)),
    }
)
TOKEN_COUNT: Schema = closed({"input_tokens": COUNT})
DONE: Schema = closed({"status": TEXT})
ADAPTERS: Schema = listed(
    closed(
        {
            "id": COUNT,
            "name": TEXT,
            "path": {"type": "null"},
            "scale": _NUMBER,
            "loaded": _BOOL,
            "pinned": _BOOL,
            "method": nullable(TEXT),
            "rank": nullable(COUNT),
            "nbytes": COUNT,
            "alone": listed(TEXT),
            "rows": COUNT,
        }
    )
)
SERVER_SENT: Schema = closed({"data": TEXT}, {"event": TEXT})  # an event; its data is JSON, or [DONE]
HEALTH: Schema = closed({"status": TEXT, "active": COUNT, "queued": COUNT})
_ERROR = {"message": TEXT, "type": TEXT}
ERROR: Schema = closed({"error": closed({**_ERROR, "param": nullable(TEXT), "code": nullable(TEXT)})})
ANTHROPIC_ERROR: Schema = closed({"type": one_of("error"), "error": closed(_ERROR, {"details": _FREE})})
