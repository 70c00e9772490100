"""Rows with preferences: TRL's formats, where answers begin, truncation, and all faults at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from row_tokenizers import CHATML, make_tokenizer, with_bos

from mlx_lora.config import DataConfig
from mlx_lora.data import load_dataset, questions, tokenize
from mlx_lora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def plain():
    return with_bos()


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def parts(example, tokenizer) -> tuple[str, str]:
    """The text before the answer, and the answer."""
    start = int(example.mask.argmax())
    assert not example.mask[:start].any() and example.mask[start:].all()
    return tokenizer.decode(example.tokens[:start]), tokenizer.decode(example.tokens[start:])


def read(row, tokenizer, kind="pairs", **options):
    """(prompt, answer, answer, ..) of the rows that a row becomes."""
    data = tokenize([row], tokenizer, DataConfig(**options), kind=kind)
    found = [parts(example, tokenizer) for row in data for example in row.sequences]
    assert len({prompt for prompt, _ in found}) == 1
    return found[0][0], *(answer for _, answer in found)


ASKED = "<|im_start|>user\nAdd 1 2<|im_end|>\n<|im_start|>assistant\n"
GOOD, BAD = "3<|im_end|>\n", "4<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Add 1 2", "chosen": "3", "rejected": "4"},
        {"prompt": [user("Add 1 2")], "chosen": [bot("3")], "rejected": [bot("4")]},
        {"prompt": [user("Add 1 2")], "chosen": "3", "rejected": "4"},
        {"prompt": "Add 1 2", "chosen": [bot("3")], "rejected": [bot("4")]},
        {"chosen": [user("Add 1 2"), bot("3")], "rejected": [user("Add 1 2"), bot("4")]},
        # As published (UltraFeedback): the prompt as a text, and once more in both chats.
        {"prompt": "Add 1 2", "chosen": [user("Add 1 2"), bot("3")], "rejected": [user("Add 1 2"), bot("4")]},
        {key: json.dumps(value) for key, value in
         {"prompt": [user("Add 1 2")], "chosen": [bot("3")], "rejected": [bot("4")]}.items()},
        {"chosen": [{"from": "human", "value": "Add 1 2"}, {"from": "gpt", "value": "3"}],
         "rejected": [{"from": "human", "value": "Add 1 2"}, {"from": "gpt", "value": "4"}]},
        {"question": "Add 1 2", "chosen": "3", "rejected": "4", "score": 1.5},
    ],
)  # fmt: skip
def test_pairs(row, tokenizer):
    assert read(row, tokenizer) == (ASKED, GOOD, BAD)
    assert read(row, tokenizer, "labels") == (ASKED, GOOD, BAD)
    data = tokenize([row], tokenizer, DataConfig(), kind="labels")
    assert [example.label for example in data] == [True, False]


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "1"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Add 1 2", "completion": "3"},
        {"prompt": [user("Add 1 2")], "completion": [bot("3")]},
        {"prompt": [user("Add 1 2")], "completion": "3"},
    ],
)
def test_labels(row, label, tokenizer):
    row = {**row, "label": label}
    assert read(row, tokenizer, "labels") == (ASKED, GOOD)
    (example,) = tokenize([row], tokenizer, DataConfig(), kind="labels")
    assert example.label is (str(label).lower() in ("true", "1"))
    assert tokenizer.decode(example.answer) == GOOD


def test_a_system_column_and_tools(tokenizer):
    row = {"system": "Be kind.", "prompt": "Add 1 2", "chosen": "3", "rejected": "4"}
    assert read(row, tokenizer)[0] == f"<|im_start|>system\nBe kind.<|im_end|>\n{ASKED}"
    with_tools = make_tokenizer("{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + CHATML)
    for tools in ([{"type": "function", "function": {"name": "add"}}],):
        for value in (tools, json.dumps(tools)):
            row = {"prompt": [user("Add 1 2")], "chosen": [bot("3")], "rejected": [bot("4")], "tools": value}
            assert read(row, with_tools) == (f"<add>{ASKED}", GOOD, BAD)


def test_answers_of_several_turns_count_whole(tokenizer):
    calls = [bot("call"), {"role": "tool", "content": "7"}, bot("It is 7.")]
    row = {"prompt": [user("Add")], "chosen": calls, "rejected": [bot("No.")]}
    _, chosen, rejected = read(row, tokenizer)
    assert chosen.startswith("call") and "tool\n7" in chosen and chosen.endswith("It is 7.<|im_end|>\n")
    assert rejected == "No.<|im_end|>\n"


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        ({"prompt": "Sky is", "chosen": " blue", "rejected": " red"}, "Sky is", " blue", " red"),
        ({"chosen": "Sky is blue", "rejected": "Sky is red"}, "Sky is", " blue", " red"),
        ({"chosen": "a: no", "rejected": "a: nope"}, "a: no", "", "pe"),
    ],
)
def test_texts_without_a_chat_template(row, prompt, chosen, rejected, plain):
    end = "<|im_end|>"
    assert read(row, plain) == (f"<|endoftext|>{prompt}", chosen + end, rejected + end)


def test_a_shared_text_is_tokenized_as_it_is_also_with_a_chat_template(tokenizer):
    row = {"chosen": "Human: hi\nBot: hello", "rejected": "Human: hi\nBot: go"}
    assert read(row, tokenizer) == ("Human: hi\nBot:", " hello<|im_end|>", " go<|im_end|>")
    (line,) = tokenize([row], tokenizer, DataConfig(), kind="pairs").summary.reading
    assert "what chosen and rejected share at the beginning -> prompt" in line


def test_an_answer_begins_where_the_tokens_differ(plain):
    """A token of the end of the prompt and the beginning of an answer belongs to both answers."""
    merged = with_bos(merges=(("h", "e"),))
    data = tokenize([{"prompt": "ah", "chosen": "e", "rejected": "x"}], merged, DataConfig(), kind="pairs")
    (pair,) = data
    assert [parts(example, merged)[1] for example in pair.sequences] == ["he<|im_end|>", "hx<|im_end|>"]
    assert any("the prompt has other tokens alone than before the answer" in w for w in data.summary.warnings())


def test_truncation_keeps_the_start_and_drops_rows_without_an_answer(tokenizer):
    rows = [
        {"prompt": "Add", "chosen": "c" * 30, "rejected": "r"},
        {"prompt": "p" * 100, "chosen": "c", "rejected": "r"},
        {"prompt": "Add", "chosen": "c", "rejected": "r"},
    ]
    for kind, kept in (("pairs", 2), ("labels", 4)):
        whole = tokenize(rows, tokenizer, DataConfig(), kind=kind)
        data = tokenize(rows, tokenizer, DataConfig(max_seq_length=40), kind=kind)
        assert len(data) == kept and data.lengths.max() == 40
        assert np.array_equal(data[0].tokens, whole[0].tokens[:40]) and data[0].mask[-1]
        said = data.summary.warnings()
        assert any("were cut to 40 tokens" in line for line in said) and any("were dropped" in line for line in said)
    assert len(data[0].answer) == len(whole[0].answer) > data[0].mask.sum()


def test_equal_answers_are_said(tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    data = tokenize(rows, tokenizer, DataConfig(), kind="pairs")
    assert len(data) == 2 and any("rows, 1 row (1): the chosen and the rejected" in w for w in data.summary.warnings())


FAULTS = [
    ("pairs", {"prompt": "a", "completion": "b", "label": True}, "rows with a label are for --loss kto"),
    ("pairs", {"prompt": "a", "completion": "b"}, "has no 'chosen' and 'rejected'"),
    ("pairs", {"prompt": "a", "chosen": "b"}, "has no 'chosen' and 'rejected'"),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is null"),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": [bot("c")]}, "write both as the same type"),
    ("pairs", {"chosen": "b", "rejected": "c"}, "add 'prompt'"),
    ("pairs", {"chosen": "b", "rejected": "b"}, "equal answers and no prompt"),
    ("pairs", {"chosen": [bot("b")], "rejected": [bot("c")]}, "has no prompt"),
    ("pairs", {"chosen": [user("b"), bot("c")], "rejected": [user("x"), bot("c")]}, "without a common first message"),
    ("pairs", {"prompt": [user("a")], "chosen": [user("b"), bot("c")], "rejected": [bot("c")]},
     "begin with the assistant"),
    ("pairs", {"prompt": [user("a")], "chosen": [user("a"), bot("c")], "rejected": [user("a"), bot("d")]},
     "has the messages of 'prompt' in 'chosen', too"),
    ("pairs", {"prompt": "z", "chosen": [user("a"), bot("c")], "rejected": [user("a"), bot("d")]},
     "is not the question"),
    ("pairs", {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [bot("d")]}, "neither content nor"),
    ("pairs", {"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' is a number"),
    ("pairs", {"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a number"),
    ("pairs", [1], "where an object is needed"),
    ("labels", {"prompt": "a", "completion": "b"}, "has no 'label'"),
    ("labels", {"prompt": "a", "label": True}, "has no 'completion'"),
    ("labels", {"prompt": "a", "completion": "b", "label": "maybe"}, "write true for a good answer"),
    ("labels", {"prompt": "a", "completion": "b", "label": None}, "has no 'label'"),
]  # fmt: skip


@pytest.mark.parametrize("kind, row, said", FAULTS)
def test_faults(kind, row, said, tokenizer):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    if kind == "labels":
        good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(DataError) as error:
        tokenize([good, good, row], tokenizer, DataConfig(), kind=kind)
    assert said in error.value.message and "rows:3" in error.value.message, error.value.message


def test_all_faults_are_said_at_once(tokenizer):
    rows = [row for kind, row, _ in FAULTS if kind == "pairs"]
    with pytest.raises(DataError, match=f"{len(rows)} errors"):
        tokenize([{"prompt": "a", "chosen": "b", "rejected": "c"}, *rows], tokenizer, DataConfig(), kind="pairs")


def test_messages_without_a_chat_template(plain):
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    with pytest.raises(DataError, match="messages need a chat template"):
        tokenize([row], plain, DataConfig(), kind="pairs")


def test_a_preference_row_without_the_loss_names_the_losses(tokenizer):
    with pytest.raises(DataError, match=r"add --loss \(dpo, ipo, orpo, kto, simpo, cpo\)"):
        tokenize([{"chosen": "b", "rejected": "c"}], tokenizer, DataConfig())


def test_named_columns(tokenizer):
    row = {"q": "Add 1 2", "a": "3", "label": True}
    assert read(row, tokenizer, "labels", prompt_feature="q", completion_feature="a") == (ASKED, GOOD)
    row = {"q": "Add 1 2", "chosen": "3", "rejected": "4"}
    assert read(row, tokenizer, prompt_feature="q") == (ASKED, GOOD, BAD)
    for kind in ("pairs", "labels"):
        with pytest.raises(DataError, match="has no column 'nope' for --prompt-feature nope"):
            tokenize([{**row, "completion": "x", "label": 1}], tokenizer, DataConfig(prompt_feature="nope"), kind=kind)


@pytest.mark.parametrize("name", ["completion", "chat", "text"])
def test_named_columns_that_pairs_do_not_have_are_refused(name, tokenizer):
    row = {"prompt": "Add", "chosen": "3", "rejected": "4"}
    with pytest.raises(DataError, match=f"--{name}-feature"):
        tokenize([{**row, "x": "y"}], tokenizer, DataConfig(**{f"{name}_feature": "x"}), kind="pairs")


def test_files_of_all_kinds(tokenizer, tmp_path):
    rows = [{"prompt": "Add 1 2", "chosen": "3", "rejected": "4"}] * 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.csv").write_text("prompt,chosen,rejected\nAdd 1 2,3,4\n")
    sets = load_dataset(DataConfig(data=str(tmp_path)), tokenizer, kind="pairs")
    assert len(sets.train) == 3 and np.array_equal(sets.valid[0].rejected.tokens, sets.train[0].rejected.tokens)
    assert questions(DataConfig(data=str(tmp_path)), tokenizer, "train", kind="pairs")[0].answer == "3"


def test_the_digest_is_of_all_answers_and_labels(tokenizer):
    def digest(kind, **changes):
        row = {"prompt": "a", "chosen": "b", "rejected": "c"} if kind == "pairs" else {"prompt": "a", "completion": "b"}
        return tokenize([{**row, **changes}], tokenizer, DataConfig(), kind=kind).digest

    assert digest("pairs") == digest("pairs") != digest("pairs", rejected="d")
    assert digest("labels", label=True) != digest("labels", label=False)
