"""Rows to tokens, masks and batches. The tokenizers are made here; some tests use more data from `../shared/data`."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from row_tokenizers import CHATML, chat, faults_of, learned, make_tokenizer, one

from mlx_lora.config import DataConfig
from mlx_lora.data import (
    Dataset,
    Example,
    batches_per_epoch,
    eval_batches,
    load_dataset,
    sources,
    tokenize,
    train_batches,
)
from mlx_lora.data.batches import plan_widths
from mlx_lora.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")

# Templates that break a search for prefixes or markers. Each has a function that gives the learned text of a turn:
# (content, is it an answer to the last user turn) -> text.
TEMPLATES = {
    "chatml": (CHATML, lambda c, last: c + "<|im_end|>\n"),
    "default system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
        lambda c, last: c + "<|im_end|>\n",
    ),
    "trims": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        lambda c, last: c.strip() + "<|im_end|>\n",
    ),
    # As Qwen3 does: thinking is kept only after the last user turn, so a part of the chat is no prefix of the whole.
    "drops old thinking": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set c = m.content.split('</think>')[-1].lstrip('\\n') %}"
        "{% set r = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ r.strip('\\n') }}\n</think>\n\n{% endif %}"
        "{{ c }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        lambda c, last: (
            (
                (c if "</think>" in c else f"<think>\n\n</think>\n\n{c}")
                if last
                else c.split("</think>")[-1].lstrip("\n")
            )
            + "<|im_end|>\n"
        ),
    ),
    # As above, with a generation prompt that switches thinking off.
    "prompts no thinking": (
        CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\\n') }}").replace(
            "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif"
        ),
        lambda c, last: c.split("</think>")[-1].lstrip("\n") + "<|im_end|>\n",
    ),
    "no generation prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        lambda c, last: f" {c}<|im_end|>",
    ),
    # The system text is in the last user turn: no part of the chat is a prefix of the whole.
    "writes into the last user turn": (
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}[INST]"
        "{% if m == users[-1] %}Be kind. {% endif %}{{ m.content }}[/INST]{% endif %}{% endfor %}",
        lambda c, last: c + "<|im_end|>",
    ),
    "numbers the messages": (
        "{{ messages | length }} messages\n" + CHATML,
        lambda c, last: c + "<|im_end|>\n",
    ),
    "closes the last turn alone": (
        "{{ messages | length }} messages\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ '<|im_end|>' if loop.last else '' }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        lambda c, last: f" {c}" + ("<|im_end|>\n" if last else ""),
    ),
    "generation blocks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        lambda c, last: c + "<|im_end|>\n",
    ),
    "plain words": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        lambda c, last: f" {c}\n",
    ),
}
ANSWERS = ["<b>one</b>", "<think>\nhm\n</think>\n\ntwo", " three ", "four 🎉", "hm"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class Slow:
    """A tokenizer without offsets."""

    def __init__(self, inner):
        self.encode, self.apply_chat_template = inner.encode, inner.apply_chat_template
        self.eos_token_id, self.chat_template = inner.eos_token_id, inner.chat_template


def test_needs_neither_mlx_nor_a_model_library():
    code = "import sys, mlx_lora.data; print(*{'mlx', 'mlx_lm', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Tokens


def test_text_rows_end_with_eos_once(tokenizer):
    eos = tokenizer.eos_token_id
    first, second = tokenize([{"text": "he o"}, {"text": "he<|im_end|>"}], tokenizer, DataConfig())
    assert first.tokens.tolist() == [*tokenizer.encode("he o"), eos]
    assert second.tokens.tolist() == tokenizer.encode("he<|im_end|>")
    assert first.tokens.dtype == np.int32 and first.mask.dtype == bool
    assert first.mask.tolist() == [False] + [True] * (len(first.tokens) - 1)


def test_completions_without_a_template(tokenizer):
    bare = make_tokenizer(template=None)
    row = {"prompt": "Q: x\nA:", "completion": " yes"}
    example = one(row, bare, mask_prompt=True)
    assert example.tokens.tolist() == [*bare.encode("Q: x\nA: yes"), bare.eos_token_id]
    assert learned(example, bare) == [" yes<|im_end|>"]
    assert one(row, bare).mask[1:].all()
    straddled = one({"prompt": "A: ", "completion": "o"}, bare, mask_prompt=True)  # " o" is one token
    assert learned(straddled, bare) == [" o<|im_end|>"]


def test_completions_as_strings_or_messages(tokenizer):
    strings = one({"prompt": "hi", "completion": "ho"}, tokenizer, mask_prompt=True)
    assert learned(strings, tokenizer) == ["ho<|im_end|>\n"]
    both = chat("hi", "ho", "and", "so")["messages"]
    row = {"prompt": both[:3], "completion": both[3:]}
    assert learned(one(row, tokenizer, mask_prompt=True), tokenizer) == ["so<|im_end|>\n"]


def rows_of_each_kind():
    return {
        "text": [{"text": "he o"}, {"text": "over<|im_end|>"}],
        "chat": [chat("hi", "ho"), {**chat("a", "b", "c", "d"), "tools": [{"function": {"name": "f"}}]}],
        "completion": [{"prompt": "hi", "completion": "ho"}, {"prompt": "", "completion": "\nx"}],
    }


@pytest.mark.parametrize("kind", ["text", "chat", "completion"])
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_same_tokens_as_mlx_lm(kind, mask_prompt, tokenizer):
    """mlx-lm masks everything before an offset, as we do for the last turn."""
    if kind == "text" and mask_prompt:
        pytest.skip("refused by both")
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.datasets import create_dataset

    config = DataConfig(mask_prompt=mask_prompt, mask_turns="last" if mask_prompt else "all")
    tokenizers = [(TokenizerWrapper(tokenizer), rows_of_each_kind()[kind])]
    if SHARED.is_dir():
        from mlx_lm.tokenizer_utils import load

        data = {"text": SHARED / "wikisql/valid.jsonl", "chat": SHARED / "tools-chat/valid.jsonl"}
        if kind in data:
            rows = [json.loads(line) for line in data[kind].read_text().splitlines()]
            tokenizers += [(load(SHARED / "tokenizers" / name), rows) for name in ("minimind", "qwen2.5")]
    for wrapper, rows in tokenizers:
        theirs = create_dataset(rows, wrapper, config)
        ours = tokenize(rows, wrapper, config)
        for row, example in zip(rows, ours, strict=True):
            tokens, offset = theirs.process(row)
            assert example.tokens.tolist() == list(tokens)
            expected = np.arange(len(tokens)) >= max(1, offset)
            if row.get("completion") == "\nx":  # "\n\n" is one token here, half prompt: mlx-lm leaves it out
                expected[offset - 1] = mask_prompt or expected[offset - 1]
            np.testing.assert_array_equal(example.mask, expected)


# Masks


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("slow", [False, True])
def test_every_assistant_turn_of_any_template(name, slow):
    template, expected = TEMPLATES[name]
    inner = make_tokenizer(template, merges=())
    tokenizer = Slow(inner) if slow else inner
    for turns in range(1, len(ANSWERS) + 1):
        contents = [text for answer in ANSWERS[:turns] for text in ("hm", answer)]
        wanted = [expected(answer, k == turns - 1) for k, answer in enumerate(ANSWERS[:turns])]
        assert learned(one(chat(*contents), tokenizer, mask_prompt=True), inner) == wanted
        last = one(chat(*contents), tokenizer, mask_prompt=True, mask_turns="last")
        assert learned(last, inner) == wanted[-1:]
        whole = one(chat(*contents), tokenizer)
        assert whole.tokens.tolist() == last.tokens.tolist() and whole.mask[1:].all() and not whole.mask[0]


@pytest.mark.parametrize("name", ["chatml", "drops old thinking", "prompts no thinking", "numbers the messages"])
def test_unusual_orders_of_turns(name):
    """An assistant that starts, has two turns in a row, or is not last; all with the same content."""
    template, _ = TEMPLATES[name]
    tokenizer = make_tokenizer(template, merges=())
    roles = ["assistant", "user", "assistant", "assistant", "user"]
    row = {"messages": [{"role": role, "content": "assistant"} for role in roles]}
    assert [text.split("\n")[-2] for text in learned(one(row, tokenizer, mask_prompt=True), tokenizer)] == [
        "assistant<|im_end|>"
    ] * 3
    last = learned(one(row, tokenizer, mask_prompt=True, mask_turns="last"), tokenizer)
    assert [text.split("\n")[-2] for text in last] == ["assistant<|im_end|>"]


def test_blanks_missing_from_offsets_are_learned():
    from tokenizers import processors

    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    tokenizer = make_tokenizer(template, merges=())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = one(chat("hm ", " three ", "hm ", " four "), tokenizer, mask_prompt=True)
    assert learned(example, tokenizer) == [" three ", " four "]


@pytest.mark.parametrize("head", ["", "{{ messages | length }} messages\n"])
def test_tool_calls_are_assistant_turns(head):
    tokenizer = make_tokenizer(head + CHATML.replace("{{ m.content }}", "{{ m.content or '' }}"))
    call = {"id": "1", "type": "function", "function": {"name": "area", "arguments": {"side": 2}}}
    text = {**call, "function": {"name": "area", "arguments": '{"side": 2}'}}  # OpenAI's way
    for arguments in (call, text):
        messages = [
            {"role": "user", "content": "area?"},
            {"role": "assistant", "content": None, "tool_calls": [arguments]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "It is 4."},
        ]
        tools = [{"type": "function", "function": {"name": "area"}}]
        dataset = tokenize([{"messages": messages, "tools": tools}], tokenizer, DataConfig(mask_prompt=True))
        assert learned(dataset[0], tokenizer) == [
            '<tool_call>area({"side": 2})</tool_call><|im_end|>\n',
            "It is 4.<|im_end|>\n",
        ]
        assert dataset.summary.warnings() == ["the chat template ignores the rows' tools (first in rows:1)"]


def test_a_turn_that_cannot_be_located_is_refused():
    shuffled = make_tokenizer("{% for m in messages | reverse %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    assert "cannot be located" in faults_of([chat("a", "b", "c", "d")], shuffled, mask_prompt=True)


@needs_shared
@pytest.mark.parametrize(
    "name, close",
    [
        ("qwen2.5", "<|im_end|>\n"),
        ("minimind", "<|im_end|>\n"),
        ("gemma3n", "<end_of_turn>\n"),
        ("mistral_nemo_tool_call", "<|im_end|>"),
        ("nousresearch_hermes3_tool_use", "<|im_end|>\n"),
        ("qwen3_nonthinking", "<|im_end|>\n"),
        ("smollm3", "<|im_end|>\n"),
    ],
)
def test_real_templates_on_real_chats(name, close):
    from transformers import AutoTokenizer

    own = (SHARED / "tokenizers" / name).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / (name if own else "minimind"))
    if not own:
        tokenizer.chat_template = (SHARED / "chat_templates" / f"{name}.jinja").read_text()
    rows = [json.loads(line) for line in (SHARED / "tools-chat/train.jsonl").read_text().splitlines()][:80]
    if name == "gemma3n":  # knows no tools
        rows = [row for row in rows if all(m["role"] in ("user", "assistant") for m in row["messages"])]
    calls = 0
    for row, example in zip(
        rows, tokenize(rows, tokenizer, DataConfig(mask_prompt=True, max_seq_length=10**6)), strict=True
    ):
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        texts = learned(example, tokenizer)
        assert len(texts) == len(answers)
        for text, answer in zip(texts, answers, strict=True):
            assert text.endswith(close)
            text = text.removesuffix(close)
            if "tool_calls" not in answer:
                assert text == (answer["content"].strip() if name == "gemma3n" else answer["content"])
            elif name != "smollm3":  # whose template ignores the calls
                calls += 1
                opening, ending = ("[TOOL_CALLS][", "]") if "mistral" in name else ("<tool_call>\n", "\n</tool_call>")
                assert text.lstrip("\n").removeprefix(answer["content"]).lstrip("\n").startswith(opening)
                assert text.endswith(ending) and all(c["function"]["name"] in text for c in answer["tool_calls"])
    assert calls > 20 or name in ("gemma3n", "smollm3")


# Cutting and dropping


def test_long_rows_are_cut_and_empty_ones_dropped(tokenizer):
    rows = [
        chat("hi", "ho"),
        chat("x" * 100, "never seen"),
        chat("hi", "y" * 100),
        {"messages": chat("no answer")["messages"]},
    ]
    dataset = tokenize(rows, tokenizer, DataConfig(mask_prompt=True, max_seq_length=60))
    assert [len(example.tokens) for example in dataset] == list(dataset.lengths)
    assert max(dataset.lengths) == 60 and all(example.mask.any() and not example.mask[0] for example in dataset)
    summary = dataset.summary
    assert (summary.rows, summary.kept, summary.truncated, summary.dropped) == (4, 2, 2, 2)
    assert summary.tokens == sum(dataset.lengths) and summary.longest == 131
    assert summary.learned_tokens == sum(example.mask.sum() for example in dataset)
    cut, dropped = summary.warnings()
    assert (
        f"2 of 4 rows in rows were cut to 60 tokens (longest: {summary.longest})" in cut and "--max-seq-length" in cut
    )
    assert "2 of 4 rows in rows had no token to learn and were dropped" in dropped
    assert tokenize(rows[:1], tokenizer, DataConfig()).summary.warnings() == []


def test_nothing_to_learn_at_all(tokenizer):
    with pytest.raises(DataError, match="Nothing to learn") as error:
        tokenize([chat("x" * 100, "answer")], tokenizer, DataConfig(mask_prompt=True, max_seq_length=60))
    assert "--max-seq-length" in error.value.hint
    with pytest.raises(DataError, match="has no rows"):
        tokenize([], tokenizer, DataConfig())


# Bad rows


BAD_ROWS = [
    (["x"], "a list where an object is needed"),
    ({"instruction": "a"}, "has 'instruction' but no 'output'"),
    ({"conversations": []}, "'conversations' is empty"),
    ({"prompt": "a", "id": 3}, "has 'prompt' but no 'completion'"),
    ({}, "no keys at all"),
    ({"messages": "hi"}, "'messages' is text that is not a JSON list"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": ["hi"]}, "message 1 is a string"),
    ({"messages": [{"content": "hi"}]}, "message 1 has no role"),
    ({"messages": [{"role": "asistant", "content": "hi"}]}, "unknown role 'asistant': write assistant"),
    ({"messages": [{"role": "narrator", "content": "hi"}]}, "unknown role 'narrator': write one of system, developer"),
    ({"messages": [{"role": 1, "content": "hi"}]}, "has a role that is a number"),
    ({"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "has content that is an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is not text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a tool call without a name"),
    ({**chat("a", "b"), "tools": "none"}, "has tools that are a string"),
    ({"text": 3}, "'text' is a number"),
    ({"text": ""}, "'text' is empty"),
    ({"prompt": 3, "completion": "x"}, "'prompt' is a number"),
    ({"prompt": "x", "completion": ""}, "'completion' is empty"),
]


@pytest.mark.parametrize("row, said", BAD_ROWS)
def test_bad_rows_are_listed_with_the_fix(row, said, tokenizer):
    message = faults_of([row], tokenizer)
    assert "rows:1: " in message and said in message


def test_all_faults_of_all_files_are_in_one_error(tmp_path, tokenizer):
    good = json.dumps(chat("hi", "ho")).encode()
    train = [good, b"", b"{not json", json.dumps({"text": "x"}).encode(), b'{"messages": "\xff"}', good]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(train))
    (tmp_path / "valid.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError) as error:
        load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    head, *lines = error.value.message.splitlines()
    assert head == "4 errors in the data:"
    told = "\n".join(lines)
    assert f"{tmp_path}/train.jsonl:3, column 2: not JSON (Expecting" in told
    assert f"{tmp_path}/train.jsonl:5, byte 15: not UTF-8" in told
    assert f"train.jsonl:4: a text row among chat rows (first: {tmp_path}/train.jsonl:1)" in told
    assert f"{tmp_path}/valid.jsonl:1: 'messages' is empty" in told


def test_only_some_faults_are_shown(tokenizer):
    """Rows with the same fault are one line; there are at most ten lines."""
    good = {"text": "x"}
    same = faults_of([good, {"text": 1}, {"text": 1}, good, *[{"text": 1}] * 300], tokenizer).splitlines()
    assert same == ["302 errors in the data:", "rows, 302 rows (2-3, 5-304): 'text' is a number: write a string"]
    rows = [{"messages": [{"role": f"{i}", "content": "x"}]} for i in range(14)]
    lines = faults_of(rows, tokenizer).splitlines()
    assert len(lines) == 11 and lines[1].startswith("rows:1: message 1 has the unknown role '0'")
    assert lines[-1] == "and 5 other kinds of faults in 5 rows of rows"
    places = [chat("a", "b")["messages"] + [{"role": "user"}], [{"role": "user"}]]
    (line,) = faults_of([{"messages": messages} for messages in places], tokenizer).splitlines()[1:]
    assert line.startswith("rows, 2 rows (1-2): a message (user) has neither content nor tool_calls")
    apart = faults_of([good, {"text": 1}] * 20, tokenizer).splitlines()[1]
    assert "20 rows (2, 4, 6, 8, 10, 12, 14, 16, ...)" in apart


def test_rows_that_a_template_rejects(tokenizer):
    strict = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rows = [chat("a", "b"), {"messages": [{"role": "system", "content": "x"}, *chat("a", "b")["messages"]]}]
    message = faults_of(rows, strict)
    assert "rows:2: the chat template rejects this row: No system!" in message and "rows:1:" not in message
    bare = make_tokenizer(template=None)
    assert "this tokenizer has none" in faults_of([chat("a", "b")] * 3, bare)
    assert faults_of([chat("a", "b")] * 3, bare).startswith("1 error")  # a fault of the whole file, listed once


def test_mask_prompt_refuses_text_rows(tokenizer):
    message = faults_of([{"text": "x"}] * 3, tokenizer, mask_prompt=True)
    assert message.startswith("1 error") and "write prompt and completion" in message


def test_renamed_keys(tokenizer):
    for plain, renamed, knobs in [
        ({"prompt": "x", "completion": "y"}, {"q": "x", "a": "y"}, {"prompt_feature": "q", "completion_feature": "a"}),
        ({"text": "x"}, {"body": "x"}, {"text_feature": "body"}),
        (chat("x", "y"), {"turns": chat("x", "y")["messages"]}, {"chat_feature": "turns"}),
    ]:
        assert one(plain, tokenizer).tokens.tolist() == one(renamed, tokenizer, **knobs).tokens.tolist()


# Sources


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count):
    return [{"text": f"row {i}"} for i in range(count)]


def test_a_folder(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [*texts(3), {"text": "line\u2028separator"}])
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "test.json").write_text(json.dumps(texts(2), indent=1))
    write(tmp_path / "val.jsonl", texts(1))
    config = DataConfig(data=str(tmp_path))
    splits = load_dataset(config, tokenizer)
    assert len(splits.train) == 4 and len(splits.valid) == 1 and splits.test is None
    assert splits.notes == [f"Reading {tmp_path / 'val.jsonl'} as the validation set"] and splits.warnings == []
    assert len(load_dataset(config, tokenizer, ("test",)).test) == 2
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"no train.jsonl in .*; it has: test.json, val.jsonl"):
        load_dataset(config, tokenizer)


def test_an_empty_set(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", texts(2))
    (tmp_path / "valid.jsonl").write_text("\n")
    splits = load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    assert splits.valid is None and "has no rows" in splits.warnings[0]
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        load_dataset(DataConfig(data=str(tmp_path)), tokenizer)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("count, held", [(19, 0), (20, 1), (100, 5), (300, 10)])
def test_some_training_rows_are_held_out(kind, count, held, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "HOLD_OUT_MOST", 10)
    file = write(tmp_path / "train.jsonl", texts(count))
    config = DataConfig(data=str(file if kind == "file" else tmp_path))
    splits = load_dataset(config, tokenizer)
    assert len(splits.train) == count - held
    if held:
        (note,) = splits.notes
        assert len(splits.valid) == held and f"{held} of its {count} rows" in note and "--valid-split" in note
        rows = {tuple(example.tokens) for part in (splits.train, splits.valid) for example in part}
        assert len(rows) == count and splits.warnings == []
        splits_again = ("train", "valid") if kind == "file" else ("valid",)
        again = load_dataset(config, tokenizer, splits_again).valid  # again, and alone: the same rows
        assert [e.tokens.tolist() for e in again] == [e.tokens.tolist() for e in splits.valid]
    else:
        assert splits.valid is None and "19 rows, too few" in splits.warnings[0]
    if kind == "file":
        assert len(load_dataset(config, tokenizer, ("test",)).test) == count


def test_the_share_that_is_held_out(tmp_path, tokenizer):
    data = str(tmp_path)
    write(tmp_path / "train.jsonl", texts(1100))
    for share, held in ((0.5, 550), (0.001, 1)):  # a share that is asked for has no limits
        splits = load_dataset(DataConfig(data=data, valid_split=share), tokenizer)
        assert (len(splits.train), len(splits.valid)) == (1100 - held, held)
    none = load_dataset(DataConfig(data=data, valid_split=0), tokenizer)
    assert len(none.train) == 1100 and none.valid is None and "no validation loss" in none.warnings[0]
    write(tmp_path / "train.jsonl", texts(2))
    assert len(load_dataset(DataConfig(data=data, valid_split=0.9), tokenizer).valid) == 1
    write(tmp_path / "valid.jsonl", texts(3))
    assert len(load_dataset(DataConfig(data=data), tokenizer).valid) == 3
    with pytest.raises(ConfigError, match=r"valid_split 0.1 contradicts the validation set .*valid.jsonl"):
        load_dataset(DataConfig(data=data, valid_split=0.1), tokenizer)
    with pytest.raises(ConfigError, match="valid_split is for training"):
        load_dataset(DataConfig(data=data, valid_split=0.1), tokenizer, ("test",))
    for bad in (1.0, -0.1, True):
        with pytest.raises(ConfigError, match="valid_split must be"):
            DataConfig(valid_split=bad)
    with pytest.raises(ConfigError, match="mask_turns has no effect without mask_prompt"):
        DataConfig(mask_turns="last")


def test_files_of_other_kinds(tmp_path, tokenizer):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"has a format that mlx-lora does not read"):
        load_dataset(DataConfig(data=str(tmp_path / "rows.xlsx")), tokenizer)
    with pytest.raises(DataError) as error:
        load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    assert "it has: rows.xlsx" in error.value.message
    write(tmp_path / "alpaca.jsonl", texts(3))
    with pytest.raises(DataError) as error:
        load_dataset(DataConfig(data=str(tmp_path)), tokenizer)
    assert f"--data {tmp_path / 'alpaca.jsonl'}" in error.value.hint
    for name in ("nowhere", "./no/where", "no/where.jsonl", "no/where.csv.gz"):
        with pytest.raises(DataError, match=f"There is no folder or file '{name}'"):
            load_dataset(DataConfig(data=name), tokenizer)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package, with one dataset of 100 rows."""
    rows = [{"title": f"row {i}"} for i in range(100)]
    asked = []

    def load(path, split=None, **options):
        asked.append((path, split, options))
        if path != "some/rows":
            raise ValueError("Dataset doesn't exist on the Hub")
        parts = {None: {"train": rows, "validation": rows[:5]}, "train[:80%]": rows[:80], "train[-10%:]": rows[90:]}
        return parts[split]

    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_dataset_of_the_hub(hub, tokenizer, monkeypatch):
    splits = load_dataset(DataConfig(data="some/rows", text_feature="title"), tokenizer)
    assert (len(splits.train), len(splits.valid)) == (100, 5)
    with pytest.raises(ConfigError, match="contradicts the validation set some/rows/validation"):
        load_dataset(DataConfig(data="some/rows", text_feature="title", valid_split=0.1), tokenizer)
    with pytest.raises(DataError, match="'no/rows', and the dataset of that name cannot be loaded: Dataset doesn't"):
        load_dataset(DataConfig(data="no/rows"), tokenizer)
    with pytest.raises(DataError, match="has no test split, only train, validation"):
        load_dataset(DataConfig(data="some/rows", text_feature="title"), tokenizer, ("test",))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError) as error:
        load_dataset(DataConfig(data="some/rows"), tokenizer)
    assert "pip install datasets pyarrow" in error.value.hint


