"""Many requests over one base: answers as alone, adapters by row, failures and cancellation of one row."""

from __future__ import annotations

import copy
import itertools

import mlx.core as mx
import pytest

from conftest import shake
from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, fuse, load, mount, unmount
from mlx_lora.base import older_mlx_lm
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import BusyError, Engine
from mlx_lora.serving.memory import TooLongError, new_cache
from mlx_lora.serving.requests import Request
from mlx_lora.tiny_base import PATH

CONFIG = GenerateConfig(max_tokens=12)
QUESTIONS = ("A red umbrella was found on a bench.", "There is a grey key in the field. It belongs to Carmen.", "Hi")


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(PATH)
    adapters = {}
    for seed, (name, config) in enumerate({"a": {}, "b": {"rank": 7}, "dora": {"method": "dora"}}.items()):
        attach(model, AdapterConfig(num_layers=-1, **{"rank": 4, **config}))
        shake(model, seed, size=0.3)
        adapters[name] = extract(model)
        unmount(model)
    return model, tokenizer, adapters


@pytest.fixture
def engine(loaded):
    model, tokenizer, adapters = loaded
    bank = AdapterBank(model)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    made = Engine(model, tokenizer, bank, batch_size=8)
    yield made
    made.close()


def request(engine, question: str = QUESTIONS[0], adapter: str | None = None, **options) -> Request:
    config = GenerateConfig(**{"max_tokens": 12, **options})
    return Request(engine.prompt([{"role": "user", "content": question}], config=config), config, adapter)


def answer(engine, request: Request) -> str:
    """The answer by itself, without kept keys and values."""
    engine.prompt_cache.trim_to(n_sequences=0)
    return "".join(piece.text for piece in engine.stream(request))


def together(engine, requests: list[Request]) -> list[str]:
    texts = [""] * len(requests)
    for number, piece in engine.stream_all(requests):
        texts[number] += piece.text
    return texts


def test_rows_answer_as_alone_whatever_is_beside_them(engine):
    requests = [
        request(engine, question, adapter, max_tokens=8 + 3 * number)
        for number, (question, adapter) in enumerate(itertools.product(QUESTIONS, (None, "a", "b", "dora")))
    ]
    texts = together(engine, requests)
    assert texts == [answer(engine, each) for each in requests]
    assert len(set(texts[:4])) == 4, "each adapter answers differently"


