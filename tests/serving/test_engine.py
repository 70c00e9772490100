"""The engine reuses its prompt cache only while the same adapter is on the model."""

from __future__ import annotations

import pytest

from conftest import shake
from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, fuse, load, mount, unmount
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.tiny_base import PATH

CONFIG = GenerateConfig(max_tokens=8)


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(PATH)
    adapters = []
    for seed in (1, 2):
        attach(model, AdapterConfig(rank=4, num_layers=-1))
        shake(model, seed, size=0.3)
        adapters.append(extract(model))
        unmount(model)
    return model, tokenizer, adapters


def answer(engine: Engine, tokens: list[int]) -> str:
    return "".join(piece.text for piece in engine.stream(tokens, CONFIG))


def test_a_mount_behind_the_engines_back_ends_its_cache(loaded):
    model, tokenizer, (one, two) = loaded
    engine = Engine(model, tokenizer)
    tokens = engine.prompt([{"role": "user", "content": "A red umbrella was found on a bench."}])
    answers = []
    for adapter in (None, one, two, None):
        unmount(model) if adapter is None else mount(model, adapter)
        answers.append(answer(engine, tokens))
        assert answers[-1] == answer(Engine(model, tokenizer), tokens)
        assert engine._cache_for([*tokens, 1])[1] >= len(tokens), "an unchanged model keeps the cache"
    assert answers[0] == answers[3] and len(set(answers)) == 3


def test_a_mount_during_an_answer_ends_the_cache(loaded):
    model, tokenizer, (one, _) = loaded
    engine = Engine(model, tokenizer, AdapterBank(model))
    tokens = engine.prompt([{"role": "user", "content": "A red umbrella."}])
    pieces = engine.stream(tokens, CONFIG)
    next(pieces)
    mount(model, one)
    list(pieces)
    unmount(model)
    assert engine._cache_for([*tokens, 1])[1] == 0, "some of the answer was computed with the adapter"


def test_fusing_ends_the_cache(loaded):
    _, tokenizer, (one, _) = loaded
    model, _ = load(PATH)
    engine = Engine(model, tokenizer)
    tokens = engine.prompt([{"role": "user", "content": "A red umbrella was found on a bench."}])
    answer(engine, tokens)
    mount(model, one)
    fuse(model)
    assert engine._cache_for([*tokens, 1])[1] == 0, "the cache is of the model before its weights changed"
