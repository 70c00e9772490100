"""Rows that join a batch at different times, caches that rotate, bases that are quantized; bounds of the engine.

The greedy answers of all equal those of one at a time.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from model_families import tiny_model
from test_engine_families import Tokenizer

from conftest import make_model, shake
from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, unmount
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Request

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
# How to make a model, and the adapters' configs. Sliding windows are 8 tokens long here, and all rows pass them.
MODELS = {
    "llama": (make_model, [{"rank": 2}, {"rank": 11}, {"rank": 3, "method": "dora"}]),
    "llama in 4 bits": (
        lambda: make_model(quantize={"bits": 4, "group_size": 32}),
        [{"rank": 2}, {"rank": 11}, {"rank": 3, "num_layers": 1}],
    ),
    "gemma3 with a window": (lambda: tiny_model("gemma3_text"), [{"rank": 2}, {"rank": 11, "keys": ATTENTION}]),
    "gpt_oss with a window": (lambda: tiny_model("gpt_oss"), [{"rank": 2, "keys": ATTENTION}, {"rank": 5}]),
    "qwen3_moe": (lambda: tiny_model("qwen3_moe"), [{"rank": 2, "keys": ATTENTION}, {"rank": 6}]),  # 2nd: experts too
    "lfm2": (lambda: tiny_model("lfm2"), [{"rank": 2}, {"rank": 6}]),
}


def engine_of(model, configs: list[dict], **options) -> Engine:
    bank = AdapterBank(model)
    for seed, config in enumerate(configs):
        mx.random.seed(seed)
        attach(model, AdapterConfig(**{"num_layers": -1, **config}))
        shake(model, seed, size=0.3)
        bank.add(f"a{seed}", extract(model))
        unmount(model)
    return Engine(model, Tokenizer(), bank, **{"batch_size": 4, "prefill_step_size": 5, **options})


def tokens(length: int, seed: int = 1) -> list[int]:
    return [7 + (3 * seed * k) % 50 for k in range(length)]


def run(engine, requests: list[Request], apart: int = 0) -> list[str]:
    """Their answers, where each comes ``apart`` steps after the one before."""
    texts, rows = [""] * len(requests), []

    def deliver(number):
        def add(piece):
            assert not isinstance(piece, Exception), piece
            texts[number] += piece.text

        return add

    for number, request in enumerate(requests):
        rows.append(engine.submit(request, deliver(number)))
        for _ in range(apart):
            engine.step()
    while not all(row.ended for row in rows):
        engine.step()
    return texts


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_join_at_different_times_answer_as_alone(kind):
    make, configs = MODELS[kind]
    engine = engine_of(make().eval(), configs)
    names = [None, *(f"a{number}" for number in range(len(configs)))]
    requests = [
        Request(tokens(2 + 5 * number, number + 1), GenerateConfig(max_tokens=10 + number), names[number % len(names)])
        for number in range(5)
    ]
    alone = []
    for request in requests:
        engine.prompt_cache.trim_to(n_sequences=0)
        alone += run(engine, [request])
    engine.prompt_cache.trim_to(n_sequences=0)
    assert run(engine, requests, apart=2) == alone and len(set(alone)) == len(alone)
    assert run(engine, requests) == alone, "from kept keys and values, all at once"
    engine.close()


@pytest.fixture(scope="module")
def small():
    return make_model(num_hidden_layers=1, hidden_size=32), [{"rank": 2}, {"rank": 2}, {"method": "dora", "rank": 2}]


@pytest.mark.parametrize(
    "flood", [{"adapter": "a0"}, {"adapter": "a2"}, {"config": {"kv_bits": 8, "kv_group_size": 32}}], ids=str
)
def test_a_flood_holds_up_another_adapter_for_a_bounded_number_of_steps(small, flood):
    """Rows of 10 tokens in 2 places: the one that waits starts once a place is free and its turn comes."""
    engine = engine_of(*small, batch_size=2, turn_seconds=0.0)
    config = GenerateConfig(max_tokens=10, **flood.get("config", {}))
    flooding = [engine.submit(Request(tokens(4), config, flood.get("adapter")), lambda piece: None) for _ in range(40)]
    for _ in range(7):
        engine.step()
    got = []
    engine.submit(Request(tokens(6), GenerateConfig(max_tokens=3), "a1"), got.append)
    steps = 0
    while not got:
        engine.step()
        steps += 1
        assert steps < 60
    assert sum(not row.ended for row in flooding) > 30
    engine.close()


def test_a_lane_that_cannot_be_admitted_takes_no_turns(small):
    engine = engine_of(*small, batch_size=1, turn_seconds=0.0)
    got = []
    for adapter in ("a0", "a2", "a0", "a2"):
        engine.submit(Request(tokens(4), GenerateConfig(max_tokens=8), adapter), got.append)
    steps = 0
    while engine.step():
        steps += 1
    assert len(got) == 32 and steps <= 32 + 4 * 3, "a step without a token only reads a prompt"
    engine.close()


def test_a_request_is_cancelled_while_its_prompt_is_read(small):
    engine = engine_of(*small, prefill_step_size=2)
    got = []
    row = engine.submit(Request(tokens(200), GenerateConfig(max_tokens=50), "a0"), got.append)
    for _ in range(3):
        engine.step()
    assert engine.active == 1 and not got
    engine.cancel(row)
    engine.step()
    assert engine.active == 0 and row.ended and not got and not any(each.rows for each in engine.bank.listed())
    engine.close()


def test_a_taker_that_raises_ends_its_row_alone(small):
    engine = engine_of(*small)
    asked = Request(tokens(6), GenerateConfig(max_tokens=8), "a0")
    expected, texts = run(engine, [asked]), [""]

    def broken(piece):
        raise RuntimeError("the loop is closed")

    def add(piece):
        texts[0] += piece.text

    rows = [engine.submit(asked, broken), engine.submit(asked, add)]
    while not all(row.ended for row in rows):
        engine.step()
    assert texts == expected and engine.counts["failed"] == 1 and not any(each.rows for each in engine.bank.listed())
    engine.close()


def test_kept_prompts_stay_within_their_bytes_and_give_way_to_rows(small):
    model, configs = small
    engine = engine_of(model, configs, prompt_cache_size=100)
    size = engine._sizes.nbytes(256)
    engine = engine_of(model, configs, prompt_cache_size=100, prompt_cache_bytes=3 * size, memory_limit=6 * size)
    most = 0
    for number in range(12):
        run(engine, [Request(tokens(60, number + 1), GenerateConfig(max_tokens=4), f"a{number % 3}")])
        most = max(most, engine.prompt_cache.nbytes)
    assert size < most <= 3 * size and len(engine.prompt_cache) >= 3
    run(engine, [Request(tokens(40, 50 + n), GenerateConfig(max_tokens=200)) for n in range(5)])
    assert engine.prompt_cache.nbytes <= 3 * size
    engine.close()


def test_kept_prompts_of_an_adapter_that_is_gone_are_dropped(small):
    model, configs = small
    engine = engine_of(model, configs)
    for name in (None, "a0", "a1", "a2"):
        run(engine, [Request(tokens(30), GenerateConfig(max_tokens=4), name)])
    before, each = engine.prompt_cache.nbytes, len(engine.prompt_cache)
    engine.bank.unload("a0")
    row = engine.submit(Request(tokens(30), GenerateConfig(max_tokens=4), "a1"), lambda piece: None)
    engine.bank.unload("a1")  # while a row uses it: nothing is kept for it when it ends
    while not row.ended:
        engine.step()
    assert len(engine.prompt_cache) == each - 2 and engine.prompt_cache.nbytes == before // 2
    for name, cached in ((None, True), ("a2", True)):
        pieces = list(engine.stream(Request(tokens(30), GenerateConfig(max_tokens=4), name)))
        assert (pieces[-1].cached_tokens > 0) == cached
    engine.close()


def test_the_kept_prompts_of_the_adapter_that_was_used_longest_ago_are_dropped_first(small):
    engine = engine_of(*small, prompt_cache_size=3)
    config = GenerateConfig(max_tokens=4)
    cached = lambda name: list(engine.stream(Request(tokens(30), config, name)))[-1].cached_tokens > 0  # noqa: E731
    assert [cached(name) for name in ("a0", "a1", None, "a0", "a2")] == [False, False, False, True, False]
    assert len(engine.prompt_cache) == 3 and [cached(name) for name in ("a0", None, "a2", "a1")] == [True] * 3 + [False]
    engine.close()
