"""What templates need and leave out, BOS and EOS, and prompts; with real templates from `../shared/data`."""

import json
from pathlib import Path

import pytest
from row_tokenizers import CHATML, chat, faults_of, learned, make_tokenizer, one, with_bos

from mlx_lora.config import DataConfig
from mlx_lora.data import questions, tokenize
from mlx_lora.data.template import Template, encode_prompt

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "area", "arguments": {"side": 2}}}
TOOLS = [{"type": "function", "function": {"name": "area", "description": "d", "parameters": {"properties": {}}}}]


def with_template(name):
    """minimind's tokenizer with a real template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / ("qwen2.5" if name == "qwen2.5" else "minimind"))
    if name not in ("minimind", "qwen2.5"):
        tokenizer.chat_template = (SHARED / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


def warnings(rows, tokenizer, **options):
    return tokenize(rows, tokenizer, DataConfig(**options)).summary.warnings()


def message(role, content, **more):
    return {"role": role, "content": content, **more}


# What is left out


LEFT_OUT = [
    ("mistral_nemo_tool_call", [message("system", "s"), *chat("q", "a")["messages"]], "content of system messages"),
    ("qwen3_nonthinking", [message("user", "q", name="Ann"), message("assistant", "a")], "name of user messages"),
    (
        "qwen2.5",
        [message("user", "q"), message("assistant", "a", reasoning_content="r")],
        "reasoning_content of assistant",
    ),
    ("qwen2.5", [message("user", "q"), message("assistant", "a", thinking="r")], "thinking of assistant messages"),
    ("qwen2.5", [message("user", "q", mood=3), message("assistant", "a", weight=1)], "mood of user messages"),
    ("smollm3", [message("user", "q"), message("assistant", "", tool_calls=[CALL])], "the rows' tool_calls"),
    (
        "nousresearch_hermes3_tool_use",
        [message("user", "q"), message("assistant", "words", tool_calls=[CALL]), message("tool", "4")],
        "content of assistant messages with tool calls",
    ),
    (
        "qwen3_nonthinking",
        [
            message("user", "q"),
            message("assistant", "a", reasoning_content="r"),
            message("user", "q"),
            message("assistant", "a", reasoning_content="r"),
        ],
        "reasoning_content of assistant messages before the last user message",
    ),
    (
        "qwen3_nonthinking",
        chat("q", "<think>\nlong\n</think>\n\na", "q", "<think>\nlonger\n</think>\n\nb")["messages"],
        "a part of the content of assistant messages before the last user message",
    ),
]


@needs_shared
@pytest.mark.parametrize("name, messages, said", LEFT_OUT)
def test_what_a_template_leaves_out_is_said(name, messages, said):
    tokenizer = with_template(name)
    lines = warnings([chat("q", "a"), {"messages": messages}], tokenizer)
    assert f"the chat template ignores {said}" in "\n".join(lines) and "(first in rows:2)" in lines[0]
    masked = warnings([chat("q", "a"), {"messages": messages}], tokenizer, mask_prompt=True)
    assert [line for line in masked if "ignores" in line] == lines


@needs_shared
@pytest.mark.parametrize(
    "name, row",
    [
        ("qwen2.5", {"messages": [message("system", "s"), *chat(" q ", "\na")["messages"]]}),
        ("qwen3_nonthinking", {"messages": [message("user", "q"), message("assistant", "a", reasoning_content="r")]}),
        ("gemma3n", {"messages": [message("system", "s"), *chat(" q\n", " a ")["messages"]]}),
        ("mistral_nemo_tool_call", {"messages": [message("system", "s"), message("user", "q")]}),
        ("minimind", {**chat("q", "a"), "tools": TOOLS}),
        (
            "qwen2.5",
            {
                "messages": [
                    message("user", "q"),
                    message("assistant", "", tool_calls=[CALL]),
                    message("tool", "4", tool_call_id="abcdefghi"),
                    message("assistant", "a"),
                ],
                "tools": TOOLS,
            },
        ),
    ],
)
def test_nothing_is_said_where_nothing_is_left_out(name, row):
    tokenizer = with_template(name)
    assert warnings([row], tokenizer) == []


def test_an_empty_value_does_not_hide_a_later_one():
    rows = [{"messages": [message("user", "q", mood=mood), message("assistant", "a")]} for mood in ("", 0, [], "glad")]
    assert warnings(rows, make_tokenizer()) == ["the chat template ignores mood of user messages (first in rows:4)"]


def test_each_thing_is_said_once_and_costs_little():
    """A rendering for each kind of message, not for each row."""
    tokenizer, made = make_tokenizer(), []
    inner = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **more: made.append(1) or inner(*args, **more)
    rows = [{"messages": [message("user", f"q{i}", mood=i + 1), message("assistant", f"a{i}")]} for i in range(300)]
    assert warnings(rows, tokenizer) == ["the chat template ignores mood of user messages (first in rows:1)"]
    assert len(made) < 320


def test_parts_of_texts_that_are_changed_are_not_left_out():
    for template in (
        "{% for m in messages %}{{ m.role }}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content | replace('\n', ' ') }}{% endfor %}",
    ):
        assert warnings([chat('  q "x"\nü\n', "a\n\nb ")], make_tokenizer(template)) == []
    cut = "{% for m in messages %}{{ m.role }}{{ m.content.split('\n')[0] }}{% endfor %}"
    assert warnings([chat("q\nr", "a"), chat("q", "a")], make_tokenizer(cut)) == [
        "the chat template ignores a part of the content of user messages (first in rows:1)"
    ]


# What templates need


@needs_shared
def test_a_template_that_needs_tools_gets_an_empty_list():
    tokenizer = with_template("nousresearch_hermes3_tool_use")
    row = chat("q", "a")
    expected = tokenizer.apply_chat_template(row["messages"], tools=[], return_dict=False)
    data = tokenize([row], tokenizer, DataConfig(mask_prompt=True))
    assert data[0].tokens.tolist() == expected and learned(data[0], tokenizer) == ["a<|im_end|>\n"]
    template = Template(tokenizer)
    assert template.prompt(row["messages"][:1]) == tokenizer.apply_chat_template(
        row["messages"][:1], tools=[], add_generation_prompt=True, return_dict=False
    )
    # Others keep None: Mistral's opens a list of tools for an empty one.
    assert "[AVAILABLE_TOOLS]" not in text_of([row], with_template("mistral_nemo_tool_call"))


def text_of(rows, tokenizer):
    return tokenizer.decode(tokenize(rows, tokenizer, DataConfig())[0].tokens)


def test_an_empty_list_of_calls_is_no_call():
    """A template that asks whether there are calls would write the calls, not the content."""
    asks = make_tokenizer(
        "{% for m in messages %}{{ m.content if m.tool_calls is not defined else 'calls' }}{% endfor %}"
    )
    row = {"messages": [message("user", "q", tool_calls=None), message("assistant", "a", tool_calls=[])]}
    assert text_of([row], asks) == "qa"


def test_prompts_may_have_parts():
    template = Template(make_tokenizer())
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.prompt([message("user", parts)]) == template.prompt([message("user", "ab")])


def test_a_call_without_content_is_not_the_word_none():
    row = {"messages": [message("user", "q"), message("assistant", None, tool_calls=[CALL])]}
    assert "None" not in text_of([row], make_tokenizer(CHATML))
    adds = make_tokenizer("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    assert text_of([row], adds) == "userqassistant"


@needs_shared
@pytest.mark.parametrize("name", ["gemma3n", "mistral_nemo_tool_call"])
def test_a_templates_error_is_told_in_its_words(name):
    tokenizer = with_template(name)
    row = {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "q"}]}
    other = {"messages": [message("user", "q"), message("critic", "x")]}
    if name == "gemma3n":
        said = faults_of([row], tokenizer)
        assert "the chat template rejects this row: Conversation roles must alternate user/assistant" in said
        assert "begins with an assistant's turn" in said and "change its roles" not in said
    else:
        tokenizer.chat_template += "{# 'critic' #}"
        assert "rejects this row: Only user and assistant roles are supported" in faults_of([other], tokenizer)


# BOS and EOS


def adds_eos():
    from tokenizers import processors

    tokenizer = make_tokenizer(None, ())
    eos = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {eos[0]}", special_tokens=[eos])
    return tokenizer


BOS, EOS = "<|endoftext|>", "<|im_end|>"


@pytest.mark.parametrize("text", ["hi", f"{BOS}hi", f"hi{EOS}", f"{BOS}hi{EOS}", f"{BOS}{BOS}hi{EOS}{EOS}"])
def test_text_has_one_bos_and_one_eos(text):
    tokenizer = with_bos()
    assert tokenizer.decode(one({"text": text}, tokenizer).tokens) == f"{BOS}hi{EOS}"
    plain = make_tokenizer(None)  # adds no BOS, so only a text's own is there
    assert plain.decode(one({"text": text}, plain).tokens) == (BOS if BOS in text else "") + f"hi{EOS}"
    ends = adds_eos()
    assert ends.decode(one({"text": text}, ends).tokens).count(EOS) == 1
    assert tokenizer.decode(one({"text": f"\n{BOS}hi{EOS}\n"}, tokenizer).tokens) == f"{BOS}hi{EOS}\n"


@pytest.mark.parametrize("prompt", ["hi", f"{BOS}hi"])
@pytest.mark.parametrize("completion", ["ho", f"ho{EOS}", f"{BOS}ho", f"{BOS}ho{EOS}"])
def test_completions_have_one_bos_and_one_eos(prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    tokenizer = with_bos()
    example = one(row, tokenizer, mask_prompt=True)
    assert tokenizer.decode(example.tokens) == f"{BOS}hiho{EOS}" and learned(example, tokenizer) == [f"ho{EOS}"]
    ends = adds_eos()
    assert learned(one(row, ends, mask_prompt=True), ends) == [f"ho{EOS}"]
    chatty = with_bos("{{ bos_token }}" + CHATML)
    example = one(row, chatty, mask_prompt=True)
    expected = f"{BOS}<|im_start|>user\nhi{EOS}\n<|im_start|>assistant\nho{EOS}\n"
    assert chatty.decode(example.tokens) == expected and learned(example, chatty) == [f"ho{EOS}\n"]
    messages = {"messages": [message("user", prompt), message("assistant", [{"type": "text", "text": completion}])]}
    assert chatty.decode(one(messages, chatty).tokens) == expected


def test_prompts_have_one_bos(tmp_path):
    tokenizer = with_bos("{{ bos_token }}" + CHATML)
    for text in ("hi", f"{BOS}hi"):
        assert tokenizer.decode(encode_prompt(tokenizer, text)) == f"{BOS}hi"
        ids = Template(tokenizer).prompt([message("user", text)])
        assert tokenizer.decode(ids) == f"{BOS}<|im_start|>user\nhi{EOS}\n<|im_start|>assistant\n"
    assert adds_eos().decode(encode_prompt(adds_eos(), "hi")) == "hi"  # an answer would end before it begins
    bare = with_bos()
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": f"{BOS}hi", "completion": "ho"}))
    (question,) = questions(DataConfig(data=str(tmp_path / "test.jsonl")), bare)
    assert bare.decode(question.tokens) == f"{BOS}hi"


def test_tokens_that_the_text_does_not_give():
    """A tokenizer whose own chat tokens differ from those of its text is followed."""
    tokenizer = make_tokenizer()
    inner = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *a, tokenize=True, **k: (
        inner(*a, tokenize=True, **k)[:-1] if tokenize else inner(*a, tokenize=False, **k)
    )
    assert tokenizer.decode(one(chat("q", "a"), tokenizer).tokens).endswith("a<|im_end|>")
