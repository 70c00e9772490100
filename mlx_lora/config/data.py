"""Where the rows come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .options import check_types, common, option, raise_all, without_effect

# Without a validation set: the share of training rows to hold out, the most rows, and the fewest rows to do it from.
HOLD_OUT, HOLD_OUT_MOST, HOLD_OUT_FROM = 0.05, 500, 20


@dataclass(frozen=True)
class DataConfig:
    """The data set, and which of its tokens to learn."""

    help_section = "Model and data"

    data: str = common(
        "mlx-community/WikiSQL",
        "Folder with train.jsonl, valid.jsonl and test.jsonl, one such file, or a Hugging Face data set. Files may "
        "also be .json, .csv, .tsv, .parquet or .arrow, and compressed (.gz).",
    )
    valid_split: float | None = option(
        None,
        "Share of the training rows to hold out for validation if there is no validation set; the same rows in "
        f"every run (default: {HOLD_OUT}, at most {HOLD_OUT_MOST} rows, from {HOLD_OUT_FROM} or more; 0 for none).",
    )
    mask_prompt: bool = common(False, "Compute the loss only on completions or assistant turns.")
    mask_turns: str = option("all", "With mask_prompt: the assistant turns that count.", choices=("all", "last"))
    max_seq_length: int = option(2048, "Truncate rows to this many tokens.")
    text_feature: str = option("text", "Key of the text in text rows.")
    prompt_feature: str = option("prompt", "Key of the prompt in completion rows.")
    completion_feature: str = option("completion", "Key of the completion in completion rows.")
    chat_feature: str = option("messages", "Key of the messages in chat rows.")
    hf_dataset: Any = option(None, "mlx-lm's hf_dataset section (YAML only): a mapping or a list of mappings.")

    def __post_init__(self):
        check_types(self)
        faults = []
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < 2:
            faults.append(f"max_seq_length must be at least 2, not {self.max_seq_length!r}")
        if self.mask_turns not in ("all", "last"):
            faults.append(f"mask_turns must be 'all' or 'last', not {self.mask_turns!r}")
        share = self.valid_split
        if share is not None and (isinstance(share, bool) or not 0 <= share < 1):
            faults.append(f"valid_split must be a share of at least 0 and below 1, not {share!r}")
        raise_all(faults + without_effect(self, _DATA_RULES), self)


_DATA_RULES = (
    (("mask_turns",), lambda c: c.mask_prompt, "has no effect without mask_prompt"),
    (("data",), lambda c: not c.hf_dataset, "has no effect with hf_dataset, which names the data sets"),
)
