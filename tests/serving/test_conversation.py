"""The conversation of the terminal chat, without a terminal: turns, retries, comparisons, options, files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from conftest import shake
from mlx_lora import AdapterConfig, attach, extract, load, unmount
from mlx_lora.config import DataConfig, GenerateConfig
from mlx_lora.data.load import load_dataset
from mlx_lora.errors import AdapterError, ConfigError, DataError, FormatError, MLXLoRAWarning
from mlx_lora.serving.conversation import Answer, Conversation
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Piece, Request
from mlx_lora.tiny_base import PATH

SHORT = GenerateConfig(max_tokens=8)
QUESTION = "Who left the kite?"
REASONING = """\
{%- set last = namespace(at=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > last.at %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, tokenizer = load(PATH)
    adapters = {}
    for seed, name in enumerate(("pirate", "lawyer")):
        attach(model, AdapterConfig(rank=4 + seed, num_layers=-1))
        shake(model, seed, size=0.3)
        adapters[name] = extract(model)
        unmount(model)
    engine = Engine(model, tokenizer)
    for name, adapter in adapters.items():
        engine.bank.add(name, adapter)
    return engine


def answers(events) -> list[str]:
    """The texts of the answers, by number."""
    said: dict[int, str] = {}
    for event in events:
        said[event.number] = said.get(event.number, "") + event.text
    return [said[number] for number in sorted(said)]


def piece(text: str, kind: str = "normal", reason: str | None = None) -> Piece:
    return Piece(text, kind, 1, reason, None, None, 5, 0, 1.0, 1, 1.0, 0.1)


class Script:
    """An engine whose answers are written down: the pieces, or an exception."""

    def __init__(self, engine: Engine, *turns: list):
        self._engine, self.turns, self.requests = engine, list(turns), []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream_all(self, requests, stopped):
        self.requests += requests
        for each in self.turns.pop(0):
            if isinstance(each, BaseException):
                raise each
            if stopped():
                return
            yield 0, each


def test_the_second_turn_reuses_the_prompt_cache(engine):
    conversation = Conversation(engine, SHORT)
    list(conversation.say(QUESTION))
    first = conversation.answers[0]
    list(conversation.say("And now?"))
    last = conversation.answers[0].last
    assert last.cached_tokens >= first.last.prompt_tokens, "all of the first turn, and its answer"
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.answers[0].first_token > 0 and conversation.engine.context_length == 512


def test_undo_takes_exchanges_back_one_by_one(engine):
    conversation = Conversation(engine, SHORT, system="Be brief.")
    for text in ("One", "Two", "Three"):
        list(conversation.say(text))
    assert [conversation.undo() for _ in range(3)] == ["Three", "Two", "One"]
    assert conversation.messages == [{"role": "system", "content": "Be brief."}] and conversation.system == "Be brief."
    with pytest.raises(ConfigError, match="no question yet"):
        conversation.undo()


def test_retry_differs_with_a_seed_and_can_be_repeated(engine):
    def talk() -> list[str]:
        conversation = Conversation(engine, GenerateConfig(max_tokens=12, temp=1.5, seed=3))
        return [answers(conversation.say(QUESTION))[0], *(answers(conversation.retry())[0] for _ in range(2))]

    assert len(set(talk())) == 3 and talk() == talk()


def test_retry_replaces_the_answer(engine):
    conversation = Conversation(engine, SHORT)
    list(conversation.say(QUESTION))
    conversation.switch("pirate")
    (said,) = answers(conversation.retry())
    assert conversation.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said}]
    with pytest.raises(ConfigError, match="no question yet"):
        list(Conversation(engine).retry())


@pytest.mark.parametrize("again", [False, True], ids=["first", "retry"])
@pytest.mark.parametrize("ends", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_answer_that_fails_changes_nothing(engine, ends, again):
    old = [[piece("old", reason="stop")]] if again else []
    script = Script(
        engine, [piece("fine", reason="stop")], *old, [piece("half"), ends], [piece("whole", reason="stop")]
    )
    conversation = Conversation(script, SHORT)
    for text in ("One", "Two")[: 1 + again]:
        list(conversation.say(text))
    before = list(conversation.messages)
    with pytest.raises(type(ends)):
        list(conversation.retry() if again else conversation.say("Two"))
    assert conversation.messages == before and not conversation.answers[0].complete and not conversation.answering
    list(conversation.retry())
    assert [m["content"] for m in conversation.messages] == ["One", "fine", "Two", "whole"]


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        ([piece("half")], {"role": "assistant", "content": "half"}),
        ([piece("why?", "reasoning"), piece("so")], {"content": "so", "reasoning_content": "why?"}),
        ([piece("why?", "reasoning")], None),
        ([piece("\n")], None),
        ([piece("I ask: "), piece('{"name"', "tool")], None),
    ],
)
def test_the_text_of_a_stopped_answer_is_kept(engine, pieces, kept):
    script = Script(engine, [*pieces, piece("more"), piece("", reason="stop")], [piece("whole", reason="stop")])
    conversation = Conversation(script, SHORT)
    for at, _ in enumerate(conversation.say("One"), 1):
        if at == len(pieces):
            conversation.stop()
    question = {"role": "user", "content": "One"}
    assert conversation.messages == ([question, {"role": "assistant", **kept}] if kept else [])
    assert conversation.unanswered == (None if kept else "One") and not conversation.answering
    list(conversation.retry())
    assert [m["content"] for m in conversation.messages] == ["One", "whole"]


