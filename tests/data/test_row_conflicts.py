"""Rows and files that say two things, half of a thing, or nothing: what is refused, what wins, and what is said."""

import json

import pytest
from row_tokenizers import CHATML, chat, faults_of, learned, make_tokenizer, one

from mlx_lora.config import DataConfig
from mlx_lora.data import load_dataset, tokenize
from mlx_lora.data.files import read_file
from mlx_lora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content or '' }}"))


def called(**keys):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **keys}]}


def call(name="area", arguments='{"side": 2}'):
    return {"name": name, "arguments": arguments}


def text_of(row, tokenizer, **options):
    return tokenizer.decode(one(row, tokenizer, **options).tokens)


def load(path, tokenizer, splits=("train",), **options):
    return load_dataset(DataConfig(data=str(path), **options), tokenizer, splits)


# Messages


def test_tool_calls_and_function_call_must_be_the_same_call(tokenizer):
    calls = [{"id": "abc", "type": "function", "function": call(arguments={"side": 2})}]
    same = called(tool_calls=calls, function_call=call())
    assert text_of(same, tokenizer) == text_of(called(tool_calls=calls), tokenizer)
    for other in (call("length"), call(arguments='{"side": 3}'), [call(), call()]):
        message = faults_of([called(tool_calls=calls, function_call=other)], tokenizer)
        assert "rows:1: message 2 has tool_calls and another call in function_call" in message
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}", "function_call": call()}]
    assert "another one in function_call" in faults_of([{"conversations": turns}], tokenizer)


@pytest.mark.parametrize("arguments", ["{bad", "Paris", '["a"]', '{"a": 1', "3", ["a"], 3])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_arguments_must_be_an_object(arguments, key, tokenizer):
    made = call(arguments=arguments)
    row = called(**{key: made if key == "function_call" else [{"type": "function", "function": made}]})
    assert "rows:1: message 2 has a tool call whose arguments are" in faults_of([row], tokenizer)


def test_a_call_without_arguments(tokenizer):
    for arguments in ("", "{}", {}):
        assert "area({})" in text_of(called(tool_calls=[{"function": call(arguments=arguments)}]), tokenizer)


HALF = "a\ud800b"
HALVES = [
    {"text": HALF},
    {"prompt": HALF, "completion": "x"},
    {"prompt": "x", "completion": HALF},
    {"instruction": "x", "output": HALF},
    {"instruction": "x", "output": "y", "system": HALF},
    chat("q", HALF),
    {**chat("q", "a"), "tools": [{"name": HALF}]},
    {**chat("q", "a"), "tools": json.dumps([{"name": HALF}])},
    called(tool_calls=[{"function": call(arguments=json.dumps({HALF: 1}))}]),
]


@pytest.mark.parametrize("row", HALVES)
def test_half_a_surrogate_pair_is_a_fault_of_its_row(row, tokenizer):
    good = dict.fromkeys(row, "x") if "messages" not in row else chat("q", "a")
    message = faults_of([good, row], tokenizer)
    assert "rows:2: has half of a surrogate pair (\\ud800)" in message and message.encode("utf-8")
    bare = make_tokenizer(template=None)
    if "messages" not in row:
        assert "half of a surrogate pair" in faults_of([good, row], bare)


def test_names_of_columns_with_half_a_pair_can_be_printed(tokenizer):
    assert "x\\ud800" in faults_of([{"x\ud800": "y"}], tokenizer)
    (line,) = tokenize([{"text": "y", "x\ud800": "y"}], tokenizer, DataConfig()).summary.reading
    assert "not read: x\\ud800" in line
    assert text_of({"text": "\U0001f600 é"}, tokenizer).startswith("\U0001f600 é")