def test_the_numbers_of_an_answer(engine):
    asked = request(engine, max_tokens=5)
    pieces = list(engine.stream(asked))
    assert [piece.generation_tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert [piece.finish_reason for piece in pieces] == [None] * 4 + ["length"]
    assert {piece.prompt_tokens for piece in pieces} == {len(asked.tokens)}
    assert engine.counts["completed"] == 1 and engine.counts["generation_tokens"] == 5
    assert engine.active == engine.queued == 0


def test_logprobs_are_those_of_the_model(engine, loaded):
    model, _, _ = loaded
    asked = request(engine)
    pieces = list(engine.stream(Request(asked.tokens, CONFIG, logprobs=3)))
    tokens = [*asked.tokens, *(piece.token for piece in pieces)]
    logits = model(mx.array([tokens]))[0, len(asked.tokens) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for piece, row in zip(pieces, expected, strict=True):
        found = piece.logprobs
        assert abs(found.logprob - row[found.token].item()) < 1e-4
        assert found.top[0][0] == found.token and len(found.top) == 3
        assert found.top[0][1] >= found.top[1][1] >= found.top[2][1]


def test_a_conversation_reuses_its_keys_and_values_by_adapter(engine):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    said = "".join(piece.text for piece in engine.stream(Request(engine.prompt(messages), CONFIG, "a")))
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": QUESTIONS[2]}]
    for adapter, reused in (("a", True), ("b", False), (None, False)):
        asked = Request(engine.prompt(messages), CONFIG, adapter)
        pieces = list(engine.stream(asked))
        assert (pieces[-1].cached_tokens > 0) == reused
        assert "".join(piece.text for piece in pieces) == answer(engine, asked)


def test_a_change_of_the_model_by_others_drops_what_was_kept(loaded):
    _, tokenizer, adapters = loaded
    model, _ = load(PATH)
    engine = Engine(model, tokenizer)
    answers = []
    for change in (lambda: None, lambda: mount(model, adapters["a"]), lambda: unmount(model)):
        change()
        pieces = list(engine.stream(request(engine)))
        assert pieces[-1].cached_tokens == 0
        answers.append("".join(piece.text for piece in pieces))
    assert answers[0] == answers[2] != answers[1]
    assert list(engine.stream(request(engine)))[-1].cached_tokens > 0
    mount(model, adapters["a"])
    fuse(model)
    assert list(engine.stream(request(engine)))[-1].cached_tokens == 0


def test_a_row_that_fails_ends_alone(engine):
    def broken(tokens, logits):
        raise ValueError("a grammar that fails")

    good, bad = request(engine), request(engine, QUESTIONS[1])
    expected, got = answer(engine, good), {0: [], 1: []}
    rows = [
        engine.submit(good, got[0].append),
        engine.submit(Request(bad.tokens, CONFIG, processors=[broken]), got[1].append),
    ]
    while not all(row.ended for row in rows):
        engine.step()
    assert isinstance(got[1][-1], ValueError)
    assert "".join(piece.text for piece in got[0]) == expected
    assert engine.counts["failed"] == 1


def test_a_batch_that_fails_is_computed_row_by_row(engine, monkeypatch):
    requests = [request(engine, question, "a") for question in QUESTIONS]
    expected, got = [answer(engine, each) for each in requests], [[] for _ in requests]
    rows = [engine.submit(each, got[n].append) for n, each in enumerate(requests)]
    for _ in range(6):
        engine.step()
    poison = rows[1]
    (lane,) = engine._lanes.values()
    failing = type(lane).next

    def fail_with_the_poisoned_row(self):
        if poison in self.rows.values():
            raise RuntimeError("out of memory")
        return failing(self)

    monkeypatch.setattr(type(lane), "next", fail_with_the_poisoned_row)
    while not all(row.ended for row in rows):
        engine.step()
    texts = ["".join(piece.text for piece in pieces if not isinstance(piece, Exception)) for pieces in got]
    assert (texts[0], texts[2]) == (expected[0], expected[2])
    assert isinstance(got[1][-1], RuntimeError) and expected[1].startswith(texts[1])
    assert engine.active == 0


def test_a_cancelled_row_frees_its_slot_at_the_next_step(engine):
    got = []
    endless = request(engine, max_tokens=500, logit_bias=dict.fromkeys(engine.tokenizer.eos_token_ids, -100))
    rows = [engine.submit(endless, got.append) for _ in range(9)]
    for _ in range(12):
        engine.step()
    assert engine.active == 8 and engine.queued == 1
    for row in rows[:8]:
        engine.cancel(row)
    engine.step()
    count = len(got)
    assert engine.active == 1 and engine.queued == 0
    engine.cancel(rows[8])
    engine.step()
    assert engine.active == 0 and len(got) <= count + 1 and not engine.step()
    assert not any(each.rows for each in engine.bank.listed())


def test_lanes_take_turns(engine):
    """An adapter that is served alone neither waits for the batch to end nor holds it up."""
    order = []
    requests = [request(engine, adapter=name, max_tokens=60) for name in ("a", "dora")]
    rows = [engine.submit(each, lambda piece, name=each.adapter: order.append(name)) for each in requests]
    engine.schedule.turn_seconds = 0.0
    while not all(row.ended for row in rows):
        engine.step()
    assert len([name for name, _ in itertools.groupby(order)]) > 10


def test_slots_go_to_the_adapter_that_has_fewest(loaded):
    model, tokenizer, adapters = loaded
    bank = AdapterBank(model)
    for name in ("a", "b"):
        bank.add(name, adapters[name])
    engine = Engine(model, tokenizer, bank, batch_size=2, prefill_batch_size=2)
    ended = []
    for number in range(6):
        adapter = "a" if number < 5 else "b"
        engine.submit(
            request(engine, adapter=adapter, max_tokens=4),
            lambda piece, adapter=adapter: ended.append(adapter) if piece.finish_reason else None,
        )
    while engine.step():
        pass
    assert "b" in ended[:2] and len(ended) == 6
    engine.close()


def test_what_cannot_be_done_is_refused_at_once(engine):
    ask = lambda **options: engine.submit(request(engine, **options), lambda piece: None)  # noqa: E731
    for options, text in (
        ({"top_k": 10**6, "temp": 1.0}, "top_k must be below"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"extra_eos_token": "<no such token>"}, "no token"),
        ({"draft_model": "x"}, "no draft model is loaded"),
    ):
        with pytest.raises(ConfigError, match=text):
            ask(**options)
    with pytest.raises(AdapterError, match="no adapter named 'nobody'"):
        ask(adapter="nobody")
    engine.memory_limit = 1
    with pytest.raises(TooLongError, match="need"):
        ask()


def test_a_full_queue_refuses_and_memory_admits(loaded):
    model, tokenizer, _ = loaded
    engine = Engine(model, tokenizer, batch_size=4, queue_size=3)
    asked = request(engine, max_tokens=6)
    need = engine._sizes.nbytes(len(asked.tokens) + 6)
    engine.memory_limit = 2 * need
    ended = []
    for _ in range(3):
        engine.submit(asked, lambda piece: ended.append(piece) if piece.finish_reason else None)
    with pytest.raises(BusyError):
        engine.submit(asked, ended.append)
    most = 0
    while engine.step():
        most = max(most, engine.active)
    assert most == 2 and len(ended) == 3
    engine.close()


def test_the_size_of_a_row_is_that_of_its_cache(engine, loaded):
    from mlx_lm.models.cache import make_prompt_cache

    model, _, _ = loaded
    cache = make_prompt_cache(model)
    model(mx.ones((1, 256), mx.int32), cache=cache)
    assert engine._sizes.nbytes(256) == sum(each.nbytes for each in cache)


# Options of generation.


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.9, "seed": 3},
        {"temp": 0.9, "seed": 3, "top_p": 0.5},
        {"temp": 0.9, "seed": 3, "min_p": 0.3, "min_tokens_to_keep": 2},
        {"temp": 0.9, "seed": 3, "top_k": 2},
        {"temp": 0.9, "seed": 3, "xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 30.0, "repetition_context_size": 40},
        {"presence_penalty": 5.0},
        {"frequency_penalty": 5.0, "frequency_context_size": 50},
        {"logit_bias": {"17": 100.0}},
        {"max_kv_size": 12},
        {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 3},
        {"prefill_response": "It was"},
    ],
    ids=str,
)
def test_an_option_gives_what_mlx_lm_gives_with_it(engine, loaded, options):
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    model, tokenizer, _ = loaded
    asked = request(engine, QUESTIONS[1], max_tokens=24, **options)
    beside = [request(engine, question, "a", max_tokens=24) for question in QUESTIONS]
    got = together(engine, [beside[0], asked, *beside[1:]])[1]
    sampling = {name: value for name, value in options.items() if name in ("temp", "top_p", "min_p", "top_k")}
    sampling |= {n: v for n, v in options.items() if n.startswith("xtc") or n == "min_tokens_to_keep"}
    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    penalties = {n: v for n, v in options.items() if "penalty" in n or "context_size" in n}
    bias = {int(token): value for token, value in options.get("logit_bias", {}).items()}
    engine.bank.choose([None])
    processors = make_logits_processors(bias or None, **penalties)
    if older_mlx_lm.is_used():  # its generate shows them the last token of the prompt alone
        before = mx.array(asked.tokens[:-1])
        processors = [lambda tokens, x, p=p: p(mx.concatenate([before, tokens]), x) for p in processors]
    mx.random.seed(options.get("seed", 0))
    pieces = stream_generate(
        model,
        tokenizer,
        list(asked.tokens),
        max_tokens=24,
        sampler=make_sampler(**sampling, xtc_special_tokens=special),
        logits_processors=processors,
        prompt_cache=new_cache(model, options.get("max_kv_size")),
        **{name: value for name, value in options.items() if name.startswith(("kv", "quantized"))},
    )
    assert got == "".join(piece.text for piece in pieces)
    plain = request(engine, QUESTIONS[1], max_tokens=24)
    if "kv_bits" not in options and "min_tokens_to_keep" not in options:
        assert got != answer(engine, plain), "the option changes nothing"


