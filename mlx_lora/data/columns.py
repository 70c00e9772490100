"""Make a prompt and a completion from the columns of a data set, with templates in the ``hf_dataset`` section.

    prompt: "Is this sentence acceptable?\\n{sentence}\\nAnswer:"
    completion: "{label}"
    labels: {label: {0: unacceptable, 1: acceptable}}

A template contains column names in braces, as in ``str.format``, but without attributes, indices or formats. ``{{`` and
``}}`` stand for a brace. ``labels`` names the values of a column; in a list, of 0, 1 and so on.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from .faults import Fault, Place
from .files import Row
from .messages import type_name

KEYS = ("prompt", "completion", "labels")
_TEMPLATES = KEYS[:2]


def check_templates(section: dict[str, Any]) -> list[str]:
    """What is wrong with a section's templates and labels themselves, independent of the data."""
    given = [key for key in KEYS if key in section]
    if not given:
        return []
    faults = [f"has {given[0]}, so it needs {key} too" for key in _TEMPLATES if key not in section]
    features = [key for key in section if str(key).endswith("_feature")]
    faults += [f"has {key} beside {given[0]}, but the two contradict each other" for key in features]
    for key in _TEMPLATES:
        if key in section:
            faults += [f"{key}: {fault}" for fault in _template_faults(section[key])]
    labels = section.get("labels", {})
    if not isinstance(labels, dict):
        return [*faults, f"labels must be a mapping from columns to the names of their values, not {labels!r}"]
    used = {name for key in _TEMPLATES for name in _columns(section.get(key))}
    faults += [f"labels: neither template uses the column {name!r}" for name in labels if name not in used]
    for name, names in labels.items():
        texts = names.values() if isinstance(names, dict) else names if isinstance(names, list) else [names]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            faults.append(f"labels: {name} must map values to texts in quotes, not to {wrong[0]!r}")
        elif not isinstance(names, (dict, list)):
            faults.append(f"labels: {name} must be a mapping or a list, not {names!r}")
    return faults


def _template_faults(template: Any) -> list[str]:
    if not isinstance(template, str):
        return [f"must be text with columns in braces, not {template!r}"]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{error} in {template!r}; write {{{{ and }}}} for braces"]
    fields = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    if not fields:
        return [f"names no column in braces: {template!r}"]
    return [
        f"{{{name}}} is not the plain name of a column"
        for name, form, conversion in fields
        if not name or form or conversion or set(name) & set(".[]")
    ]


def _columns(template: Any) -> list[str]:
    if not isinstance(template, str) or _template_faults(template):
        return []
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def filled(rows: Iterable[Row], section: dict[str, Any], faults: list[Fault]) -> list[Row]:
    """Rows with the ``prompt`` and ``completion`` of ``section``'s templates; without templates, the rows unchanged.

    A null in a prompt counts as empty text. Args: faults: receives missing columns, and values that no label names,
    such as the -1 of a hidden test set.
    """
    rows = list(rows)
    if not any(key in section for key in KEYS):
        return rows
    labels = {name: _by_text(names) for name, names in section.get("labels", {}).items()}
    columns = {key: dict.fromkeys(_columns(section[key])) for key in _TEMPLATES}
    known = {name for _, value in rows[:1] for name in value}
    missing = [f"{{{name}}} of {key}" for key in _TEMPLATES for name in columns[key] if name not in known]
    if rows and missing:
        have = ", ".join(sorted(map(str, known)))
        faults.append(
            Fault(
                Place(rows[0].where.name), f"has no column {', '.join(missing)} (it has {have}): correct the template"
            )
        )
        return []
    out = []
    for where, value in rows:
        made, wrong = {}, []
        for key in _TEMPLATES:
            texts = {name: _text(name, value.get(name), labels.get(name), wrong) for name in columns[key]}
            made[key] = section[key].format(**texts)
        faults += [Fault(where, text) for text in dict.fromkeys(wrong)]
        if not wrong:
            out.append(Row(where, made))
    return out


def _by_text(names: dict | list) -> dict[str, str]:
    """The names, keyed by the value as text, because a JSON file (a run's config) has only text keys."""
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    return {str(value): name for value, name in pairs}


def _text(name: str, value: Any, labels: dict[str, str] | None, wrong: list[str]) -> str:
    if labels is not None:
        if str(value) not in labels:
            wrong.append(
                f"column {name!r} is {value!r}, and labels names only {', '.join(labels)}: choose a split with labels"
            )
        return labels.get(str(value), "")
    if value is None or isinstance(value, (str, int, float)):
        return "" if value is None else str(value)
    wrong.append(f"column {name!r} is {type_name(value)}: a template takes text and numbers")
    return ""