def test_weights_of_turns(tokenizer):
    row = chat("q", "a", "r", "b")
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    data = tokenize([row], tokenizer, DataConfig(mask_prompt=True))
    assert learned(data[0], tokenizer) == ["b<|im_end|>\n"] and data.summary.warnings() == []
    whole = tokenize([row], tokenizer, DataConfig())
    assert whole[0].tokens.tolist() == one(chat("q", "a", "r", "b"), tokenizer).tokens.tolist()
    assert [line for line in whole.summary.warnings() if "weight 0 are learned" in line and "--mask-prompt" in line]
    # A system column moves the turns by one; a prompt and completion of messages are one chat.
    assert learned(one({**row, "system": "s"}, tokenizer, mask_prompt=True), tokenizer) == ["b<|im_end|>\n"]
    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    assert learned(one(pair, tokenizer, mask_prompt=True), tokenizer) == ["b<|im_end|>\n"]
    for weight in (0.5, 2, -1, "0"):
        row["messages"][1]["weight"] = weight
        assert f"message 2 has the weight {weight!r}: write 0" in faults_of([row], tokenizer, mask_prompt=True)


# Which columns are read

BESIDE_TEXT = [
    {"prompt": "q", "completion": "a"},
    chat("q", "a"),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": json.dumps(chat("q", "a")["messages"])},
    {"Messages": chat("q", "a")["messages"]},
    {"question": "q", "answer": "a"},
    {"instruction": "q", "output": "a"},
    {"prompt": "q", "response": "a"},
    {"Question": "q", "Answer": "a"},
]


@pytest.mark.parametrize("row", BESIDE_TEXT)
def test_a_text_beside_other_columns_is_not_read(row, tokenizer):
    for both in ({**row, "text": "whole"}, {"text": "whole", **row}):
        data = tokenize([both], tokenizer, DataConfig(mask_prompt=True))
        assert learned(data[0], tokenizer) == ["a<|im_end|>\n"]
        assert "not read: text" in data.summary.reading[0]


@pytest.mark.parametrize("beside", [{"question": "q"}, {"answer": "a", "output": "b"}, {"chat": "words"}, {"label": 1}])
def test_a_text_is_read_where_nothing_else_has_both_sides(beside, tokenizer):
    assert text_of({"text": "whole", **beside}, tokenizer) == "whole<|im_end|>"


@pytest.mark.parametrize("key, value", [("system", "s"), ("input", "i"), ("context", "c"), ("history", [["a", "b"]])])
def test_what_a_prompt_leaves_out_is_warned_about(key, value, tokenizer):
    row = {"prompt": "q", "completion": "a"}
    rows = [row, {**row, key: value}]
    data = tokenize(rows, tokenizer, DataConfig())
    (line,) = data.summary.warnings()
    assert f"the prompts do not include {key}" in line and "'prompt' and 'response'" in line
    # The advice in the warning does include it.
    fixed = {"prompt": "q", "response": "a", key: value}
    assert text_of(fixed, tokenizer) != text_of(row, tokenizer)
    assert tokenize([{**row, key: ""}], tokenizer, DataConfig()).summary.warnings() == []
    lists = {"prompt": chat("q")["messages"], "completion": [{"role": "assistant", "content": "a"}], key: value}
    (line,) = tokenize([lists], tokenizer, DataConfig()).summary.warnings()
    assert "'response'" not in line and "write them into 'prompt'" in line
    lists["response"] = lists.pop("completion")
    assert "write it as messages in 'prompt'" in faults_of([lists], tokenizer)


def test_an_odd_row_at_the_top_does_not_condemn_the_others(tokenizer):
    good = {"prompt": "q", "completion": "a", "text": "t"}
    message = faults_of([{**good, "completion": None}, *[good] * 5], tokenizer)
    assert message.splitlines()[1:] == ["rows:1: 'completion' is null: write a value, or remove the row"]
    for odd in (
        {"text": "t"},
        chat("q", "a"),
        {"prompt": None, "completion": None, "text": "t"},
        ["x"],
        {"prompt": "q"},
    ):
        (line,) = faults_of([odd, *[good] * 5], tokenizer).splitlines()[1:]
        assert line.startswith("rows:1: ")
    message = faults_of([{"text": "t"}, *[{"prompt": "q", "completion": "a"}] * 2], tokenizer, mask_prompt=True)
    assert "rows:1: a text row among prompt and completion rows (first: rows:2)" in message
    rows = [{"instruction": "q", "output": "a"}, chat("q", "a"), chat("q", "a")]
    assert "rows:1: an Alpaca row among chat rows" in faults_of(rows, tokenizer)


