"""A transformers tokenizer as GGUF's key-value pairs: tokens, types, merges or scores, special ids, chat template.

The tokenizer is read as transformers loads it, because the model was trained that way. Two kinds of llama.cpp matter
here. Byte-level BPE is ``gpt2`` with merges and the name of a pre-tokenizer. BPE with byte fallback, as in
SentencePiece, is ``llama``: it joins the two neighbours whose union has the best score, so that the scores are the
order of the merges. Features that neither can express are refused by name; small differences are returned as notes. One
difference has no note: text that begins with a space, if the tokenizer adds a space only to text without one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...formats.files import read_json
from .pre_tokenizers import ROUGH, described, parts, pre_tokenizer_name

ELSEWHERE = "Write a folder (a name without .gguf), and convert it with llama.cpp's convert_hf_to_gguf.py."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types, as in SentencePiece
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp always marks tokens of these forms as control tokens.
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Texts of tokens at which llama.cpp always stops.
_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
_ENDS |= {"<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"}
_ENDS |= {"<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_STRIPPED_FOR = re.compile("phi-?3", re.IGNORECASE)  # llama.cpp looks for this in general.name
_NOT_STRIPPED = {"<unk>", "<s>", "<|endoftext|>"}


class GGUFTokenizer:
    """The tokenizer in ``folder``, checked.

    Args:
        rows: rows of the model's embedding. Rows without a token become unused tokens.

    Raises: FormatError: llama.cpp cannot express this tokenizer; every reason is named.
    """

    def __init__(self, folder: Path, rows: int, trust_remote_code: bool = False):
        self.folder, self.notes, self._faults = folder, [], []
        self.tokenizer = load_tokenizer(folder, trust_remote_code)
        self.template = _without_generation_tags(getattr(self.tokenizer, "chat_template", None))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise FormatError(f"{folder}: its tokenizer runs its own code and has no tokenizer.json", ELSEWHERE)
        self.json = json.loads(backend.to_str())
        self._read_tokens(rows)
        self.pairs = {**self._kind(), **self._special()}
        if self._faults:
            raise FormatError(
                f"{folder}: llama.cpp cannot express this tokenizer: {'; '.join(self._faults)}", ELSEWHERE
            )

    def name(self, wanted: str) -> str:
        """``wanted`` as ``general.name``, chosen so that llama.cpp treats spaces after special tokens correctly.

        llama.cpp drops spaces after the special tokens of a model with "phi3" in its name, and of no other.
        """
        stripped = {token["id"] for token in self.json["added_tokens"] if token["rstrip"]}
        special = {i for i, kind in enumerate(self.types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
        kept = {i for i in special if self.tokens[i] in _NOT_STRIPPED}
        as_phi3 = "</s>" in self.tokens and len(kept) == len(_NOT_STRIPPED) and stripped == special - kept
        if stripped and not as_phi3:
            shown = ", ".join(self.tokens[i] for i in sorted(stripped)[:5])
            self.notes.append(f"llama.cpp keeps the spaces after {shown}; the tokenizer drops them")
        if as_phi3:
            return wanted if _STRIPPED_FOR.search(wanted) else f"{wanted} (phi-3)"
        return _STRIPPED_FOR.sub("phi 3", wanted)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _read_tokens(self, rows: int) -> None:
        added = {token["id"]: token for token in self.json["added_tokens"]}
        vocabulary = self.tokenizer.get_vocab()
        if beyond := sorted(text for text, i in vocabulary.items() if i >= rows and i in added):
            # Gemma 3 has a token for images, even if the model has no row for it.
            self.notes.append(f"left out {', '.join(beyond[:5])}: tokens for which the model has no embedding")
            vocabulary = {text: i for text, i in vocabulary.items() if text not in beyond}
        highest = max(vocabulary.values(), default=-1)
        if highest >= rows:
            self._faults.append(f"its tokens have ids up to {highest}, the model's embedding has {rows} rows")
        rows = max(rows, highest + 1)
        self.tokens, self.types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
        made = {left + right for left, right in self._merges()}
        unknown = self.json["model"].get("unk_token")
        for text, i in vocabulary.items():
            token = added.get(i)
            self.tokens[i], self.types[i] = text, NORMAL
            if not self.byte_level and _BYTE.fullmatch(text):
                self.types[i] = BYTE
            elif not self.byte_level and text == unknown:
                self.types[i] = UNKNOWN
            elif token and (token["special"] or _LOOKS_SPECIAL.fullmatch(text)):
                self.types[i] = CONTROL
            elif token and not (not self.byte_level and text in made and text.strip(_SPACE) == ""):
                # Runs of spaces that merges also make (Gemma) stay normal tokens: text has spaces, not the character ▁.
                self.types[i] = USER_DEFINED
                self.tokens[i] = text if self.byte_level else text.replace(_SPACE, " ")
        twice = {text for text in self.tokens if not text} | _twice(self.tokens)
        if twice:
            self._faults.append(f"{len(twice)} tokens have the same text as another or none: {sorted(twice)[:5]}")

    @property
    def byte_level(self) -> bool:
        return any(part["type"] == "ByteLevel" for part in parts(self.json.get("pre_tokenizer"), "pretokenizers"))

    def _merges(self) -> list[tuple[str, str]]:
        merges = self.json["model"].get("merges") or []
        return [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in merges]

    # -- the two kinds -------------------------------------------------------------------------------------------------

    def _kind(self) -> dict[str, Any]:
        model = self.json["model"]
        if model["type"] != "BPE":
            self._faults.append(f"its model is {model['type']}, not BPE")
            return {}
        for field in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                self._faults.append(f"it marks parts of words ({field} {model[field]!r})")
        if not model.get("merges"):
            self._faults.append("it has no merges")
        common = {"tokenizer.ggml.tokens": self.tokens, "tokenizer.ggml.token_type": self.types}
        return {**(self._gpt2() if self.byte_level else self._sentencepiece()), **common}

    def _gpt2(self) -> dict[str, Any]:
        normalizers = [part["type"] for part in parts(self.json.get("normalizer"), "normalizers")]
        if normalizers == ["NFC"]:
            self.notes.append(
                "llama.cpp does not normalize text to NFC as the tokenizer does: a letter and its accent, written as "
                "two characters, become other tokens"
            )
        elif normalizers:
            self._faults.append(f"it changes the text first ({' + '.join(normalizers)})")
        name = pre_tokenizer_name(self.json)
        if name is None:
            shown = described(self.json["pre_tokenizer"], "pretokenizers")
            merges = "ignore_merges" if self.json["model"].get("ignore_merges") else "without ignore_merges"
            self._faults.append(f"llama.cpp has no name for its pre-tokenizer ({shown}; {merges})")
        if name in ROUGH:
            self.notes.append(f"llama.cpp's {name} splits words with capitals beyond A to Z, such as Ü, elsewhere")
        merges = [" ".join(pair) for pair in self._merges()]
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name or "", "tokenizer.ggml.merges": merges}

    def _sentencepiece(self) -> dict[str, Any]:
        bytes_known = sum(kind == BYTE for kind in self.types)
        if not self.json["model"].get("byte_fallback") or bytes_known != 256:
            self._faults.append("it has neither byte-level tokens nor the 256 tokens <0x00> to <0xFF> to fall back on")
        prefix = self._space_prefix()
        ranks: dict[str, list[int]] = {}
        pairs = self._merges()
        for rank, (left, right) in enumerate(pairs):
            ranks.setdefault(left + right, []).append(rank)
        differs = self._differs(ranks, set(pairs))
        if differs:
            self.notes.append(
                f"llama.cpp may merge {len(differs)} of {len(ranks)} tokens at another time or of other parts than the "
                f"tokenizer ({', '.join(map(repr, differs[:3]))}): rare words can become other tokens"
            )
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [-float(ranks[text][0]) if text in ranks else -1e6 for text in self.tokens],
            "tokenizer.ggml.add_space_prefix": prefix,
        }

    def _space_prefix(self) -> bool:
        """Whether text gets a space in front. Everything else that changes the text before splitting is a fault."""
        schemes, faults = [], []
        for part in parts(self.json.get("normalizer"), "normalizers"):
            if part == {"type": "Prepend", "prepend": _SPACE}:
                schemes.append("always")
            elif part != {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
                faults.append(part["type"])
        for part in parts(self.json.get("pre_tokenizer"), "pretokenizers"):
            if part["type"] == "Metaspace" and part["replacement"] == _SPACE:
                schemes.append(part["prepend_scheme"])
                if part.get("split", True) and any(_SPACE in text[1:] for text in self.json["model"]["vocab"]):
                    faults.append("Metaspace that splits before every space, though some tokens span one")
            elif part["type"] != "Split" or part["pattern"] != {"String": " "}:  # Gemma's: its text has no spaces left
                faults.append(part["type"])
        if faults:
            self._faults.append(f"it changes or splits the text first ({', '.join(faults)})")
        if "first" in schemes and "always" not in schemes:
            # llama.cpp adds a space at the beginning and after every special token, or nowhere. Chats begin with one.
            where = "the beginning of text gets no" if self.template else "text after a special token gets a"
            self.notes.append(f"llama.cpp adds the tokenizer's leading space everywhere or nowhere: {where} space")
            return not self.template
        return "always" in schemes

    def _differs(self, ranks: dict[str, list[int]], pairs: set[tuple[str, str]]) -> list[str]:
        """Tokens that scores could make in another order, or from other parts, than the merges."""
        differs = [text for text, found in ranks.items() if found[-1] - found[0] >= len(found)]
        known = {text for text, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        known = {text for text in known if len(text) == 1 or text in ranks}
        for text in known:
            for i in range(1, len(text)):
                parts_known = text[:i] in known and text[i:] in known
                if parts_known and (text[:i], text[i:]) not in pairs:
                    differs.append(text)
                    break
        return sorted(set(differs))

    # -- special ids ---------------------------------------------------------------------------------------------------

    def _special(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            i = getattr(self.tokenizer, f"{kind}_token_id", None)
            if isinstance(i, int) and i < len(self.tokens):
                found[f"tokenizer.ggml.{key}_token_id"] = i
        if UNKNOWN in self.types:
            found["tokenizer.ggml.unknown_token_id"] = self.types.index(UNKNOWN)
        eos = found.get("tokenizer.ggml.eos_token_id")
        stops = [i for i in self._stops() if i != eos and i < len(self.tokens)]
        if eos is None and stops:
            found["tokenizer.ggml.eos_token_id"] = stops.pop(0)
        stops.sort(key=lambda i: self.tokens[i] in _ENDS)  # those that llama.cpp does not know need a place
        for key, i in zip(("eot", "eom"), stops, strict=False):
            found[f"tokenizer.ggml.{key}_token_id"] = i
        if missed := [self.tokens[i] for i in stops[2:] if self.tokens[i] not in _ENDS]:
            self.notes.append(f"llama.cpp does not stop at {', '.join(map(repr, missed))}")
        if ends := [t for t, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL and t in _ENDS]:
            self.notes.append(f"llama.cpp ends a text at {', '.join(map(repr, ends))}, ordinary text to the tokenizer")
        found |= self._added_at_the_ends(found)
        template = self.template
        if isinstance(template, dict):
            others = {name: text for name, text in template.items() if name != "default"}
            found |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
            if others:
                found["tokenizer.chat_templates"] = sorted(others)
            template = template.get("default")
        return {**found, "tokenizer.chat_template": template} if template else found

    def _stops(self) -> list[int]:
        """The ids at which generation stops, from the model's settings."""
        for name in ("generation_config.json", "config.json"):
            file = self.folder / name
            stated = read_json(file).get("eos_token_id") if file.is_file() else None
            if stated is not None:
                return [stated] if isinstance(stated, int) else list(stated)
        return []

    def _added_at_the_ends(self, ids: dict[str, Any]) -> dict[str, bool]:
        """Whether bos and eos are added to text. Found by encoding, which works for every kind of settings."""
        inner = self.tokenizer.encode("a", add_special_tokens=False)
        whole = self.tokenizer.encode("a")
        starts = [i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner]
        before, after = (whole[: starts[0]], whole[starts[0] + len(inner) :]) if starts else (whole, [])
        allowed = [[]], [[]]
        for place, kind in zip(allowed, ("bos", "eos"), strict=True):
            if (i := ids.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
                place.append([i])
        if before not in allowed[0] or after not in allowed[1]:
            shown = self.tokenizer.convert_ids_to_tokens([*before, *after])
            self._faults.append(f"it adds {', '.join(map(str, shown))} to a text; llama.cpp adds bos and eos at most")
        return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a model folder. Raises: FormatError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds of errors on missing and damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FormatError(
            f"{folder}: its tokenizer cannot be loaded ({reason})", "Download the tokenizer's files again."
        ) from None


def _without_generation_tags(template: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """``template`` without the tags that mark assistant turns for training, which llama.cpp does not support."""
    if isinstance(template, dict):
        return {name: _without_generation_tags(text) for name, text in template.items()}
    return _GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], template) if template else None


def _twice(texts: list[str]) -> set[str]:
    seen: set[str] = set()
    return {text for text in texts if text in seen or seen.add(text)}