def test_sections_of_the_hub(hub, tokenizer):
    section = {"path": "some/rows", "text_feature": "title", "config": {"name": "small"}}
    splits = load_dataset(DataConfig(hf_dataset=section), tokenizer)
    assert (len(splits.train), len(splits.valid)) == (80, 10)
    assert hub == [("some/rows", "train[:80%]", {"name": "small"}), ("some/rows", "train[-10%:]", {"name": "small"})]
    twice = load_dataset(DataConfig(hf_dataset=[section, {**section, "valid_split": None}]), tokenizer)
    assert (len(twice.train), len(twice.valid)) == (160, 10)
    with pytest.raises(ConfigError) as error:
        load_dataset(DataConfig(hf_dataset=[{"train_splt": "x"}, 3]), tokenizer)
    assert "entry 1 has the unknown key 'train_splt'; did you mean train_split?" in error.value.message
    assert "entry 1 needs a path" in error.value.message and "entry 2 must be a mapping" in error.value.message
    with pytest.raises(ConfigError, match="no rows for the test set"):
        load_dataset(DataConfig(hf_dataset=section), tokenizer, ("test",))
    held = load_dataset(DataConfig(hf_dataset={**section, "train_split": "train[:80%]"}, valid_split=0.25), tokenizer)
    assert (len(held.train), len(held.valid)) == (60, 20)
    with pytest.raises(ConfigError, match="contradicts"):
        load_dataset(DataConfig(hf_dataset={**section, "valid_split": "train[-10%:]"}, valid_split=0.25), tokenizer)