def test_the_engine_answers_after_an_interrupt_in_the_middle_of_a_step(engine, monkeypatch):
    from mlx_lora.serving.lanes import BatchLane

    conversation = Conversation(engine, SHORT, adapter="pirate")
    expected = answers(conversation.say(QUESTION))
    conversation.undo()
    closed, close = [], engine.close
    monkeypatch.setattr(engine, "close", lambda: (closed.append(True), close()))
    monkeypatch.setattr(BatchLane, "next", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say(QUESTION))
    monkeypatch.undo()
    assert closed, "a step that was left in the middle is not gone on with"
    assert engine.active == engine.queued == 0 and answers(conversation.retry()) == expected


def test_stopping_an_answer_frees_the_engine(engine):
    conversation = Conversation(engine, GenerateConfig(max_tokens=400, extra_eos_token=()))
    events = conversation.say(QUESTION)
    next(events)
    conversation.stop()
    list(events)
    assert not conversation.answers[0].complete and engine.active == engine.queued == 0


def test_comparisons_are_one_batch_and_leave_no_trace(engine):
    conversation = Conversation(engine, SHORT, adapter="pirate")
    list(conversation.say(QUESTION))
    before, steps, step = list(conversation.messages), [], engine.step
    engine.step = lambda: steps.append(engine.queued + engine.active) or step()
    try:
        found = answers(conversation.compare([None, "pirate", "lawyer"], "And now?"))
    finally:
        del engine.step
    assert max(steps) == 3 and conversation.messages == before
    for name, text in zip([None, "pirate", "lawyer"], found, strict=True):
        prompt = engine.prompt([*before, {"role": "user", "content": "And now?"}])
        assert text == "".join(p.text for p in engine.stream(Request(prompt, SHORT, name)))


def test_who_is_compared(engine):
    conversation = Conversation(engine)
    assert conversation.rivals() == [None, "lawyer"], "the first one of the bank"
    conversation.switch("pirate")
    assert conversation.rivals() == [None, "pirate"] == conversation.rivals([None])
    assert conversation.rivals(["lawyer"]) == [None, "lawyer"]
    assert conversation.rivals(["lawyer", "pirate", None, "lawyer"]) == ["lawyer", "pirate", None]
    with pytest.raises(AdapterError, match="no adapter to compare"):
        Conversation(Engine(engine.model, engine.tokenizer)).rivals()


def test_options_are_changed_together_or_not_at_all(engine):
    conversation = Conversation(engine)
    for values, text in (
        ({"top_p": 0.5}, "top_p has no effect"),
        ({"temp": -1.0, "max_tokens": 0}, "max_tokens must be.*\n?.*temp must be"),
        ({"draft_model": "x"}, "draft_model: cannot be changed"),
        ({"prefill_step_size": 5, "temp": 1.0}, "prefill_step_size: cannot"),
        ({"temp": 1.0, "top_k": 5000}, "top_k must be below 1024"),
    ):
        with pytest.raises(ConfigError, match=text):
            conversation.set(values)
        assert conversation.config == GenerateConfig()
    conversation.set({"temp": 0.7, "top_p": 0.9})
    conversation.set({"temp": 0.0, "top_p": 1.0})


