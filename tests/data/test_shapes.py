"""The shapes of rows that other tools write: Alpaca, Dolly, ShareGPT, OpenAI's old calls; and what is refused."""

import json

import pytest
from row_tokenizers import CHATML, chat, faults_of, learned, make_tokenizer, one

from mlx_lora.config import DataConfig
from mlx_lora.data import load_dataset, questions, tokenize
from mlx_lora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content or '' }}"))


def read(row, tokenizer, **options):
    """The text of a row, and how it was read."""
    data = tokenize(row if isinstance(row, list) else [row], tokenizer, DataConfig(**options))
    return tokenizer.decode(data[0].tokens), list(data.summary.reading)


def turns(*pairs):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs)


INSTRUCTIONS = [
    (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "Add\n1 2",
        "Alpaca rows: instruction + input -> user, output",
    ),
    ({"instruction": "Add", "input": "", "output": "3"}, "Add", "Alpaca rows: instruction + input -> user"),
    ({"instruction": "Add", "input": None, "output": "3"}, "Add", "Alpaca rows: instruction -> user"),
    ({"instruction": "Add", "input": "<noinput>", "output": "3"}, "Add", "Alpaca"),
    ({"instruction": "Add", "output": "3"}, "Add", "Alpaca rows: instruction -> user, output -> assistant"),
    ({"instruction": "", "input": "1 2", "output": "3"}, "1 2", "Alpaca"),
    ({"Instruction": "Add", "Input": "1 2", "Output": "3"}, "Add\n1 2", "Alpaca rows: Instruction + Input -> user"),
    (
        {"instruction": "Add", "context": "1 2", "response": "3", "category": "math"},
        "Add\n1 2",
        "Dolly rows: instruction + context -> user, response -> assistant; not read: category",
    ),
    # As published: the text column has both parts and its own headings.
    ({"instruction": "Add", "input": "1", "output": "3", "text": "### ..."}, "Add\n1", "not read: text"),
    ({"question": "Add", "answer": "3"}, "Add", "question and answer rows: question -> user, answer -> assistant"),
    ({"prompt": "Add", "response": "3"}, "Add", "prompt and response rows"),
    ({"prompt": "Add", "input": "1", "output": "3"}, "Add\n1", "prompt + input -> user"),
    ({"input": "Add", "output": "3"}, "Add", "input -> user"),
    ({"query": "Add", "response": "3", "id": 4}, "Add", "not read: id"),
    ({"user": "Add", "assistant": "3"}, "Add", "user -> user"),
    ({"question": "Add", "user": "u-17", "answer": "3"}, "Add", "not read: user"),
]


@pytest.mark.parametrize("row, question, said", INSTRUCTIONS)
def test_instructions_become_one_turn_by_the_user(row, question, said, tokenizer):
    text, (line,) = read(row, tokenizer)
    assert text == turns(("user", question), ("assistant", "3"))
    assert line.startswith("Reading ") and said in line
    assert learned(one(row, tokenizer, mask_prompt=True), tokenizer) == ["3<|im_end|>\n"]


def test_alpaca_rows_with_and_without_input_are_one_kind(tokenizer):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": "i", "output": "b"}]
    assert read(rows, tokenizer)[1] == ["Reading Alpaca rows: instruction + input -> user, output -> assistant"]


def test_system_and_history_columns(tokenizer):
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    text, (line,) = read(row, tokenizer)
    assert text == turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert line.endswith("output -> assistant, system -> system message, history -> earlier turns")
    orca = {"id": "1", "system_prompt": "s", "question": "q", "response": "r"}
    assert read(orca, tokenizer)[0] == turns(("system", "s"), ("user", "q"), ("assistant", "r"))
    share = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"}
    assert read(share, tokenizer)[0] == turns(("system", "s"), ("user", "q"), ("assistant", "r"))


def test_instructions_without_a_chat_template():
    bare = make_tokenizer(template=None)
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    text, (line,) = read(row, bare)
    assert text == "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>"
    assert "instruction + input -> prompt, output -> completion" in line and "### Instruction:" in line
    assert learned(one(row, bare, mask_prompt=True), bare) == ["3<|im_end|>"]
    assert read({"prompt": "Add", "response": " 3"}, bare)[0] == "Add 3<|im_end|>"
    more = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert read(more, bare)[0] == (
        "s\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\nd<|im_end|>"
    )


