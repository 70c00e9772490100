"""Two tasks that the tiny base cannot do: answering a note from a lost-property desk with a record or with a reply.

    "Anna left a red kite at the park."  ->  "{name: Anna, item: kite, colour: red, place: park}"
                                         ->  "We found your red kite at the park, Anna."

``rows`` gives chat rows for training and scoring. The note determines the answer, so that exact match can be counted.
Standard library only.
"""

from __future__ import annotations

import random
import zlib

from .corpus import COLOURS, ITEMS, NAMES, PLACES, Fact, article, pick

SPLITS = ("train", "valid", "test")
NOTES = [
    "{name} left {thing} at the {place}.",
    "There is {thing} in the {place}. It belongs to {name}.",
    "In the {place}, somebody found {thing}. I think it is from {name}.",
    "Hello, {name} here. I lost my {colour} {item} in the {place}.",
    "My {colour} {item} is still at the {place}. Thank you, {name}.",
    "Can you find {thing}? {name} last saw it near the {place}.",
    "The {item} that {name} lost is {colour}. Look in the {place}.",
    "{name} went to the {place} and came home without the {colour} {item}.",
]

ANSWERS = {
    "record": "{{name: {name}, item: {item}, colour: {colour}, place: {place}}}",  # a YAML flow mapping
    # The name comes last: the tiny base often fails to copy it as the first word.
    "reply": "We found your {colour} {item} at the {place}, {name}.",
}


def _bucket(text: str, n: int) -> int:
    return zlib.crc32(text.encode()) % n


def _split(fact: Fact) -> str:
    """The split of a combination. All combinations in test and valid are new, whatever the wording of the note."""
    if any(_bucket(word, 8) == 0 for word in (fact.name, fact.item, fact.place)):
        return ("valid", "test")[_bucket("/".join(fact), 2)]  # words that are not in the training split
    return ("train", "train", "train", "train", "train", "train", "valid", "test")[_bucket("/".join(fact), 8)]


def rows(split: str, n: int, seed: int = 0, answer: str = "record") -> list[dict]:
    """``n`` different chat rows of a split (``train``, ``valid`` or ``test``), the same for the same seed.

    ``answer`` is one of ``ANSWERS``; the notes are the same for each.

    The splits share no combination of name, item, colour and place. An eighth of the names, items and places, real
    and made up, are only in valid and test, where most rows have one of them.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"skill-{split}-{seed}")
    # With many made-up words in training, a model learns to copy words, not to know them.
    made_up = 0.3 if split == "train" else 0.05
    seen: set[Fact] = set()
    out = []
    while len(out) < n:
        fact = Fact(
            *(pick(rng, words, made_up) for words in (NAMES, ITEMS)), rng.choice(COLOURS), pick(rng, PLACES, made_up)
        )
        if _split(fact) != split or fact in seen or len(set(fact)) < 4:
            continue
        seen.add(fact)
        note = rng.choice(NOTES).format(**fact._asdict(), thing=article(f"{fact.colour} {fact.item}"))
        told = ANSWERS[answer].format(**fact._asdict())
        out.append({"messages": [{"role": "user", "content": note}, {"role": "assistant", "content": told}]})
    return out
