"""What Apple's compiler refuses and clang accepts, found in the text of our own kernels (not in MLX's headers)."""

from __future__ import annotations

import re

from .source import blank

_SCALARS = [
    "void",
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "size_t",
    "ptrdiff_t",
    "float",
    "half",
    "bfloat",
    "bfloat16_t",
    "float16_t",
    "int8_t",
    "uint8_t",
    "int16_t",
    "uint16_t",
    "int32_t",
    "uint32_t",
    "int64_t",
    "uint64_t",
]
_SPACES = {"device", "constant", "threadgroup", "thread"}
_BANNED = {
    "double": "Metal has no double",
    "new": "there is no heap",
    "delete": "there is no heap",
    "throw": "there are no exceptions",
    "try": "there are no exceptions",
    "catch": "there are no exceptions",
    "virtual": "there are no virtual functions",
    "dynamic_cast": "there is no RTTI",
    "typeid": "there is no RTTI",
    "goto": "there is no goto",
    "thread_local": "there is no thread_local",
    "asm": "there is no inline assembly",
    "std": "the namespace is metal::",
    "printf": "there is no printf",
}


def lint(source: str) -> list[tuple[int, str]]:
    """(line, what is wrong) in Metal ``source``."""
    text, found = blank(source), []

    def add(match: re.Match, message: str) -> None:
        found.append((text.count("\n", 0, match.start()) + 1, message))

    for word, why in _BANNED.items():
        pattern = rf"(?<![\w.:]){word}\b(?!\s*\()" if word == "std" else rf"(?<![\w.]){word}\b"
        for match in re.finditer(pattern, text):
            add(match, f"`{word}`: {why}")
    types = {*_SCALARS, *(f"{t}{n}" for t in _SCALARS for n in (2, 3, 4))}
    types |= set(re.findall(r"\bstruct\s+(\w+)", text)) | set(re.findall(r"\busing\s+(\w+)\s*=", text))
    pointees = "|".join(sorted(types | set(re.findall(r"\btypename\s+(\w+)", text)), key=len, reverse=True))
    pointer = (
        rf"(?<![\w:<>.])((?:const\s+|volatile\s+)*)({pointees})(\s+const)?\s*[*&]\s*(?:const\s+)?(\w+)\s*(?=[=;,)\[{{])"
    )
    for match in re.finditer(pointer, text):
        before = re.split(r"[;{}(,]", text[max(0, match.start() - 120) : match.start()])[-1]
        if not _SPACES & set(re.findall(r"\w+", before + " " + match.group(1))):
            add(match, f"`{match.group(4)}` points or refers without an address space")
    vectors = "|".join(t for t in types if t[-1] in "234" and not t.startswith(("int8", "uint8")))
    for match in re.finditer(rf"\((?:const\s+)?({vectors})\s*\)\s*[\w(]", text):
        if not re.search(r"\w\s*$", text[: match.start()]):
            add(match, f"C-style cast to {match.group(1)}: convert by {match.group(1)}(x), or as_type")
    for match in re.finditer(r"(?<![\w\])])\[\s*[&=]?\s*\]\s*\(", text):
        add(match, "lambda: write a function")
    return sorted(set(found))