CALL = {"name": "area", "arguments": {"side": 2}}
SHAREGPT = [
    ([("human", "q"), ("gpt", "a")], [("user", "q"), ("assistant", "a")]),
    ([("user", "q"), ("assistant", "a")], [("user", "q"), ("assistant", "a")]),
    ([("system", "s"), ("human", "q"), ("model", "a")], [("system", "s"), ("user", "q"), ("assistant", "a")]),
    ([("gpt", "hello"), ("human", "q"), ("chatgpt", "a")], [("assistant", "hello"), ("user", "q"), ("assistant", "a")]),
    (
        [("human", "q"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "a")],
        [("user", "q"), ("assistant", '<tool_call>area({"side": 2})</tool_call>'), ("tool", "4"), ("assistant", "a")],
    ),
    ([("human", "q"), ("tool", "4"), ("gpt", "a")], [("user", "q"), ("tool", "4"), ("assistant", "a")]),
]


@pytest.mark.parametrize("given, expected", SHAREGPT)
def test_sharegpt(given, expected, tokenizer):
    row = {"conversations": [{"from": role, "value": text, "weight": None} for role, text in given]}
    text, (line,) = read(row, tokenizer)
    assert text == turns(*expected)
    assert line.startswith("Reading ShareGPT rows: conversations -> messages, from -> role, value -> content")
    assert ("gpt -> assistant" in line) == any(role == "gpt" for role, _ in given)
    answers = [text for role, text in expected if role == "assistant"]
    assert learned(one(row, tokenizer, mask_prompt=True), tokenizer) == [f"{text}<|im_end|>\n" for text in answers]


@pytest.mark.parametrize("key", ["conversations", "conversation", "dialog", "dialogue", "Messages", "chat"])
def test_other_names_of_messages(key, tokenizer):
    messages = chat("q", "a")["messages"]
    text, (line,) = read({key: messages, "id": 3}, tokenizer)
    assert text == turns(("user", "q"), ("assistant", "a")) and "-> messages" in line and "not read: id" in line
    assert read({key: json.dumps(messages)}, tokenizer)[0] == text  # as a CSV cell has it


def test_a_question_and_its_answer_in_one_object(tokenizer):
    row = {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "r", "output": "b"}]}
    text, (line,) = read(row, tokenizer)
    assert text == turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert "input -> user, output -> assistant" in line


def test_messages_alone_are_nothing_to_speak_of(tokenizer):
    assert read({**chat("q", "a"), "tools": []}, tokenizer)[1] == []
    assert read({"prompt": "q", "completion": "a"}, tokenizer)[1] == []
    assert read({"prompt": "q", "completion": "a", "meta": 1}, tokenizer)[1] == [
        "Reading prompt and completion rows; not read: meta"
    ]


def test_openai_function_calls_of_old(tokenizer):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "function_call": {"name": "area", "arguments": '{"side": 2}'}},
                {"role": "function", "name": "area", "content": "4"},
                {"role": "assistant", "content": "a"},
            ],
            "functions": [{"name": "area", "parameters": {}}],
        }
    ]
    text, (line,) = read(rows, tokenizer)
    call = '<tool_call>area({"side": 2})</tool_call>'
    assert text == turns(("user", "q"), ("assistant", call), ("tool", "4"), ("assistant", "a"))
    assert "function_call -> tool_calls" in line and "function -> tool" in line and "functions -> tools" in line
    # A template that requires ids of nine letters and digits, and the result's id to be the call's.
    strict = make_tokenizer(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
        "{{ raise_exception('ids') }}{% endif %}[{{ c.id }}]{% endfor %}"
        "{{ '(' ~ m.tool_call_id ~ ')' if m.tool_call_id }}{{ tools[0].function.name }}{% endfor %}"
    )
    assert read(rows, strict)[0] == "area[call00200]area(call00200)areaarea"
    known = make_tokenizer(CHATML + "{# 'function' #}")  # the template knows the old role
    assert "<|im_start|>function\n" in read(rows, known)[0]


def test_roles_that_only_some_templates_know(tokenizer):
    row = {"messages": [{"role": "developer", "content": "d"}, *chat("q", "a")["messages"]]}
    text, (line,) = read(row, tokenizer)
    assert text.startswith(turns(("system", "d"))) and "developer -> system" in line
    assert "<|im_start|>developer" in read(row, make_tokenizer(CHATML + "{# 'developer' #}"))[0]
    # Gemma's template writes 'model' itself. A row with that role has an answer all the same.
    gemma = make_tokenizer(CHATML + "{# 'model' #}")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}
    assert learned(one(row, gemma, mask_prompt=True), gemma) == ["a<|im_end|>\n"]


