"""Which generation options contradict each other or say nothing, and how the parts of an answer are told apart."""

from __future__ import annotations

import pytest

from mlx_lora.config import GenerateConfig, ServeConfig
from mlx_lora.errors import ConfigError
from mlx_lora.serving.text import AnswerText, StopWords


@pytest.mark.parametrize(
    "options, text",
    [
        ({"top_p": 0.5}, "top_p has no effect"),
        ({"temp": -1}, "temp must be"),
        ({"temp": 1.0, "min_tokens_to_keep": 3}, "needs min_p"),
        ({"temp": 1.0, "xtc_threshold": 0.2}, "needs xtc_probability"),
        ({"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.9}, "xtc_threshold must be in"),
        ({"repetition_context_size": 5}, "needs repetition_penalty"),
        ({"kv_group_size": 32}, "needs kv_bits"),
        ({"kv_bits": 7}, "kv_bits must be"),
        ({"kv_bits": 4, "draft_model": "x"}, "contradict"),
        ({"num_draft_tokens": 5}, "needs draft_model"),
        ({"stop": [""]}, "stop must be"),
        ({"chat_template_config": {"tokenize": False}}, "cannot set tokenize"),
        ({"prefill_response": ""}, "prefill_response is empty"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be"),
        ({"logit_bias": [1]}, "logit_bias must be"),
        ({"max_tokens": 0, "max_kv_size": 0}, "max_kv_size"),
        ({"max_tokens": True}, "max_tokens must be"),
    ],
    ids=str,
)
def test_options_that_say_nothing_or_contradict(options, text):
    with pytest.raises(ConfigError, match=text):
        GenerateConfig(**options)


def test_texts_and_biases_are_taken_in_their_usual_forms():
    config = GenerateConfig(stop="END", extra_eos_token=["<x>"], logit_bias={"5": 1, 7: -2})
    assert config.stop == ("END",) and config.extra_eos_token == ("<x>",)
    assert config.logit_bias == {5: 1.0, 7: -2.0}


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_words_over_the_edges_of_pieces(size):
    text, words = "one two END three STOP", ("END", "STOP", "two x")
    found, stop = "", StopWords(words)
    for at in range(0, len(text), size):
        found += stop.feed(text[at : at + size])
        if stop.found:
            break
    assert found == "one two " and stop.found == "END"
    stop = StopWords(words)
    assert "".join(stop.feed(char) for char in "a STO") + stop.finish() == "a STO"


class Tokenizer:
    """A tokenizer of characters, which marks reasoning and tool calls."""

    has_thinking = has_tool_calling = True
    think_start, think_end = "<think>", "</think>"
    tool_call_start, tool_call_end = "<call>", "</call>"
    structural_markers, response_transitions, eos_token_ids = (), {}, ()

    @property
    def detokenizer(self):
        class Detokenizer:
            last_segment = ""

            def add_token(self, token):
                self.last_segment = chr(token)

            def finalize(self):
                self.last_segment = ""

        return Detokenizer()


def test_the_parts_of_an_answer():
    answer, parts = AnswerText(Tokenizer(), ["STOP"], parts=True), []
    for char in "<think>why</think>so<call>a</call><call>b</call> end STOP never":
        parts += answer.add(ord(char))
        if answer.stopped_at:
            break
    parts += answer.finish()
    joined: list[list[str]] = []
    for kind, text in parts:
        if not joined or joined[-1][0] != kind:
            joined.append([kind, ""])
        joined[-1][1] += text
    assert [pair for pair in joined if pair[1]] == [
        ["reasoning", "why"],
        ["normal", "so"],
        ["tool", "a"],
        ["tool", "b"],
        ["normal", " end "],
    ]


@pytest.mark.parametrize(
    "options", [{"port": 99999}, {"api_key": "short"}, {"allow_origin": "*"}, {"batch_size": 0}, {"request_timeout": 0}]
)
def test_settings_of_the_server(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServeConfig(**options)


def test_serve_sets_the_keys_and_values_of_all_requests_and_the_sampling_of_those_that_say_nothing(monkeypatch):
    pytest.importorskip("fastapi")
    import mlx_lora.serving.server.run as server_run
    from mlx_lora.cli.serve import serve, start
    from mlx_lora.serving.server.openai_requests import ChatCompletion
    from mlx_lora.tiny_base import PATH

    made = []
    monkeypatch.setattr(server_run, "serve", lambda server, ready: made.append(server))
    options = ["--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "7", "--prompt-cache-bytes", "12345"]
    options += ["--extra-eos-token", "3", "--temp", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1"]
    start(serve.make_context("serve", ["--model", str(PATH), *options]).params)
    (server,) = made
    body = {"messages": [{"role": "user", "content": "x"}]}
    config = server.generation(**ChatCompletion(**body).options())
    assert (config.temp, config.top_p, config.top_k, config.min_p) == (0.5, 0.9, 5, 0.1)
    assert config.extra_eos_token == ("3",)
    config = server.generation(**ChatCompletion(**body, temperature=2.0, top_k=3, stop_token_ids=[5]).options())
    assert config.extra_eos_token == ("3", "5")
    assert (config.temp, config.top_p, config.top_k, config.min_p) == (2.0, 0.9, 3, 0.1)
    assert server.page_temp == 0.5
    config = server.generation(temp=0.0)
    assert (config.kv_bits, config.kv_group_size, config.quantized_kv_start) == (4, 32, 7)
    assert server.engine.prompt_cache.max_bytes == 12345
