"""Prompts and completions from the columns of a data set, by templates in the ``hf_dataset`` section."""

from __future__ import annotations

import json

import pytest

from mlx_lora.config import DataConfig
from mlx_lora.data import load_dataset, sources
from mlx_lora.data.columns import filled
from mlx_lora.data.faults import Place
from mlx_lora.data.files import Row
from mlx_lora.errors import ConfigError, DataError

GIVEN = {"path": "a/b", "train_split": "train", "valid_split": "valid"}
ACCEPT = {"prompt": "Fine?\n{sentence}\n", "completion": "{label}", "labels": {"label": ["no", "yes"]}}


class Letters:
    """A tokenizer without a chat template: a token for each character."""

    chat_template, has_chat_template, eos_token_id, bos_token_id = None, False, 0, None

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def read(monkeypatch, rows, section, splits=("train",)):
    monkeypatch.setattr(sources, "_load", lambda path, options, split: rows)
    return load_dataset(DataConfig(hf_dataset={**GIVEN, **section}, mask_prompt=True), Letters(), splits)


def made(rows, section) -> list[dict]:
    faults = []
    found = filled([Row(Place("a/b", i), row) for i, row in enumerate(rows, 1)], section, faults)
    assert not faults
    return [row.value if hasattr(row, "value") else row[1] for row in found]


def test_columns_are_filled_in_and_labels_named():
    rows = [{"sentence": "it is {good}", "label": 1, "idx": 7}, {"sentence": "is it", "label": 0, "idx": 8}]
    assert made(rows, ACCEPT) == [
        {"prompt": "Fine?\nit is {good}\n", "completion": "yes"},
        {"prompt": "Fine?\nis it\n", "completion": "no"},
    ]


def test_numbers_nulls_and_braces():
    section = {"prompt": "{{{a}}} of {the count}", "completion": "{b}"}
    assert made([{"a": None, "the count": 2.5, "b": "x"}], section) == [{"prompt": "{} of 2.5", "completion": "x"}]


def test_labels_are_the_same_after_a_round_trip_through_json():
    section = {**ACCEPT, "labels": {"label": {0: "no", 1: "yes", -1: "hidden"}}}
    rows = [{"sentence": "s", "label": label} for label in (0, 1, -1)]
    assert made(rows, section) == made(rows, json.loads(json.dumps(section)))


def test_the_completion_alone_is_learned(monkeypatch):
    rows = read(monkeypatch, [{"sentence": "s", "label": 1}] * 2, ACCEPT).train
    learned = rows[0].tokens[rows[0].mask]
    assert "".join(chr(i) for i in learned if i) == "yes"


def test_a_hidden_label_is_refused(monkeypatch):
    with pytest.raises(DataError) as error:
        read(monkeypatch, [{"sentence": "s", "label": -1}] * 3, ACCEPT)
    assert "3 rows (1-3): column 'label' is -1, and labels names only 0, 1: choose a split with labels" in str(error)


def test_an_unknown_column_is_refused_once_with_those_there_are(monkeypatch):
    with pytest.raises(DataError) as error:
        read(monkeypatch, [{"sentences": "s", "label": 1}] * 3, ACCEPT)
    assert str(error.value).count("has no column {sentence} of prompt (it has label, sentences)") == 1


def test_a_column_that_is_no_text_is_refused(monkeypatch):
    with pytest.raises(DataError, match="column 'sentence' is a list: a template takes text and numbers"):
        read(monkeypatch, [{"sentence": ["s"], "label": 1}], ACCEPT)


@pytest.mark.parametrize(
    "section, said",
    [
        ({"prompt": "{a}"}, "has prompt, so it needs completion too"),
        ({"labels": {}}, "has labels, so it needs prompt too"),
        ({"prompt": "{a}", "completion": "{b}", "text_feature": "t"}, "has text_feature beside prompt"),
        ({"prompt": "{a.__class__}", "completion": "{b}"}, "prompt: {a.__class__} is not the plain name of a column"),
        ({"prompt": "{a[0]}", "completion": "{b}"}, "{a[0]} is not the plain name"),
        ({"prompt": "{a!r}", "completion": "{b:>9}"}, "completion: {b} is not the plain name"),
        ({"prompt": "{}", "completion": "{b}"}, "prompt: {} is not the plain name"),
        ({"prompt": "{a", "completion": "{b}"}, "write {{ and }} for braces"),
        ({"prompt": "none", "completion": "{b}"}, "prompt: names no column in braces: 'none'"),
        ({"prompt": 3, "completion": "{b}"}, "must be text with columns in braces, not 3"),
        ({**ACCEPT, "labels": {"lable": ["no"]}}, "neither template uses the column 'lable'"),
        ({**ACCEPT, "labels": {"label": [False, True]}}, "must map values to texts in quotes, not to False"),
        ({**ACCEPT, "labels": {"label": "no"}}, "label must be a mapping or a list, not 'no'"),
        ({**ACCEPT, "labels": ["no"]}, "labels must be a mapping from columns"),
        ({"promt": "{a}", "completion": "{b}"}, "unknown key 'promt'; did you mean prompt?"),
    ],
)
def test_faulty_sections_are_refused(section, said, monkeypatch):
    with pytest.raises(ConfigError) as error:
        read(monkeypatch, [], section)
    assert said in str(error.value)


def test_every_fault_of_a_section_is_named_at_once(monkeypatch):
    with pytest.raises(ConfigError) as error:
        read(monkeypatch, [], {"prompt": "{a.b}", "completion": "x", "labels": {"c": ["d"]}})
    assert len(error.value.message.splitlines()) == 3
