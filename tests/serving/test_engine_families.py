"""Greedy answers of a batch with an adapter a row equal those of one row at a time, for several kinds of models.

A batched product may differ in the last bit from that of one row; the tokens here do not depend on it.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from model_families import families, tiny_model

from conftest import shake
from mlx_lora import AdapterConfig, GenerateConfig, attach, extract, unmount
from mlx_lora.base.batching import why_not_batched
from mlx_lora.config import ServeConfig
from mlx_lora.serving.bank import AdapterBank
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.requests import Request

# Plain attention, sliding windows (rotating caches), a mixture of experts, recurrent layers (caches that cannot be
# shortened), and two that mlx-lm batches wrongly.
FAMILIES = ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss", "qwen3_5", "gemma2", "mamba"]


class Detokenizer:
    """Writes each token as its number."""

    def __init__(self):
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = f"{token} "

    def finalize(self) -> None:
        self.last_segment = ""


class Tokenizer:
    """What the engine needs of a tokenizer for prompts that are tokens already."""

    eos_token_ids = (64,)  # beyond the vocabulary
    chat_template = None

    @property
    def detokenizer(self) -> Detokenizer:
        return Detokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_its_rows_alone(family):
    model = tiny_model(family)
    model.eval()
    bank = AdapterBank(model)
    for seed, config in enumerate(({"rank": 2}, {"rank": 4}, {"method": "dora", "rank": 3})):
        attach(model, AdapterConfig(num_layers=-1, **config))
        shake(model, seed, size=0.3)
        bank.add(f"a{seed}", extract(model))
        unmount(model)
    engine = Engine(model, Tokenizer(), bank, batch_size=5, prefill_batch_size=2, prefill_step_size=8)
    requests = [
        Request([7 + (3 * n * k) % 50 for k in range(3 + 4 * n)], GenerateConfig(max_tokens=6 + 2 * n), adapter)
        for n, adapter in enumerate((None, "a0", "a1", "a2"))
    ]
    texts = [""] * len(requests)
    for number, piece in engine.stream_all(requests):
        texts[number] += piece.text
    for request, text in zip(requests, texts, strict=True):
        engine.prompt_cache.trim_to(n_sequences=0)
        alone = "".join(piece.text for piece in engine.stream(request))
        assert text == alone and len(text.split()) >= 1
        again = list(engine.stream(request))  # from the keys and values that were kept
        assert "".join(piece.text for piece in again) == text
        assert again[-1].cached_tokens > 0 or family == "mamba"
    engine.close()


@pytest.mark.parametrize("family", sorted(families()))
def test_padding_changes_nothing_in_the_families_that_are_batched(family):
    from mlx_lm.generate import BatchGenerator

    model = tiny_model(family)
    model.eval()
    prompts = [[7 + (3 * n * k) % 50 for k in range(3 + 4 * n)] for n in range(3)]

    def logprobs(prompts: list[list[int]]) -> list[mx.array]:
        generator = BatchGenerator(model, max_tokens=3, prefill_batch_size=2, prefill_step_size=8)
        found = {uid: [] for uid in generator.insert(prompts)}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.logprobs)
        return [mx.stack(rows) for rows in found.values()]

    try:
        alone, batched = [logprobs([prompt])[0] for prompt in prompts], logprobs(prompts)
        same = all(mx.allclose(a, b, atol=1e-3).item() for a, b in zip(alone, batched, strict=True))
    except ValueError:
        same = False
    assert same == (why_not_batched(model) is None)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_serve_says_that_a_model_is_not_batched(family, monkeypatch, capsys):
    from mlx_lora.cli import serve

    monkeypatch.setattr("mlx_lora.model.loading.load", lambda *_, **__: (tiny_model(family), Tokenizer()))
    params = dict(model="x/tiny", adapters=[], merge=False, trust_remote_code=False, adapters_dir=None, pin=[])
    serve._engine(params, ServeConfig(), GenerateConfig())[0].close()
    assert ("one request at a time: padding" in capsys.readouterr().err) == (family == "mamba")