@pytest.mark.parametrize("single", [{"max_kv_size": 1000}, {"draft_model": "x"}], ids=str)
@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 30.0, "repetition_context_size": 40}, {"presence_penalty": 5.0}], ids=str
)
def test_penalties_see_the_whole_prompt_in_a_row_that_is_computed_alone(loaded, single, penalty):
    model, tokenizer, _ = loaded
    engine = Engine(model, tokenizer, draft_model=load(PATH)[0])
    batched = answer(engine, request(engine, QUESTIONS[1], max_tokens=24, **penalty))
    asked = request(engine, QUESTIONS[1], max_tokens=24, **penalty, **single)
    assert answer(engine, asked) == batched
    again = "".join(piece.text for piece in engine.stream(asked))  # from the keys and values that were kept
    assert again == batched != answer(engine, request(engine, QUESTIONS[1], max_tokens=24))


def test_drafted_tokens_change_nothing_but_the_speed(loaded):
    model, tokenizer, _ = loaded
    engine = Engine(model, tokenizer, draft_model=load(PATH)[0])
    plain = request(engine, max_tokens=20)
    drafted = request(engine, max_tokens=20, draft_model="x", num_draft_tokens=2)
    assert answer(engine, drafted) == answer(engine, plain)


def test_stop_words_end_the_text_before_them(engine):
    whole = answer(engine, request(engine, max_tokens=40))
    word = whole[7:12]
    pieces = list(engine.stream(request(engine, max_tokens=40, stop=[word, "never said"])))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(word)]
    assert pieces[-1].finish_reason == "stop" and pieces[-1].stop_word == word


def test_an_extra_eos_token_ends_the_answer(engine):
    pieces = list(engine.stream(request(engine, max_tokens=20)))
    token = pieces[5].token
    at = next(number for number, piece in enumerate(pieces) if piece.token == token)
    ended = list(engine.stream(request(engine, max_tokens=20, extra_eos_token=str(token))))
    assert len(ended) == at + 1 and ended[-1].finish_reason == "stop"


def test_variables_reach_the_chat_template(engine, loaded):
    _, tokenizer, _ = loaded
    changed = copy.copy(tokenizer)
    object.__setattr__(changed, "_tokenizer", copy.deepcopy(tokenizer._tokenizer))
    changed._tokenizer.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    loud = Engine(engine.model, changed)
    messages = [{"role": "user", "content": "Hi"}]
    config = GenerateConfig(chat_template_config={"loud": True})
    assert changed.decode(loud.prompt(messages, config=config)) == "Hi!"
    assert changed.decode(loud.prompt(messages)) == "Hi"