def test_a_conversation_that_outgrows_the_model_warns_with_the_fix(engine):
    conversation = Conversation(engine, GenerateConfig(max_tokens=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(conversation.say(QUESTION))
    with pytest.warns(MLXLoRAWarning, match="supports 512.*/undo or /reset"):
        list(conversation.say("word " * 600))


def test_reasoning_is_kept_apart_and_left_to_the_template(engine, monkeypatch):
    script = Script(engine, [piece("why?", "reasoning"), piece("so", reason="stop")], [piece("yes", reason="stop")])
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", REASONING)
    conversation = Conversation(script, SHORT)
    kinds = [(event.kind, event.text) for event in conversation.say("One")]
    assert kinds == [("reasoning", "why?"), ("text", "so"), ("end", "")]
    assert conversation.messages[-1] == {"role": "assistant", "content": "so", "reasoning_content": "why?"}
    list(conversation.say("Two"))
    prompt = engine.tokenizer.decode(list(script.requests[-1].tokens))
    assert "so" in prompt and "why?" not in prompt


def test_tool_calls_are_told_apart_and_stay_in_the_conversation(engine):
    class Marked:
        tool_call_start, tool_call_end = "<call>", "</call>"

    answer = Answer(None)
    for text, kind in (("Now ", "normal"), ("a", "tool"), ("b", "tool"), ("", "tool"), ("c", "tool")):
        answer.feed(piece(text, kind))
    assert answer.tools == ["ab", "c"]
    assert answer.message(Marked)["content"] == "Now <call>ab</call><call>c</call>"


def test_the_beginning_of_an_answer_is_part_of_it(engine):
    conversation = Conversation(engine, GenerateConfig(max_tokens=4, prefill_response="Robin"))
    (said,) = answers(conversation.say(QUESTION))
    assert said.startswith("Robin") and conversation.messages[-1]["content"] == said


def test_a_template_that_refuses_is_found_before_the_first_question(engine, monkeypatch):
    conversation = Conversation(engine)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", refusing)
    for make in (lambda: Conversation(engine, system="x"), lambda: conversation.start("x")):
        with pytest.raises(ConfigError, match="no system"):
            make()
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(engine)


# Files.


def test_what_is_saved_can_be_trained_on_and_loaded(engine, tmp_path):
    conversation = Conversation(engine, SHORT, system="Be brief. \N{SNOWMAN}")
    with pytest.raises(DataError, match="nothing to save"):
        conversation.save(tmp_path / "train.jsonl")
    for text in (QUESTION, 'He said "no"\nand left'):
        list(conversation.say(text))
    conversation.save(tmp_path / "train.jsonl")
    row = json.loads((tmp_path / "train.jsonl").read_text())
    assert row == {"messages": conversation.messages} and [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]
    sets = load_dataset(DataConfig(data=str(tmp_path), mask_prompt=True), engine.tokenizer, ("train",))
    assert len(sets.train) == 1
    other = Conversation(engine, SHORT)
    other.load(tmp_path / "train.jsonl")
    assert other.messages == conversation.messages and other.system == conversation.system


def test_a_file_is_replaced_on_demand_only(engine, tmp_path, monkeypatch):
    conversation = Conversation(engine, SHORT)
    list(conversation.say(QUESTION))
    path = tmp_path / "chat.jsonl"
    path.write_text("mine")
    with pytest.raises(FormatError, match="already"):
        conversation.save(path)
    for wrong, text in ((tmp_path / "chat.txt", "JSON lines"), (tmp_path / "nowhere" / "chat.jsonl", "cannot be")):
        with pytest.raises(FormatError, match=text):
            conversation.save(wrong)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(FormatError, match="disk is full"):
            conversation.save(path, overwrite=True)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    conversation.save(path, overwrite=True)
    assert json.loads(path.read_text())["messages"] == conversation.messages


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


@pytest.mark.parametrize(
    "rows, text",
    [
        ([chat("a", "b"), "{no"], ":2"),
        ([chat("a", "b"), {"messages": [{"role": "user"}]}], "chat.jsonl:2: message 1.*neither content"),
        ([{"messages": []}], ":1.*empty"),
        ([chat("a", "b"), chat("c", "d")], "holds 2 conversations"),
        ([{"text": "abc"}], "no conversation"),
        ([], "no conversation"),
    ],
    ids=["json", "message", "empty", "several", "text", "nothing"],
)
def test_a_wrong_line_is_named_and_changes_nothing(engine, tmp_path, rows, text):
    conversation = Conversation(engine, SHORT, system="x")
    with pytest.raises(DataError, match=text):
        conversation.load(write(tmp_path / "chat.jsonl", *rows))
    assert conversation.system == "x" and len(conversation.messages) == 1


def test_which_conversation_is_loaded(engine, tmp_path):
    conversation = Conversation(engine, SHORT)
    path = write(tmp_path / "chat.jsonl", chat("a", "b"), chat("c", "d", "e"))
    conversation.load(path, 1)
    assert [m["content"] for m in conversation.messages] == ["a", "b"] and conversation.unanswered is None
    conversation.load(path, 2)
    assert conversation.unanswered == "e" and conversation.questions == 1
    list(conversation.retry())
    assert [m["content"] for m in conversation.messages][:3] == ["c", "d", "e"]
    for wrong in (tmp_path / "none.jsonl", tmp_path / "chat.txt"):
        with pytest.raises(DataError):
            conversation.load(wrong)
    with pytest.raises(DataError, match="holds 2"):
        conversation.load(path, 3)
