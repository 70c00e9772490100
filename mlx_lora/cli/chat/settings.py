"""``/set``: from a line to fields of ``GenerateConfig``, converted as the command line's own options are."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import click

from ...config import GenerateConfig
from ...errors import ConfigError
from .. import console
from ..options import config_options

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}


def option_params() -> dict[str, click.Parameter]:
    """The command line's options for ``GenerateConfig``, by name."""
    return {param.name: param for param in config_options(GenerateConfig)(click.Command("set")).params}


def listing(config: GenerateConfig) -> str:
    """A table of all options."""
    rows = [(name, shown(getattr(config, name)), shown(default)) for name, default in _DEFAULTS.items()]
    return console.table(rows, ("option", "value", "default"))


def pairs(text: str) -> list[tuple[str, str | None]]:
    """The names and values after ``/set``; a single name has the value None. JSON and quoted values stay whole.

    Raises: ConfigError: a value is missing, or a quote.
    """
    name, _, value = text.replace("=", " ", 1).partition(" ") if "=" in text.split()[0] else text.partition(" ")
    if not value.strip() or value.lstrip().startswith(("{", "[")):
        return [(_field(name), value.strip() or None)]
    try:
        words = [name, *shlex.split(value)]
    except ValueError as error:
        raise ConfigError(f"{text}: {str(error).lower()}", "Put a value with blanks between double quotes.") from None
    if len(words) % 2:
        raise ConfigError(
            f"{words[-1]}: has no value", 'Write /set NAME VALUE NAME VALUE; a value with blanks as "two words".'
        )
    return [(_field(name), value) for name, value in zip(words[::2], words[1::2], strict=True)]


def _field(name: str) -> str:
    """A field's name, also of its flag."""
    return name.lstrip("-").replace("-", "_")


def converted(param: click.Parameter, value: str) -> Any:
    """A value as the command line would take it. Raises: ConfigError."""
    default = _DEFAULTS[param.name]
    if value == "default" or (value == "none" and default in (None, ())):
        return default
    if param.multiple:
        return tuple(json.loads(value)) if _is_list(value) else (value,)
    try:
        return param.type.convert(value, param, None)
    except click.BadParameter as error:
        raise ConfigError(f"{param.name}: {error.message}", f"{param.name}: {param.help} Or write default.") from None


def _is_list(value: str) -> bool:
    try:
        return isinstance(json.loads(value), list)
    except ValueError:
        return False


def shown(value: Any) -> str:
    """A value as ``/set`` takes it."""
    return "none" if value is None or value == () else json.dumps(value, ensure_ascii=False)