def test_a_dataset_of_the_hub_with_train_only(hub, tokenizer, monkeypatch):
    """Rows of the Hub come through Arrow, which fills absent keys with null."""
    message = {"role": "user", "content": "hi", "tool_calls": None}
    answer = {"role": "assistant", "content": "ho", "tool_calls": None}
    rows = [{"messages": [message, answer], "tools": None}] * 40
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda path, split=None: {"train": rows})
    strict = make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content if m.tool_calls is not defined }}"))
    splits = load_dataset(DataConfig(data="some/rows"), strict)
    assert (len(splits.train), len(splits.valid)) == (38, 2) and "some/rows: 2 of its 40 rows" in splits.notes[0]
    assert "hi" in strict.decode(splits.train[0].tokens)


# Batches


def made(lengths, seed=0):
    """A dataset of random tokens and masks; each row's first token is its index + 1."""
    random = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(lengths):
        tokens = random.integers(1, 1000, length).astype(np.int32)
        tokens[0] = i + 1
        mask = random.random(length) < 0.5
        mask[0], mask[-1] = False, True
        out.append(Example(tokens, mask))
    return Dataset(out)


def lengths_of(count, seed=0):
    return np.random.default_rng(seed).lognormal(4, 0.7, count).astype(int).clip(2, 2000)


