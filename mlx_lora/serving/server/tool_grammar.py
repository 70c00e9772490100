"""Grammars of tool calls, in llguidance's Lark syntax: one for each way of writing a call that mlx-lm's parsers read.

A parser without an entry in ``_WRITERS`` reads calls that no grammar here describes; a call cannot be forced then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError

# Blanks as chat templates write them, so that the model stays with what it was trained on.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NOT_TEXT = ("integer", "number", "boolean", "array", "object", "null")  # types that are written as JSON
_DEFINITIONS = ("$defs", "definitions")  # what a part of a schema may refer to

Schema = dict[str, Any]


@dataclass
class Rules:
    """The rules of one grammar as they are written."""

    tokenizer: Any
    written: list[str] = field(default_factory=list)

    def add(self, body: str, options: str = "") -> str:
        """The name of a new rule."""
        name = f"r{len(self.written)}"
        self.written.append(f"{name}{options}: {body}")
        return name

    def literal(self, text: str) -> str:
        """``text`` itself. The tokenizer's added tokens in it are tokens, which no text matches."""
        return " ".join(self._parts(text)) or '""'

    def json(self, schema: Schema, root: Schema | None = None) -> str:
        """JSON of ``schema``, a part of ``root``."""
        known = {name: root[name] for name in _DEFINITIONS if root and name in root}
        return self.add(f"%json {json.dumps({**known, **schema, 'x-guidance': _LAYOUT})}")

    def text_until(self, end: str) -> str:
        """Any text, and the first ``end`` after it."""
        first, *rest = self._parts(end)
        if first.startswith("<"):  # a token, with which the text ends by itself
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
    """The JSON schema of the arguments: those that are named and no others. Raises: ConfigError: it is none."""
    given = function.get("parameters") or {}
    if not isinstance(given.get("properties") or {}, dict) or not isinstance(given.get("required") or [], list):
        raise ConfigError(
            f"tool_choice: the parameters of {function['name']!r} are no JSON schema",
            'Send {"type": "object", "properties": {...}, "required": [...]}.',
        )
    return {"type": "object", **({"additionalProperties": False} if "properties" in given else {}), **given}


def _referred(schema: Any, root: Schema) -> Schema:
    """``schema``, or the definition in ``root`` that it refers to."""
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
    """Kimi's calls, which have a number: functions.name:0"""
    opened = rules.literal(f"<|tool_call_begin|>functions.{function['name']}:")
    arguments = f"{rules.literal('<|tool_call_argument_begin|>')} {rules.json(_parameters(function))}"
    return f"{opened} /[0-9]{{1,2}}/ {arguments} {rules.literal('<|tool_call_end|>')}"


def _by_parameter(opened: str, before: str, after: str, closed: str) -> Writer:
    """Each argument between texts of its own, with {key} for its name. Strings are written without quotes."""

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
    """name(key=value, ...), as Python has it, with values as JSON."""
    root = _parameters(function)
    required = root.get("required") or ()
    first, rest = '""', '""'  # what may stand from here on: with nothing before it, and after an argument
    for key, schema in reversed((root.get("properties") or {}).items()):
        value = rules.json(schema if isinstance(schema, dict) else {}, root)
        argument = f"{rules.literal(f'{key}=')} {value} {rest}"
        skipped = ("", "") if key in required else (f" | {first}", f" | {rest}")
        first, rest = rules.add(f"{argument}{skipped[0]}"), rules.add(f'", " {argument}{skipped[1]}')
    return f"{rules.literal(function['name'] + '(')} {first} {rules.literal(')')}"


@dataclass(frozen=True)
class Form:
    """How calls are written. The markers of mlx-lm's parser are around each call, or around all of them."""

    write: Writer
    begin: str = ""  # around all calls between a pair of markers
    between: str | None = None  # calls between one pair of markers; None: each has a pair of its own
    end: str = ""


# By module of mlx_lm.tool_parsers.
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
_MISTRAL_HEADERS = Form(_after_header)  # of its newer templates


def calls_grammar(tokenizer: Any, tools: Sequence[dict], one: bool, schema: Schema | None = None) -> str:
    """A grammar of calls of ``tools``: of one, or of one and more.

    Args:
        tools: as chat templates take them.
        schema: of the answer that the model may give instead.

    Raises: ConfigError: mlx-lm's parser for this model has no grammar here.
    """
    kind = getattr(tokenizer.tool_parser, "__module__", "").rpartition(".")[2]
    form = _FORMS.get(kind)
    if form is None:
        what = "a tool call cannot be forced" if schema is None else "response_format cannot be used beside tools"
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
