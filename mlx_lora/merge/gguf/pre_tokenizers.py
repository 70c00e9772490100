"""The pre-tokenizers that llama.cpp supports by name: how a byte-level BPE tokenizer splits text into words.

llama.cpp knows a set of splittings by name (``tokenizer.ggml.pre``) and cannot read another one from the file. Here a
tokenizer is recognised by its ``tokenizer.json``, independent of its vocabulary: the steps of its pre-tokenizer and
``ignore_merges`` (whether a word that is a token is never split). The patterns are the originals that llama.cpp's
``src/llama-vocab.cpp`` cites for its own patterns.
"""

from __future__ import annotations

from typing import Any

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}" + _REST.replace(r"\p{L}", r"\p{L}\p{M}")
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = _UPPER + "*" + _LOWER + "+{0}|" + _UPPER + "+" + _LOWER + "*{0}|"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("{0}", "") + r"\p{N}" + _SLASH
_GPT4O = _CASED.replace("{0}", _CONTRACTION + "?") + r"\p{N}{1,3}" + _SLASH
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES, WORDS, DIGITS = "byte level", "byte level, GPT-2's words", "single digits"

# (steps, ignore_merges): llama.cpp's name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((WORDS,), False): "gpt-2",
    ((DIGITS, WORDS), False): "smollm",
    ((_LLAMA3, BYTES), True): "llama-bpe",
    ((_LLAMA3, BYTES), False): "dbrx",
    ((_QWEN2, BYTES), False): "qwen2",
    ((_QWEN35, BYTES), False): "qwen35",
    ((_TEKKEN, BYTES), True): "tekken",
    ((_GPT4O, BYTES), False): "gpt-4o",
    ((_SEED_CODER, BYTES), False): "seed-coder",
    (("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGITS, BYTES), False): "deepseek-coder",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3, BYTES), False): "deepseek-v3",
}
# Names whose patterns in llama.cpp treat capitals beyond A to Z as small letters.
ROUGH = {"tekken", "gpt-4o"}


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a ``tokenizer.json``; None if it has none."""
    steps = tuple(_step(part) for part in parts(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    return NAMES.get((steps, bool(tokenizer["model"].get("ignore_merges"))))


def parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if node is None:
        return []
    return [step for part in node[key] for step in parts(part, key)] if node["type"] == "Sequence" else [node]


def described(node: dict[str, Any] | None, key: str) -> str:
    """The steps for a message, such as ``Split '\\p{N}{1,3}' + ByteLevel``."""
    shown = []
    for part in parts(node, key):
        pattern = part.get("pattern")
        shown.append(part["type"] + (f" {next(iter(pattern.values()))!r}" if isinstance(pattern, dict) else ""))
    return " + ".join(shown) or "none"


def _step(part: dict[str, Any]) -> str:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return WORDS if part.get("use_regex", True) else BYTES
    if kind == "Digits" and part.get("individual_digits"):
        return DIGITS
    # Isolating the matches is the same as keeping the matches and dropping the (empty) rest.
    if kind == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = part["pattern"].get("Regex")
        return pattern.replace("\r", r"\r").replace("\n", r"\n") if pattern else kind
    return kind
