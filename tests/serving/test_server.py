"""The server through the official clients of OpenAI and Anthropic, and as an attacker would use it."""

from __future__ import annotations

import json
import socket
import time

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("fastapi")

from serving_helpers import make_adapters, running  # noqa: E402

from mlx_lora.config import GenerateConfig  # noqa: E402
from mlx_lora.serving.requests import Request  # noqa: E402

ASK = [{"role": "user", "content": "A red umbrella was found on a bench."}]
ENDLESS = {"2": -100, "0": -100, "1": -100}  # the biases of the tokens that end an answer


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder, ("pirate", "lawyer", "dora"))
    return folder


@pytest.fixture(scope="module")
def server(adapters):
    with running(adapters, body_limit=100_000, queue_size=8, max_tokens_limit=2000) as (url, server):
        yield url, server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server):
    return anthropic.Anthropic(base_url=server[0], api_key="none", max_retries=0)


def direct(server, adapter: str | None, max_tokens: int = 12) -> str:
    """The greedy answer of the engine itself."""
    engine = server[1].engine
    got, config = [], GenerateConfig(max_tokens=max_tokens)
    row = engine.submit(Request(engine.prompt(ASK), config, adapter), got.append)
    while not row.ended:
        time.sleep(0.01)
    return "".join(piece.text for piece in got)


def test_chat_completions(server, client):
    assert {"tiny", "pirate", "lawyer", "dora"} == {model.id for model in client.models.list()}
    answers = {}
    for name in ("tiny", "base", "pirate", "tiny:lawyer", "dora"):
        made = client.chat.completions.create(model=name, messages=ASK, max_tokens=12, temperature=0)
        answers[name] = made.choices[0].message.content
        assert made.model == name and made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        assert answers[name] == direct(server, {"tiny": None, "base": None, "tiny:lawyer": "lawyer"}.get(name, name))
    assert len(set(answers.values())) == 4


def test_streaming_gives_the_same_text_and_usage(client):
    options = dict(model="pirate", messages=ASK, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_options_of_chat_completions(client):
    ask = lambda **options: client.chat.completions.create(  # noqa: E731
        **{"model": "tiny", "messages": ASK, "max_tokens": 16, "temperature": 0, **options}
    )
    text = ask().choices[0].message.content
    word = text[4:8]
    stopped = ask(stop=[word]).choices[0]
    assert stopped.message.content == text[: text.index(word)] and stopped.finish_reason == "stop"
    assert ask(logit_bias={"17": 100}, max_tokens=3).choices[0].message.content != text
    one, two = (ask(temperature=1, seed=7, n=2).choices for _ in range(2))
    assert [c.message.content for c in one] == [c.message.content for c in two]
    assert one[0].message.content != one[1].message.content
    content = ask(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4 and all(len(each.top_logprobs) == 3 for each in content)
    assert "".join(each.token for each in content) == ask(max_tokens=4).choices[0].message.content
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    found = json.loads(ask(response_format=wanted, max_tokens=40).choices[0].message.content)
    assert set(found) == {"n"} and 0 <= found["n"] <= 9


def test_completions(client):
    made = client.completions.create(
        model="lawyer", prompt=["Once upon", "There was"], max_tokens=6, temperature=0, logprobs=2, n=1
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) == 6 for choice in made.choices)
    chunks = client.completions.create(model="lawyer", prompt="Once upon", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == made.choices[0].text


def test_responses(client):
    options = dict(model="tiny", input="Hi", max_output_tokens=40, temperature=0)
    whole = client.responses.create(**options, instructions="Be kind.")
    with client.responses.stream(**options, instructions="Be kind.") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == whole.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    cut = client.responses.create(**{**options, "max_output_tokens": 3})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    history = [{"role": "user", "content": [{"type": "input_text", "text": "A red umbrella."}]}]
    assert client.responses.create(**{**options, "input": history}).output_text


def test_anthropics_messages(claude):
    options = dict(model="pirate", messages=ASK, max_tokens=12, system="Be kind.", extra_body={"temperature": 0})
    whole = claude.messages.create(**options)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 12
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    word = whole.content[0].text[3:7]
    stopped = claude.messages.create(**options, stop_sequences=[word])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word
    assert claude.messages.count_tokens(model="tiny", messages=ASK).input_tokens > 5
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**options, "model": "nobody"})


