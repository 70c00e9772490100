"""Conversations in files: JSON lines with ``messages``, as ``train`` reads them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..base.writing import writing
from ..config import DataConfig
from ..data.faults import Fault, listing
from ..data.files import FORMATS, file_format, read_file
from ..data.rows import check
from ..data.samples import Sample
from ..errors import DataError, FormatError


def save_conversation(path: Path, messages: Sequence[dict], tools: list | None = None, overwrite: bool = False) -> None:
    """Write one conversation to ``path``, which must end in .jsonl. A failed write leaves no partial file.

    Raises: FormatError: another ending, a file that is there (unless ``overwrite``), or a failed write.
    """
    if path.suffix != ".jsonl":
        raise FormatError(f"{path}: a conversation is saved as JSON lines", f"Name it {path.stem or 'chat'}.jsonl.")
    if path.exists() and not overwrite:
        raise FormatError(f"{path}: the file already exists", "Choose another name, or replace it with /save!.")
    row = {"messages": list(messages), **({"tools": tools} if tools else {})}
    with writing(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def load_conversation(path: Path, number: int | None = None, template: str = "") -> Sample:
    """Load the only conversation of a data file, or the one with this number, counted from 1.

    Args:
        template: the text of the chat template, to find the roles that it supports.

    Raises: DataError: lists all unreadable rows; or the file has several conversations and no number is given.
    """
    if file_format(path.name) is None:
        raise DataError(f"{path}: is not a data file", f"Name a file that ends in {', '.join(FORMATS)}.")
    faults: list[Fault] = []
    try:
        rows = read_file(path, faults, [])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "Check the name of the file.") from None
    samples = check(rows, DataConfig(), template, faults).samples
    if faults:
        raise DataError(listing(faults), "Correct these lines, or remove them.")
    chats = [sample for sample in samples if sample.messages]
    if not chats:
        raise DataError(f"{path}: holds no conversation", 'Write one per line: {"messages": [{"role": ...}, ...]}.')
    if number is None and len(chats) == 1:
        return chats[0]
    if number is None or not 1 <= number <= len(chats):
        raise DataError(
            f"{path}: holds {len(chats)} conversation{'s' * (len(chats) > 1)}",
            f"Choose one by its number, from 1 to {len(chats)}: /load {path} 1.",
        )
    return chats[number - 1]
