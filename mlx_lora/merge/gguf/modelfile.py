"""Ollama's ``Modelfile`` for a GGUF file: the model's path, the chat template, and the stop words.

Ollama's templates are Go's and a model's are Jinja's; neither can be converted to the other. So a Go template is
written for a few common chat formats, if the model's own template renders probe chats identically. For other formats,
Ollama reads the chat template in the GGUF file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.names import BaseModel
from ...errors import ConfigError, FormatError
from ...formats.files import write_file

NAME = "Modelfile"
_SYSTEM, _USER, _ANSWER, _MORE = "Words-1", "Words-2", "Words-3", "Words-4"


@dataclass(frozen=True)
class ChatFormat:
    """Turns that differ only in the role's name."""

    turn: str  # with {role} and {content}
    stop: tuple[str, ...]
    assistant: str = "assistant"  # the role's name in the turn
    system_in_user: bool = False  # Gemma: the system message begins the first user turn

    def write(self, messages: list[tuple[str, str]]) -> str:
        """The chat with the beginning of the answer, as the Go template writes it."""
        if self.system_in_user and messages[0][0] == "system":
            (_, system), (role, first), *rest = messages
            messages = [(role, f"{system}\n\n{first}"), *rest]
        return "".join(self._turn(role, content) for role, content in messages) + self._opening()

    def go(self, default_system: str | None) -> str:
        """The Go template; ``default_system`` is the system message that the model's template adds by default."""
        turn = self.turn.format(role="{{ .Role }}", content="{{ .Content }}")
        if self.system_in_user:
            role = '{{ if eq .Role "assistant" }}' + self.assistant + "{{ else }}user{{ end }}"
            system = '{{ if and $system (eq .Role "user") }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
            turn = self.turn.format(role=role, content=system + "{{ .Content }}")
            turn = '{{ if ne .Role "system" }}' + turn + "{{ end }}"
        body = "{{ range .Messages }}" + turn + "{{ end }}" + self._opening()
        if self.system_in_user:
            return "{{ $system := .System }}" + body
        if default_system:
            return "{{ if not .System }}" + self._turn("system", default_system) + "{{ end }}" + body
        return body

    def _turn(self, role: str, content: str) -> str:
        return self.turn.format(role=self.assistant if role == "assistant" else role, content=content)

    def _opening(self) -> str:
        return self._turn("assistant", "\0").partition("\0")[0]


FORMATS = (
    ChatFormat("<|im_start|>{role}\n{content}<|im_end|>\n", ("<|im_start|>", "<|im_end|>")),
    ChatFormat(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>", ("<|start_header_id|>", "<|eot_id|>")
    ),
    ChatFormat("<start_of_turn>{role}\n{content}<end_of_turn>\n", ("<start_of_turn>", "<end_of_turn>"), "model", True),
    ChatFormat("<|{role}|>\n{content}<|end|>\n", ("<|end|>", "<|user|>", "<|assistant|>")),
    ChatFormat("<|{role}|>{content}<|end|>", ("<|end|>", "<|user|>", "<|assistant|>")),
    ChatFormat("<|{role}|>\n{content}</s>\n", ("</s>", "<|user|>", "<|assistant|>")),
)


def chat_format(tokenizer: Any) -> tuple[ChatFormat, str | None] | None:
    """The format in which ``tokenizer``'s template writes chats, and its default system message."""
    chat = [("user", _USER), ("assistant", _ANSWER), ("user", _MORE)]
    plain, system = (_rendered(tokenizer, messages) for messages in (chat, [("system", _SYSTEM), *chat]))
    for one in FORMATS if plain else ():
        expected = one.write(chat)
        before, after = one._turn("system", "\0").split("\0")
        start = plain[: -len(expected)] if plain.endswith(expected) else None
        default = start[len(before) : -len(after)] if start else None
        told = start is not None and (not start or start == before + default + after)
        # A template that refuses system messages still gets a Go template.
        if (
            told
            and system in (None, one.write([("system", _SYSTEM), *chat]))
            and not any(mark in (default or "") for mark in ("{{", '"""'))
        ):
            return one, default
    return None


def _rendered(tokenizer: Any, messages: list[tuple[str, str]]) -> str | None:
    """The chat without bos, which Ollama adds itself; None if the template refuses it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    rows = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise errors of any type
        return None
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")


def check_modelfile(file: Path, overwrite: bool) -> Path:
    """The path of the Modelfile next to ``file``. Raises: FormatError: it exists already."""
    path = file.parent / NAME
    if path.exists() and not overwrite:
        raise FormatError(f"{path}: already exists", "Choose another folder, or add --force.")
    return path


def write_modelfile(path: Path, model: str, tokenizer: Any, adapter: str | None = None) -> list[str]:
    """Write a Modelfile.

    Args:
        model: Ollama's name or the path of the model, relative to the Modelfile or absolute.
        adapter: the path of a GGUF adapter.

    Returns: notes for the user.
    """
    lines, notes, found = [f"FROM {model}"], [], chat_format(tokenizer)
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    if found:
        lines.append(f'TEMPLATE """{found[0].go(found[1])}"""')
        lines += [f'PARAMETER stop "{text}"' for text in found[0].stop]
    elif getattr(tokenizer, "chat_template", None):
        notes.append(
            f"{path}: has no TEMPLATE: the model's chats have an unusual format, which Ollama must support itself"
        )
    write_file(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return notes


def adapter_modelfile(
    file: Path, base: BaseModel, overwrite: bool = False, trust_remote_code: bool = False
) -> list[str]:
    """Write a Modelfile for the GGUF adapter ``file`` on ``base``, which Ollama imports. Returns notes.

    Raises: ConfigError: Ollama cannot import the base from here.
    """
    from .tokenizer import load_tokenizer

    folder = ollama_base(base)
    path = check_modelfile(file, overwrite)
    return write_modelfile(path, str(folder), load_tokenizer(folder, trust_remote_code), f"./{file.name}")


def ollama_base(base: BaseModel) -> Path:
    """The folder of ``base`` from which Ollama imports it. Raises: ConfigError."""
    folder = base.folder
    if folder is None and base.known:
        from huggingface_hub import try_to_load_from_cache

        folder = Path(try_to_load_from_cache(base.name, "config.json")).parent
    if folder is None or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"a Modelfile needs the base model's folder, and {base.name} is not on this machine",
            f"Download it first (hf download {base.name}), or give its folder with --model.",
        )
    if base.config.get("quantization") or base.config.get("quantization_config"):
        raise ConfigError(
            f"Ollama cannot import {base.name}, which is quantized",
            "Give the original model with --model, or merge the adapter: --to merged, with a DST that ends in .gguf.",
        )
    return folder.resolve()
