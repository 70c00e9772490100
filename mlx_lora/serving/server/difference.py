"""The difference between two texts, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from ...errors import ConfigError

_MOST_WORDS = 5000  # of both texts together; the comparison takes quadratic time
_WORD = re.compile(r"\s*\S+|\s+$")


def difference(old: str, new: str) -> list[dict[str, str]]:
    """The parts of both texts in order, each with its kind: "same", "removed" (from ``old``) or "added" (in ``new``).

    Raises: ConfigError: the texts are too long.
    """
    a, b = _WORD.findall(old), _WORD.findall(new)
    if len(a) + len(b) > _MOST_WORDS:
        raise ConfigError(
            f"the two answers have {len(a) + len(b)} words; at most {_MOST_WORDS} can be compared",
            "Compare shorter answers, or export them and use a program such as diff.",
        )
    parts = []
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b).get_opcodes():
        if tag == "equal":
            parts.append({"kind": "same", "text": "".join(a[a0:a1])})
            continue
        if a0 < a1:
            parts.append({"kind": "removed", "text": "".join(a[a0:a1])})
        if b0 < b1:
            parts.append({"kind": "added", "text": "".join(b[b0:b1])})
    return parts