def take(batches, count):
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def indices(batch):
    return [int(first) - 1 for first in batch.tokens[:, 0] if first]


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x.tokens, y.tokens) and np.array_equal(x.mask, y.mask) for x, y in zip(a, b, strict=True)
    )


def test_a_batch_is_its_rows_padded():
    dataset = made(lengths_of(37))
    for batch in [*eval_batches(dataset, 4), *take(train_batches(dataset, 4, seed=1), 30)]:
        assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool
        assert batch.mask.shape == (4, batch.tokens.shape[1] - 1)
        for k in range(4):
            if batch.tokens[k, 0] == 0:  # an empty row
                assert not batch.tokens[k].any() and not batch.mask[k].any()
                continue
            tokens, mask = dataset[int(batch.tokens[k, 0]) - 1]
            assert batch.tokens[k].tolist() == [*tokens, *[0] * (batch.tokens.shape[1] - len(tokens))]
            assert np.flatnonzero(batch.mask[k]).tolist() == [i - 1 for i in np.flatnonzero(mask)]


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (37, 8), (300, 4)])
def test_every_row_once_an_epoch(count, batch_size):
    dataset = made(lengths_of(count))
    per_epoch = batches_per_epoch(dataset, batch_size)
    batches = take(train_batches(dataset, batch_size, seed=3), 3 * per_epoch)
    assert {batch.tokens.shape[0] for batch in batches} == {batch_size}
    epochs = [batches[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in [*epochs, list(eval_batches(dataset, batch_size))]:
        assert sorted(i for batch in epoch for i in indices(batch)) == list(range(count))
        assert sum(batch.mask.sum() for batch in epoch) == dataset.summary.learned_tokens
    if count >= 37:  # other rows together, not only in another order
        sets = [{frozenset(indices(batch)) for batch in epoch} for epoch in epochs]
        assert len(sets[0] & sets[1]) < per_epoch / 4


def test_the_order_depends_on_the_seed_alone():
    dataset = made(lengths_of(50))
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first = take(train_batches(dataset, 4, seed=5), 40)
    second = take(train_batches(dataset, 4, seed=5), 40)
    list(eval_batches(dataset, 4))
    assert np.random.get_state()[1].tolist() == before
    assert same(first, second) and not same(first, take(train_batches(dataset, 4, seed=6), 40))


@pytest.mark.parametrize("start", [0, 1, 12, 13, 14, 30, 1000])
def test_a_resumed_run_continues_where_it_stopped(start):
    dataset = made(lengths_of(50))
    whole = take(train_batches(dataset, 4, seed=5), start + 30)
    assert same(take(train_batches(dataset, 4, seed=5, start=start), 30), whole[start:])


def test_evaluation_takes_evenly_spread_batches_always_the_same():
    dataset = made(lengths_of(203))
    every = list(eval_batches(dataset, 4))
    assert len(every) == 51 and same(every, list(eval_batches(dataset, 4, limit=51)))
    some = list(eval_batches(dataset, 4, limit=10))
    assert same(some, list(eval_batches(dataset, 4, limit=10))) and len(some) == 10
    assert list(eval_batches(dataset, 4, limit=0)) == []
    places = [next(i for i, batch in enumerate(every) if indices(batch) == indices(part)) for part in some]
    assert len(set(places)) == 10 and max(np.diff([-1, *places, 51])) <= 6


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_each_batch(world):
    dataset = made(lengths_of(43))
    for make in (
        lambda rank, size: take(train_batches(dataset, 8, seed=2, start=1, rank=rank, world=size), 12),
        lambda rank, size: list(eval_batches(dataset, 8, rank=rank, world=size)),
    ):
        whole, ranks = make(0, 1), [make(rank, world) for rank in range(world)]
        for parts in zip(whole, *ranks, strict=True):
            alone, shares = parts[0], parts[1:]
            assert {share.tokens.shape for share in shares} == {(8 // world, alone.tokens.shape[1])}
            assert sorted(i for share in shares for i in indices(share)) == sorted(indices(alone))
    with pytest.raises(ConfigError, match="divided equally among 3"):
        train_batches(dataset, 8, seed=0, world=3)
    with pytest.raises(DataError, match="empty"):
        train_batches(Dataset([]), 8, seed=0)


@pytest.mark.parametrize("top, spread", [(2000, 0.7), (30000, 1.5)])
def test_any_lengths_need_few_widths(top, spread):
    lengths = np.random.default_rng(0).lognormal(5, spread, 3000).astype(int).clip(2, top)
    dataset = made(lengths)
    assert len(dataset.widths) <= 32 and dataset.widths[-1] >= lengths.max() > dataset.widths[-2]
    assert np.all(np.diff(dataset.widths) > 0) and np.all((dataset.widths - 1) % 4 == 0)
    shapes = {batch.tokens.shape for batch in take(train_batches(dataset, 4, seed=0), 1500)}
    assert len(shapes) <= 32
    assert {shape[1] for shape in shapes} <= set(dataset.widths.tolist())


def test_the_widths_pad_as_little_as_any_choice():
    from itertools import combinations

    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = random.integers(2, 60, 30)
        for most in (1, 2, 3):
            candidates = sorted({int(-(-(length - 1) // 4) * 4 + 1) for length in lengths})

            def padding(widths, lengths=lengths):
                return sum(min((w for w in widths if w >= length), default=10**6) - length for length in lengths)

            best = min(padding(c) for c in combinations(candidates, min(most, len(candidates))))
            planned = plan_widths(lengths, most)
            assert len(planned) <= most and padding(planned) == best


@pytest.mark.parametrize("count, batch_size", [(300, 8), (1003, 4), (1000, 16)])
def test_a_row_is_nearly_always_padded_to_the_same_width_among_other_rows(count, batch_size):
    dataset = made(np.random.default_rng(0).normal(110, 25, count).astype(int).clip(20, 200))
    epochs = [dataset.epoch(batch_size, 0, epoch) for epoch in (0, 1)]
    seen, batches = {}, []
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(count)) and len(epoch) == -(-count // batch_size)
        assert sum(len(rows) < batch_size for rows in epoch) == (count % batch_size > 0)
        seen[len(seen)] = {int(row): dataset.width(rows) for rows in epoch for row in rows}
        batches.append({frozenset(rows.tolist()) for rows in epoch})
    assert sum(seen[0][row] == seen[1][row] for row in range(count)) > 0.8 * count
    assert len(batches[0] & batches[1]) <= 0.25 * len(batches[0])
    assert [rows.tolist() for rows in dataset.epoch(batch_size, 0, 1)] == [rows.tolist() for rows in epochs[1]]


@pytest.mark.parametrize("count, batch_size", [(1, 4), (4, 4), (5, 4), (7, 1), (8, 4), (9, 4)])
def test_few_rows_make_an_epoch(count, batch_size):
    epoch = made(lengths_of(count)).epoch(batch_size, 0, 0)
    assert sorted(np.concatenate(epoch)) == list(range(count)) and len(epoch) == -(-count // batch_size)


def waste(dataset, batch_size):
    """The share of positions that are padding, over one epoch."""
    batches = take(train_batches(dataset, batch_size, seed=0), batches_per_epoch(dataset, batch_size))
    return 1 - (dataset.lengths - 1).sum() / sum(batch.mask.size for batch in batches)


def test_little_padding():
    assert waste(made(np.random.default_rng(0).integers(40, 220, 1000)), 4) < 0.03


@needs_shared
@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/minimind", "stories260K"])
def test_little_padding_on_wikisql(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    dataset = load_dataset(DataConfig(data=str(SHARED / "wikisql")), tokenizer, ("train",)).train
    assert len(dataset) == 1000 and waste(dataset, 4) < 0.03
