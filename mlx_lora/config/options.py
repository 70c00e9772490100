"""Shared by all configs: how options are declared, type checks, and errors that list every fault."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import field
from typing import Any

from ..errors import ConfigError

# Sections of ``--help``, in their order. ``help_section`` is the section of a config's fields without one.
COMMON, MORE = "Common options", "More adapter options"
SAMPLING, MEMORY = "Sampling", "Memory and speed"
SECTIONS = (
    *(COMMON, "Model and data", "Adapter", MORE, "Optimizer", "Run", "Preferences", "Server", "Limits", "Generation"),
    *(SAMPLING, MEMORY, "Output"),
)


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with a help text. ``extra``: ``choices`` and ``section``, for the command line."""
    metadata = {"help": help, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


common, more = functools.partial(option, section=COMMON), functools.partial(option, section=MORE)


_TYPES = {  # by the first word of a field's annotation: the types to accept, and what to call them
    "dict": (dict, "a mapping"),
    "tuple": ((list, tuple, set, frozenset, str), "a list"),
    "str": (str, "text"),
    "bool": (int, "true or false"),
    "float": ((int, float), "a number"),
}


def check_types(config: Any) -> None:
    """Raise a ``ConfigError`` that lists the fields whose values do not have the annotated type."""
    faults = []
    for known in dataclasses.fields(config):
        name, value = re.match(r"\w+", known.type)[0], getattr(config, known.name)
        if name not in _TYPES or (value is None and known.default is None):
            continue
        types, what = _TYPES[name]
        valid = isinstance(value, types) or (known.name == "layers_to_transform" and isinstance(value, int))
        if not valid or (name == "float" and isinstance(value, bool)):
            faults.append(f"{known.name} must be {what}, not {value!r}")
        elif known.type.startswith("dict[str") and not all(isinstance(key, str) for key in value):
            faults.append(f"{known.name} must have text keys, not {list(value)!r}")
    raise_all(faults, config)


def without_effect(config: Any, rules: tuple) -> list[str]:
    """A fault for each field that is set although, by ``rules``, it has no effect on ``config``.

    A rule is (names of fields, a function that says whether they act, the reason if they do not). A reason may name
    fields of the config in braces.
    """
    facts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return [
        f"{name} {reason.format(**facts)}"
        for names, acts, reason in rules
        if not acts(config)
        for name in names
        if is_set(config, name)
    ]


def is_set(config: Any, name: str) -> bool:
    """Whether the field ``name`` has a value other than its default; an explicit default counts as not set."""
    default = next(f.default for f in dataclasses.fields(config) if f.name == name)
    value = getattr(config, name)
    default = getattr(config, "defaults", dict)().get(name, default)
    return value not in (None, {}, default)


def as_config(kind: type, value: Any, name: str) -> Any:
    """``value`` as a ``kind`` of config: a mapping of its fields becomes one, and None the default.

    Raises: ConfigError: it is something else, or names fields that ``kind`` does not have.
    """
    if isinstance(value, kind):
        return value
    known = [field.name for field in dataclasses.fields(kind)]
    if value is not None and not isinstance(value, dict):
        raise ConfigError(
            f"{name} must be {kind.__name__} or a dict of its fields, not {type(value).__name__}",
            f"Write {name}={kind.__name__}(...).",
        )
    if unknown := [str(key) for key in value or {} if key not in known]:
        raise ConfigError(f"{name}: {kind.__name__} has no {', '.join(unknown)}", f"It has: {', '.join(known)}.")
    try:
        return kind(**(value or {}))
    except TypeError as error:
        raise ConfigError(
            str(error),
            "Correct the type of that value (in the YAML file, if it is there); --help shows what each takes.",
        ) from None


def raise_all(faults: list[str], config: Any) -> None:
    """Raise one ``ConfigError`` that lists ``faults``, or return if there are none.

    Each fault begins with the name of a field of ``config``; the hint explains these fields.
    """
    if faults:
        named = [re.match(r"\w+", fault)[0] for fault in faults]
        hints = [_hint(field) for field in dataclasses.fields(config) if field.name in named]
        raise ConfigError("\n".join(faults), "\n".join(hints))


def _hint(field: dataclasses.Field) -> str:
    default, help = field.default, field.metadata["help"]
    if default is None or default is False or default is dataclasses.MISSING:
        return f"{field.name}: {help} " + ("Leave it out for the default." if "default" in help else "Or leave it out.")
    return f"{field.name}: {help} Leave it out for the default ({default})."
