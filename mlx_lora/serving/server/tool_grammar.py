"""Grammars of tool calls in llguidance's Lark syntax: one for each call format that mlx-lm's parsers read.

For a parser without an entry in ``_WRITERS`` there is no grammar, so a tool call cannot be forced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError

# Write blanks as chat templates do, so that the output looks like the training data.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NOT_TEXT = ("integer", "number", "boolean", "array", "object", "null")  # types that every format writes as JSON
_DEFINITIONS = ("$defs", "definitions")  # definitions that parts of a schema may refer to

Schema = dict[str, Any]


@dataclass
class Rules:
    """Collects the rules of one grammar."""

    tokenizer: Any
    written: list[str] = field(default_factory=list)

    def add(self, body: str, options: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self.written)}"
        self.written.append(f"{name}{options}: {body}")
        return name

    def literal(self, text: str) -> str:
        """Match exactly ``text``. Added tokens of the tokenizer in it are matched as tokens, not as text."""
        return " ".join(self._parts(text)) or '""'

    def json(self, schema: Schema, root: Schema | None = None) -> str:
        """Match JSON that is valid for ``schema``, a part of ``root``."""
        known = {name: root[name] for name in _DEFINITIONS if root and name in root}
        return self.add(f"%json {json.dumps({**known, **schema, 'x-guidance': _LAYOUT})}")

    def text_until(self, end: str) -> str:
        """Match any text up to and including the first ``end``."""
        first, *rest = self._parts(end)
        if first.startswith("<"):  # an added token, which the text before it cannot contain
            return self.add(f"/(?s:.*)/ {' '.join([first, *rest])}")
        return " ".join([self.add("/(?s:.*)/", f"[suffix={first}]"), *rest])

    def _parts(self, text: str) -> list[str]:
        added = {token: number for token, number in self.tokenizer.get_added_vocab().items() if token in text}
        pattern = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        parts = re.split(f"({pattern})", text) if added else [text]
        return [
            f"<[{added[part]}]>" if part in added else json.dumps(part, ensure_ascii=False) for part in parts if part
        ]


Function = dict[str, Any]  # name and parameters
Writer = Callable[[Rules, Function], str]


def _parameters(function: Function) -> Schema:
    """Return the arguments' JSON schema without additional properties. Raises: ConfigError: it is not a schema."""
    given = function.get("parameters") or {}
    if not isinstance(given.get("properties") or {}, dict) or not isinstance(given.get("required") or [], list):
        raise ConfigError(
            f"tool_choice: the parameters of {function['name']!r} are not a JSON schema",
            'Send {"type": "object", "properties": {...}, "required": [...]}.',
        )
    return {"type": "object", **({"additionalProperties": False} if "properties" in given else {}), **given}


def _referred(schema: Any, root: Schema) -> Schema:
    """Return ``schema``, or the definition in ``root`` that it refers to."""
    place = schema.get("$ref") if isinstance(schema, dict) else None
    _, group, name = (str(place).split("/") + [""] * 2)[:3]
    found = (root.get(group) or {}).get(name) if group in _DEFINITIONS else schema
    return found if isinstance(found, dict) else {}


def _as_object(rules: Rules, function: Function) -> str:
    """{"name": ..., "arguments": {...}}"""
    schema = _parameters(function)
    known = {name: schema[name] for name in _DEFINITIONS if name in schema}
    properties = {"name": {"const": function["name"]}, "arguments": schema}
    whole = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
    return rules.json({**whole, "additionalProperties": False, **known})


def _after_header(rules: Rules, function: Function) -> str:
    """name[ARGS]{...}"""
    return f"{rules.literal(function['name'] + '[ARGS]')} {rules.json(_parameters(function))}"


def _numbered(rules: Rules, function: Function) -> str:
    """Kimi's calls, which are numbered: functions.name:0"""
    opened = rules.literal(f"<|tool_call_begin|>functions.{function['name']}:")
    arguments = f"{rules.literal('<|tool_call_argument_begin|>')} {rules.json(_parameters(function))}"
    return f"{opened} /[0-9]{{1,2}}/ {arguments} {rules.literal('<|tool_call_end|>')}"