AMBIGUOUS = [
    ({"instruction": "a", "output": "b", "response": "c"}, "2 columns that may be the answer (output, response)"),
    ({"problem": "a", "solution": "b", "answer": "c"}, "2 columns that may be the answer (answer, solution)"),
    ({"instruction": "a", "question": "b", "answer": "c"}, "2 columns that may be the question"),
    ({"instruction": "a", "input": "i", "context": "b", "output": "c"}, "2 columns that may be the context"),
    ({"conversations": [1], "dialog": [1]}, "2 columns that may be the conversation"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference row"),
    ({"instruction": "a", "input": "b"}, "has 'instruction' but no 'output': add it"),
    ({"prompt": "a"}, "has 'prompt' but no 'completion': add it"),
    ({"completion": "a"}, "has 'completion' but no 'prompt': add it"),
    ({"dialogue": "A: hi", "summary": "x"}, "'dialogue' is text that is not a JSON list"),
    ({"title": "a", "body": "b"}, "needs 'messages', 'prompt' with 'completion', or 'text', has only body, title"),
    ({"instruction": "a", "output": 3}, "'output' is a number"),
    ({"instruction": "", "input": "", "output": "x"}, "'instruction' is empty"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' is not a list of pairs"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "area"}]},
        "message 2 has a f",
    ),
    ({**chat("a", "b"), "messages": [{"role": "system", "content": "x"}], "system": "y"}, "keep one of them"),
]


@pytest.mark.parametrize("row, said", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(row, said, tokenizer):
    message = faults_of([row], tokenizer)
    assert said in message
    for column in row:  # no advice to read a column that leaves out another one
        assert f"-feature {column}" not in message


def test_options_that_name_columns_come_first(tokenizer):
    row = {"instruction": "a", "input": "i", "output": "b", "body": "whole"}
    text, (line,) = read(row, tokenizer, text_feature="body")
    assert text == "whole<|im_end|>" and "not read: input, instruction, output" in line
    named = {"prompt_feature": "input", "completion_feature": "output"}
    assert read(row, tokenizer, **named)[0] == turns(("user", "i"), ("assistant", "b"))
    message = faults_of([row], tokenizer, prompt_feature="question")
    assert "has no column 'question' for --prompt-feature question (it has body, input, instruction, output)" in message


def test_content_as_parts(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}]
    for template in (CHATML, "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"):
        made = make_tokenizer(template)
        strings = one(chat("a b", "c"), made)
        assert one(chat(parts, [{"type": "text", "text": "c"}]), made).tokens.tolist() == strings.tokens.tolist()
    for part, kind in (({"type": "image_url", "image_url": {}}, "image_url"), ({"type": "input_audio"}, "input_audio")):
        assert f"message 1 has a part that is not text ({kind})" in faults_of([chat([*parts, part], "c")], tokenizer)


def test_a_template_that_reads_parts_only_gets_parts():
    """As those of models with vision: a string would be read letter by letter, and nothing of it written."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    for row in (chat("q", "a", "q", "b"), chat([{"type": "text", "text": "q"}], "a", "q", "b")):
        assert tokenizer.decode(one(row, tokenizer).tokens) == turns(
            ("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b")
        )
        assert learned(one(row, tokenizer, mask_prompt=True), tokenizer) == ["a<|im_end|>\n", "b<|im_end|>\n"]


def test_exact_match_reads_the_same_shapes(tmp_path, tokenizer):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"instruction": "Add", "input": "1 2", "output": "3"}))
    for made in (tokenizer, make_tokenizer(template=None)):
        (question,) = questions(DataConfig(data=str(file)), made)
        assert question.answer == "3" and "Add" in question.text and "1 2" in question.text
        with pytest.raises(DataError, match="--prompt-feature q"):
            questions(DataConfig(data=str(file), prompt_feature="q"), made)


def test_both_sets_are_announced_once(tmp_path, tokenizer):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": "Add", "output": "3"}))
    splits = load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    assert splits.all_notes() == ["Reading Alpaca rows: instruction -> user, output -> assistant"]