CHOSEN = [
    ({"text_feature": "body"}, {"prompt": "q", "completion": "a"}, "has no column 'body' for --text-feature body"),
    ({"text_feature": "body"}, chat("q", "a"), "has no column 'body' for --text-feature body"),
    ({"text_feature": "body"}, {"question": "q", "answer": "a"}, "has no column 'body' for --text-feature body"),
    ({"chat_feature": "turns"}, {"text": "t"}, "has no column 'turns' for --chat-feature turns"),
    ({"prompt_feature": "q"}, chat("q", "a"), "has no column 'q' for --prompt-feature q"),
    ({"prompt_feature": "q"}, {"q": "x", "a": "y"}, "has no column 'completion' beside --prompt-feature q"),
    ({"prompt_feature": "q"}, {"q": "x", "a": "y"}, "(it has a, q): add --completion-feature"),
    ({"completion_feature": "a"}, {"q": "x", "a": "y"}, "add --prompt-feature"),
    ({"text_feature": "body"}, {"prompt": "q", "completion": "a", "body": "b"}, "is read by prompt and completion"),
    ({"text_feature": "prompt"}, {"prompt": "q", "completion": "a"}, "not by --text-feature prompt"),
    ({"prompt_feature": "q"}, {**chat("q", "a"), "q": "x"}, "is read by messages, not by --prompt-feature q"),
]


@pytest.mark.parametrize("options, row, said", CHOSEN)
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_a_column_that_an_option_names_must_be_read(options, row, said, mask_prompt, tokenizer):
    message = faults_of([row] * 3, tokenizer, mask_prompt=mask_prompt, **options)
    assert said in message and "rows, 3 rows (1-3)" in message


# Files


def names(*numbers, total=3, kind="jsonl", split="train"):
    return [f"{split}-{number:05}-of-{total:05}.{kind}" for number in numbers]


PARTS = [
    (names(0, 2), "train-00001-of-00003.jsonl is missing, of 3 files: add it"),
    (names(1, 2, kind="csv"), "train-00000-of-00003.csv is missing"),
    (names(0, 1), "train-00002-of-00003.jsonl is missing"),
    (names(1), "train-00000-of-00003.jsonl, train-00002-of-00003.jsonl are missing"),
    ([*names(0), *names(1, kind="csv")], "is missing"),
    ([*names(0, 1, 2), "train-00003-of-00003.csv"], "train-00003-of-00003.csv: has a number above its total"),
    ([*names(0, 1, 2), *names(0, total=1)], "are parts of 00001 and 00003"),
    ([*names(0, 1, 2), *names(2, kind="csv")], "is the same part as train-00002-of-00003.csv"),
    ([f"train/data-{n:05}-of-00003.jsonl" for n in (0, 2)], "data-00001-of-00003.jsonl is missing"),
    ([f"data/{name}" for name in names(0, 2)], "train-00001-of-00003.jsonl is missing"),
    ([f"train-0000{n}-of-00003-ab12.jsonl" for n in (0, 2)], "train-00001-of-00003-ab12.jsonl is missing"),
    (names(0, 1, 2), None),
    (names(1, 2, 3), None),
    (names(0, total=1), None),
]


@pytest.mark.parametrize("files, said", PARTS)
def test_missing_parts_are_refused_by_name(files, said, tmp_path, tokenizer):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text\nx\n" if name.endswith("csv") else '{"text": "x"}')
    if said is None:
        assert len(load(tmp_path, tokenizer).train) == len(files)
        return
    with pytest.raises(DataError) as error:
        load(tmp_path, tokenizer)
    assert said in error.value.message