def _by_parameter(opened: str, before: str, after: str, closed: str) -> Writer:
    """Write each argument between ``before`` and ``after``, where {key} is its name. Strings have no quotes."""

    def write(rules: Rules, function: Function) -> str:
        root = _parameters(function)
        required, parts = root.get("required") or (), [rules.literal(opened.replace("{name}", function["name"]))]
        for key, schema in (root.get("properties") or {}).items():
            schema = _referred(schema, root)
            begin, values = rules.literal(before.replace("{key}", key)), schema.get("enum")
            if schema.get("type") in _NOT_TEXT:
                value = f"{rules.json(schema, root)} {rules.literal(after)}"
            elif isinstance(values, list) and values and all(isinstance(each, str) for each in values):
                value = f"({' | '.join(map(rules.literal, values))}) {rules.literal(after)}"
            else:
                value = rules.text_until(after)
            parts.append(f"({begin} {value})" if key in required else f"({begin} {value})?")
        return " ".join([*parts, rules.literal(closed)])

    return write


def _in_python(rules: Rules, function: Function) -> str:
    """Write name(key=value, ...) as in Python, with values as JSON."""
    root = _parameters(function)
    required = root.get("required") or ()
    first, rest = '""', '""'  # rules for the remaining arguments: as the first one, and after another one
    for key, schema in reversed((root.get("properties") or {}).items()):
        value = rules.json(schema if isinstance(schema, dict) else {}, root)
        argument = f"{rules.literal(f'{key}=')} {value} {rest}"
        skipped = ("", "") if key in required else (f" | {first}", f" | {rest}")
        first, rest = rules.add(f"{argument}{skipped[0]}"), rules.add(f'", " {argument}{skipped[1]}')
    return f"{rules.literal(function['name'] + '(')} {first} {rules.literal(')')}"


@dataclass(frozen=True)
class Form:
    """A call format. The markers of mlx-lm's parser enclose each call, or all calls together."""

    write: Writer
    begin: str = ""  # text before the calls inside a pair of markers
    between: str | None = None  # separator of calls inside one pair of markers; None: each call has its own pair
    end: str = ""


# Keys are modules of mlx_lm.tool_parsers.
_GLM = Form(_by_parameter("{name}\n", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n", ""))
_FORMS = {
    "json_tools": Form(_as_object, "\n", None, "\n"),
    "mistral": Form(_as_object, "[", ", ", "]"),
    "pythonic": Form(_in_python, "[", ", ", "]"),
    "kimi_k2": Form(_numbered, between=""),
    "qwen3_coder": Form(
        _by_parameter("\n<function={name}>\n", "<parameter={key}>\n", "\n</parameter>\n", "</function>\n")
    ),
    "minimax_m2": Form(
        _by_parameter('\n<invoke name="{name}">\n', '<parameter name="{key}">', "</parameter>\n", "</invoke>\n")
    ),
    "minicpm5": Form(_by_parameter('"{name}">', '<param name="{key}">', "</param>", "")),
    "glm47": _GLM,
    "laguna": _GLM,
}
_MISTRAL_HEADERS = Form(_after_header)  # for Mistral's newer templates


def calls_grammar(tokenizer: Any, tools: Sequence[dict], one: bool, schema: Schema | None = None) -> str:
    """Return a grammar for calls of ``tools``: exactly one call, or one or more.

    Args:
        tools: in the form that chat templates expect.
        schema: JSON schema of an answer that the model may give instead of a call.

    Raises: ConfigError: there is no grammar for the call format of this model.
    """
    kind = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
    form = _FORMS.get(kind)
    if form is None:
        what = "a tool call cannot be forced" if schema is None else "response_format cannot be combined with tools"
        raise ConfigError(
            f"tool_choice: {what} with this model, whose format of calls ({kind or 'unknown'}) has no grammar here",
            'Use tool_choice "auto".' if schema is None else 'Use tool_choice "none", or leave response_format out.',
        )
    if kind == "mistral" and "[ARGS]" in str(tokenizer.chat_template):
        form = _MISTRAL_HEADERS
    rules = Rules(tokenizer)
    call = rules.add(" | ".join(form.write(rules, tool["function"]) for tool in tools))
    between = None if form.between is None else rules.literal(form.between)
    inside = call if one or between is None else rules.add(f"{call} ({between} {call})*")
    marked = [tokenizer.tool_call_start + form.begin, form.end + (tokenizer.tool_call_end or "")]
    section = rules.add(f"{rules.literal(marked[0])} {inside} {rules.literal(marked[1])}")
    start = section if one or between is not None else f'{section} ("\\n"? {section})*'
    answer = "" if schema is None else f" | {rules.json(schema)}"
    return "\n".join([f"start: BLANKS? ({start}){answer}", "BLANKS: /\\n{1,2}/", *rules.written])