def test_what_is_wrong_is_said_and_nothing_inside_is_shown(server):
    url, _ = server
    chat = {"model": "tiny", "messages": ASK}
    for body, status, text in (
        ({**chat, "model": "nobody"}, 404, "Known: tiny"),
        ({**chat, "adapters": "/etc"}, 400, "adapters"),
        ({**chat, "max_tokens": 0, "top_p": 3}, 400, "top_p"),
        ({**chat, "messages": []}, 400, "messages"),
        ({**chat, "messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
        ({**chat, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text content"),
        ({**chat, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({**chat, "response_format": {"type": "xml"}}, 400, "xml"),
        ({**chat, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, 400, "schema"),
        ({**chat, "chat_template_kwargs": {"tokenize": False}}, 400, "tokenize"),
        ({**chat, "top_logprobs": 2}, 400, "logprobs"),
        ([], 400, "body"),
    ):
        for stream in (False, True):
            body = {**body, "stream": stream} if isinstance(body, dict) else body
            got = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert got.status_code == status, (body, got.text)
            error = got.json()["error"]["message"]
            assert text in error and "Traceback" not in got.text and "/mlx_lora" not in got.text
    assert httpx.get(f"{url}/nowhere").status_code == 404
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
    assert (
        httpx.post(f"{url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )


def test_a_prompt_longer_than_the_context_is_refused_and_one_that_fits_is_answered(client, claude):
    said = lambda count: client.completions.create(model="pirate", prompt=[7] * count, max_tokens=2)  # noqa: E731
    assert said(511).usage.prompt_tokens == 511
    with pytest.raises(
        openai.APIStatusError,
        match="prompt is too long: it has 512 tokens, and the model's maximum context length is 512",
    ) as found:
        said(512)
    assert (found.value.status_code, found.value.code) == (400, "context_length_exceeded")
    ask = [{"role": "user", "content": "x " * 600}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model="tiny", messages=ask, max_tokens=2)
    assert claude.messages.count_tokens(model="tiny", messages=ask).input_tokens > 512


BOOKKEEPING = {
    "user": "u",
    "metadata": {"chat": {"id": 1}},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prediction": {"type": "content", "content": "x"},
    "chat_id": "c",
    "id": "m",
    "session_id": "s",
    "background_tasks": {"title_generation": True},
    "features": {"web_search": False},
    "cache_prompt": False,
    "id_slot": -1,
    "priority": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}


def test_bookkeeping_changes_no_answer(client):
    chat = dict(model="pirate", messages=ASK, max_tokens=8, temperature=0)
    made = [client.chat.completions.create(**chat, extra_body=body).choices[0] for body in ({}, BOOKKEEPING)]
    assert made[0].message == made[1].message
    text = dict(model="pirate", prompt="Once upon", max_tokens=8, temperature=0)
    made = [client.completions.create(**text, extra_body=body).choices[0] for body in ({}, BOOKKEEPING)]
    assert made[0].text == made[1].text
    answer = dict(model="pirate", input="Hi", max_output_tokens=8, temperature=0)
    made = [client.responses.create(**answer, extra_body=body).output_text for body in ({}, BOOKKEEPING)]
    assert made[0] == made[1]


def test_what_changes_the_answer_and_cannot_be_done_is_an_error(server):
    url, _ = server
    chat = {"model": "tiny", "messages": ASK}
    schema = {"type": "json_object", "schema": {"const": 1}}
    for field, value in (
        ("samplers", ["top_k"]),
        ("n_predict", 5),
        ("guided_regex", "a+"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("params", {"temperature": 1}),
        ("lora", [{"id": 0, "scale": 0.5}]),
        ("lora", [{"id": 99, "scale": 1}]),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("stop_token_ids", [10**6]),
    ):
        got = httpx.post(f"{url}/v1/chat/completions", json={**chat, field: value})
        assert got.status_code == 400 and field in got.json()["error"]["message"], (field, got.text)
        assert field != "n_predict" or "use max_tokens" in got.text
    got = httpx.post(f"{url}/v1/chat/completions", json={**chat, "min_tokens": 2, "response_format": schema})
    assert got.status_code == 400 and "min_tokens" in got.text
    for field, value in (("suffix", "end"), ("best_of", 3), ("echo", True)):
        body = {"model": "tiny", "prompt": "Once", "logprobs": 1, field: value}
        got = httpx.post(f"{url}/v1/completions", json=body)
        assert got.status_code == 400 and field in got.text


def test_tokens_that_end_an_answer(client):
    def ask(**extra):
        options = dict(model="tiny", prompt="Once upon", max_tokens=12, temperature=0, logprobs=1)
        choice = client.completions.create(**options, extra_body=extra).choices[0]
        return choice.finish_reason, len(choice.logprobs.tokens)

    end = {"2": 100}  # the token that ends an answer
    assert ask(logit_bias=end) == ("stop", 1)
    assert ask(logit_bias=end, min_tokens=5) == ("stop", 6)
    assert ask(logit_bias=end, ignore_eos=True) == ("length", 12)
    word = {"17": 100}
    assert ask(logit_bias=word, stop_token_ids=[17]) == ("stop", 1)
    assert ask(logit_bias=word, stop_token_ids=[17], min_tokens=3) == ("stop", 4)
    assert ask(logit_bias=word, stop_token_ids=[17], ignore_eos=True) == ("stop", 1)


def test_llamacpps_choice_of_an_adapter(server, client):
    url, _ = server
    ids = {each["name"]: each["id"] for each in httpx.get(f"{url}/lora-adapters").json()}

    def ask(**extra):
        return (
            client.completions.create(
                **{"model": "tiny", "prompt": "Once upon", "max_tokens": 8, "temperature": 0, **extra}
            )
            .choices[0]
            .text
        )

    pirate = [{"id": ids["pirate"], "scale": 1.0}, {"id": ids["lawyer"], "scale": 0}]
    assert ask(extra_body={"lora": pirate}) == ask(model="pirate") != ask()
    assert ask(extra_body={"lora": [{"id": ids["pirate"], "scale": 0.0}]}) == ask()
    with pytest.raises(openai.BadRequestError, match="lawyer"):
        ask(model="lawyer", extra_body={"lora": pirate})


def test_without_a_model_the_base_answers(server, client):
    url, _ = server
    for path, body in (
        ("chat/completions", {"messages": ASK, "max_tokens": 6, "temperature": 0}),
        ("completions", {"prompt": "Once", "max_tokens": 6}),
        ("responses", {"input": "Hi", "max_output_tokens": 6}),
        ("messages", {"messages": ASK, "max_tokens": 6}),
    ):
        got = httpx.post(f"{url}/v1/{path}", json=body)
        assert got.status_code == 200 and got.json()["model"] == "tiny", got.text
    assert httpx.get(f"{url}/v1/models/tiny").json()["id"] == "tiny"


def test_an_answer_that_has_begun_is_continued(server, client, claude):
    engine, begun = server[1].engine, "The umbrella"
    expected = []
    config = GenerateConfig(max_tokens=8, prefill_response=begun)
    row = engine.submit(Request(engine.prompt(ASK, None, config), config), expected.append)
    while not row.ended:
        time.sleep(0.01)
    text = "".join(piece.text for piece in expected)
    messages = [*ASK, {"role": "assistant", "content": begun}]
    options = dict(model="tiny", messages=messages, max_tokens=8)
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    made = client.chat.completions.create(**options, temperature=0, extra_body=extra)
    assert made.choices[0].message.content == text
    made = claude.messages.create(**options, extra_body={"temperature": 0})
    assert made.content[0].text == text
    assert client.chat.completions.create(**options, temperature=0).choices[0].message.content != text


def test_echo_and_log_probabilities_of_completions(client):
    options = dict(model="tiny", max_tokens=4, temperature=0)
    texts = ["Once upon", "There was"]
    plain = client.completions.create(**options, prompt=texts, logprobs=0).choices
    echoed = client.completions.create(**options, prompt=texts, echo=True).choices
    assert [choice.text for choice in echoed] == [t + choice.text for t, choice in zip(texts, plain, strict=True)]
    found = plain[0].logprobs
    assert [list(each) for each in found.top_logprobs] == [[token] for token in found.tokens]
    chunks = list(client.completions.create(**options, prompt=texts[0], logprobs=0, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices and chunk.choices[0].logprobs]
    assert [each.text_offset[0] for each in told] == found.text_offset
    chunks = client.completions.create(**options, prompt=texts[0], echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed[0].text


def test_small_things_that_other_servers_have(server, client, claude):
    url, _ = server
    body = {"messages": ASK, "max_tokens": 4, "temperature": 0}
    text = client.chat.completions.create(model="tiny", **body).choices[0].message.content
    assert httpx.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]["content"] == text
    assert httpx.get(f"{url}/models").json() == httpx.get(f"{url}/v1/models").json()
    numbers = {
        client.chat.completions.create(model="tiny", **body)._request_id,
        claude.messages.create(model="tiny", messages=ASK, max_tokens=4)._request_id,
    }
    assert len(numbers) == 2 and None not in numbers
    refused = [*ASK, {"role": "assistant", "content": None, "refusal": "I cannot."}, *ASK]
    said = [*ASK, {"role": "assistant", "content": "I cannot."}, *ASK]
    one, two = (client.chat.completions.create(model="tiny", **{**body, "messages": m}) for m in (refused, said))
    assert one.usage.prompt_tokens == two.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="previous_response_id: is not supported; leave it out"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")


def test_usage_in_every_event(client):
    usage = {"include_usage": True, "continuous_usage_stats": True}
    options = dict(model="tiny", max_tokens=5, temperature=0, stream=True, stream_options=usage)
    for chunks in (
        list(client.chat.completions.create(messages=ASK, **options)),
        list(client.completions.create(prompt="Once upon", **options)),
    ):
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 5 and chunks[-1].choices == []


def test_a_schema_beside_json_object_is_followed(client):
    wanted = {"type": "json_object", "schema": {"const": "42"}}
    made = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, response_format=wanted)
    assert made.choices[0].message.content == '"42"'


def test_a_client_that_leaves_frees_its_slot(server):
    url, state = server
    body = {"model": "tiny", "messages": ASK, "max_tokens": 1900, "logit_bias": ENDLESS, "stream": True}
    for stream in (True, False):
        request = json.dumps({**body, "stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
            line.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
            _until(lambda: state.engine.active == 1)
        _until(lambda: state.engine.active == 0 and state.engine.queued == 0)


def test_a_full_queue_says_when_to_come_back(adapters):
    with running(adapters, batch_size=1, queue_size=2) as (url, state):
        engine, body = state.engine, {"model": "pirate", "messages": ASK, "max_tokens": 4}
        config = GenerateConfig(max_tokens=3000, logit_bias=ENDLESS)
        rows = [engine.submit(Request(engine.prompt(ASK), config), lambda _: None)]
        _until(lambda: engine.active == 1)
        rows += [engine.submit(Request(engine.prompt(ASK), config), lambda _: None) for _ in range(2)]
        got = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert got.status_code == 429 and got.headers["retry-after"] == "1"
        for row in rows:
            engine.cancel(row)
        _until(lambda: engine.queued == 0)
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def test_a_dead_thread_shows_in_health(adapters):
    with running(adapters) as (url, state):
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "active": 0, "queued": 0}
        assert "mlx_lora_worker_alive 1.0" in httpx.get(f"{url}/metrics").text
        state.worker.stop()
        assert httpx.get(f"{url}/health").status_code == 503
        got = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": ASK}, timeout=120)
        assert got.status_code == 503


def test_a_step_that_raises_ends_the_rows_and_not_the_server(adapters, monkeypatch):
    with running(adapters) as (url, state):
        step, calls = state.engine.step, []

        def failing():
            if state.engine.queued and not calls:
                calls.append(1)
                raise RuntimeError("secret inside")
            return step()

        monkeypatch.setattr(state.engine, "step", failing)
        body = {"model": "tiny", "messages": ASK, "max_tokens": 2}
        got = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert got.status_code == 500 and "secret" not in got.text
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def _until(done, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