@pytest.mark.parametrize("split, name", [("valid", "validation"), ("test", "test")])
def test_missing_parts_of_any_split(split, name, tmp_path, tokenizer):
    for file in ["train.jsonl", *names(0, 2, split=name)]:
        (tmp_path / file).write_text('{"text": "x"}')
    with pytest.raises(DataError, match=f"{name}-00001-of-00003.jsonl is missing"):
        load(tmp_path, tokenizer, ("train", split))


def read(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    faults, notes = [], []
    return [row.value for row in read_file(path, faults, notes)], [fault.text for fault in faults], notes


CSVS = {
    "prompt;completion, the answer\na;b\nc, d;e\n": (";", ["prompt", "completion, the answer"]),
    "prompt;completion\na, b;c\n": (";", ["prompt", "completion"]),
    "prompt\tcompletion (short, exact)\na, b\tc\n": ("\t", ["prompt", "completion (short, exact)"]),
    "prompt|answer; or none\na|b\nc|d; e\n": ("|", ["prompt", "answer; or none"]),
    'prompt,"completion; the answer"\na,b\n"c; d",e\n': (",", ["prompt", "completion; the answer"]),
    "prompt,completion; the answer\na,b\nc,d\n": (",", ["prompt", "completion; the answer"]),
    "text\na; b\n": (",", ["text"]),
}


@pytest.mark.parametrize("text", CSVS)
def test_what_separates_cells_is_found_from_the_rows(text, tmp_path):
    mark, columns = CSVS[text]
    rows, faults, notes = read(tmp_path / "rows.csv", text)
    assert not faults and list(rows[0]) == columns and len(rows) == text.count("\n") - 1
    assert (repr(mark) in "".join(notes)) == (mark != ",")


def test_one_cell_is_one_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,id\nx\n")
    faults = []
    read_file(path, faults, [])
    assert faults[0].spot == "1 cell"
    path.write_text("text\na, b\n")
    read_file(path, faults, [])
    assert "does not have the 1 cell of the header" in faults[1].text


PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
CONVERSATIONS = [chat("q", "a"), chat("r", "b")]
COLUMNS = [
    ({"prompt": ["a", "c"], "completion": ["b", "d"]}, PAIRS),
    ({"prompt": {"0": "a", "1": "c"}, "completion": {"1": "d", "0": "b"}}, PAIRS),  # pandas.DataFrame.to_json
    ({"messages": [row["messages"] for row in CONVERSATIONS]}, CONVERSATIONS),
    ({"text": ["a"]}, [{"text": "a"}]),
]


@pytest.mark.parametrize("value, rows", COLUMNS)
def test_json_by_columns(value, rows, tmp_path):
    found, faults, (note,) = read(tmp_path / "rows.json", json.dumps(value))
    assert found == rows and not faults
    assert "by columns" in note and f": {len(rows)} row{'s' * (len(rows) > 1)}" in note


def test_json_with_columns_of_different_lengths(tmp_path):
    for completion in (["b"], {"0": "b", "2": "d"}, []):
        value = {"prompt": ["a", "c"], "completion": completion}
        rows, (fault,), _ = read(tmp_path / "rows.json", json.dumps(value))
        assert not rows and f"prompt: 2, completion: {len(completion)}" in fault
    for row in (chat("q", "a"), {"prompt": "a", "completion": "b", "tags": ["x"]}):
        assert read(tmp_path / "rows.json", json.dumps(row)) == ([row], [], [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_other_encodings_are_one_fault_with_the_way_to_convert(encoding, kind, tmp_path):
    text = '{"text": "x"}\n{"text": "y"}\n' if "json" in kind else "text\nx\ny\n"
    rows, (fault,), _ = read(tmp_path / f"rows.{kind}", text.encode(encoding))
    name = encoding.upper().replace("16-", "16")
    assert not rows and f"is written in {name}, not in UTF-8" in fault and f"iconv -f {name} -t UTF-8" in fault
