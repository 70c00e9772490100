"""Tool calls through the clients of OpenAI and Anthropic: real tokenizers and templates, and a model whose answers are
given, so that each is what a trained model would write.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pytest.importorskip("fastapi")

from serving_helpers import running  # noqa: E402

from conftest import SHARED, make_model, needs_mlx_lm_0_32  # noqa: E402
from mlx_lora.serving.engine import Engine  # noqa: E402
from mlx_lora.serving.requests import Piece  # noqa: E402
from mlx_lora.serving.server.events import Answer  # noqa: E402
from mlx_lora.serving.server.tool_grammar import _FORMS  # noqa: E402

# A folder of a tokenizer, and a chat template in place of its own.
KINDS = {
    "minimind": ("minimind", None),  # Qwen3's format, with reasoning
    "qwen2.5": ("qwen2.5", None),
    "hermes3": ("minimind", "nousresearch_hermes3_tool_use"),
    "mistral": ("minimind", "mistral_nemo_tool_call"),
}
PLACE = {"place": {"city": "Zürich 🌧️", "lines": ['a "b"\n', "<tag>"], "far": [1, 2.5, None, True]}}
WEATHER = {"name": "weather", "arguments": PLACE}
CLOCK = {"name": "clock", "arguments": {}}
PARAMETERS = {"type": "object", "properties": {"place": {"type": "object"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}},
]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # as /v1/responses takes them
CLAUDES = [
    {"name": t["function"]["name"], "description": "d", "input_schema": t["function"]["parameters"]} for t in TOOLS
]
ASK = [{"role": "user", "content": "How is it in Zürich?"}]


class Say:
    """A logits processor that makes an answer ``tokens``."""

    def __init__(self, tokens: list[int], prompt: int):
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        token = self._tokens[min(len(tokens) - self._prompt, len(self._tokens) - 1)]
        return mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)


class Scripted(Engine):
    """An engine that answers every request with ``says``; with None, as the model does."""

    says: str | None = ""

    def submit(self, request, deliver):
        self.asked = request
        if self.says is None:
            return super().submit(request, deliver)
        tokens = [*self.tokenizer.encode(self.says, add_special_tokens=False), min(self.tokenizer.eos_token_ids)]
        said = Say(tokens, len(request.tokens))
        return super().submit(replace(request, processors=[*request.processors, said]), deliver)

    @property
    def prompt_text(self) -> str:
        return self.tokenizer.decode(list(self.asked.tokens))


def scripted(folder, template: str | None = None) -> Scripted:
    from mlx_lm import tokenizer_utils

    if template:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = (SHARED / "data/chat_templates" / f"{template}.jinja").read_text()
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_utils.load(folder)
    model = make_model(
        vocab_size=len(tokenizer._tokenizer), hidden_size=32, num_hidden_layers=1, max_position_embeddings=4096
    )
    return Scripted(model, tokenizer)


NEWER = ("mistral", "minicpm5")  # read by mlx-lm 0.32 only


def kinds(names) -> list:
    return [pytest.param(name, marks=needs_mlx_lm_0_32 if name in NEWER else ()) for name in names]


@pytest.fixture(scope="module", params=kinds(KINDS))
def served(request, tmp_path_factory):
    tokenizer, template = KINDS[request.param]
    source = SHARED / "data/tokenizers" / tokenizer
    if not source.is_dir():
        pytest.skip("needs the tokenizers in shared/data")
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    with running(engine=scripted(folder, template)) as (url, server):
        yield request.param, url, server.engine


@pytest.fixture(scope="module")
def minimind():
    folder = SHARED / "data/tokenizers/minimind"
    if not folder.is_dir():
        pytest.skip("needs the tokenizers in shared/data")
    with running(engine=scripted(folder)) as (url, server):
        yield url, server.engine


def written(kind: str, *calls: dict) -> str:
    """What a model with this template writes to make ``calls``."""
    texts = [json.dumps(call, ensure_ascii=False) for call in calls]
    if kind == "mistral":
        return f"[TOOL_CALLS][{', '.join(texts)}]"
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def chat(url: str):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def claude(url: str):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def completion(url: str, stream: bool, **options):
    """The message of the answer, its text and why it ended, streamed or not."""
    options = {"model": "tiny", "messages": ASK, "tools": TOOLS, "temperature": 0, "max_tokens": 300, **options}
    if not stream:
        choice = chat(url).chat.completions.create(**options).choices[0]
        return choice.message, choice.finish_reason
    with chat(url).chat.completions.stream(**options) as events:
        choice = events.get_final_completion().choices[0]
    return choice.message, choice.finish_reason


def calls_of(message) -> list[dict]:
    return [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or ()
    ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called_and_its_result_read_by_openais_chat(served, stream):
    kind, url, engine = served
    engine.says = written(kind, WEATHER, CLOCK)
    message, reason = completion(url, stream)
    assert calls_of(message) == [WEATHER, CLOCK] and reason == "tool_calls" and not message.content
    ids = {call.id for call in message.tool_calls}
    assert len(ids) == 2 and all(len(each) == 9 and each.isalnum() for each in ids), "what Mistral's templates accept"
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": f"result {n}"}]}
        for n, call in enumerate(message.tool_calls)
    ]
    engine.says = "It rains."
    answer, reason = completion(url, stream, messages=[*ASK, message.to_dict(), *results])
    assert answer.content == "It rains." and reason == "stop" and not answer.tool_calls
    prompt = engine.prompt_text
    assert "weather" in prompt and "Zürich 🌧️" in prompt and "result 0" in prompt and "result 1" in prompt


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called_and_its_result_read_by_openais_responses(served, stream):
    kind, url, engine = served
    engine.says = written(kind, WEATHER, CLOCK)

    def respond(items):
        options = dict(model="tiny", input=items, tools=FLAT, temperature=0, max_output_tokens=300)
        if not stream:
            return chat(url).responses.create(**options)
        with chat(url).responses.stream(**options) as events:
            return events.get_final_response()

    made = respond(ASK)
    assert [item.type for item in made.output] == ["function_call", "function_call"] and made.status == "completed"
    found = [{"name": item.name, "arguments": json.loads(item.arguments)} for item in made.output]
    assert found == [WEATHER, CLOCK]
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"result {n}"}
        for n, item in enumerate(made.output)
    ]
    sent = [item.to_dict() for item in made.output]
    engine.says = "It rains."
    assert respond([*ASK, *sent, *results]).output_text == "It rains."
    text = engine.prompt_text
    assert "result 0" in text and "result 1" in text
    as_chat = [{"id": i["call_id"], "type": "function", "function": c} for i, c in zip(sent, found, strict=True)]
    messages = [*ASK, {"role": "assistant", "content": "", "tool_calls": as_chat}]
    messages += [
        {"role": "tool", "tool_call_id": item["call_id"], "content": f"result {n}"} for n, item in enumerate(sent)
    ]
    assert engine.prompt(messages, TOOLS) == list(engine.asked.tokens), "the calls of one answer are one message"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called_and_its_result_read_by_anthropics_messages(served, stream):
    kind, url, engine = served
    engine.says = written(kind, WEATHER, CLOCK)

    def send(messages):
        options = dict(model="tiny", messages=messages, tools=CLAUDES, max_tokens=300, extra_body={"temperature": 0})
        if not stream:
            return claude(url).messages.create(**options)
        with claude(url).messages.stream(**options) as events:
            return events.get_final_message()

    made = send(ASK)
    assert made.stop_reason == "tool_use" and [block.type for block in made.content] == ["tool_use", "tool_use"]
    assert [{"name": block.name, "arguments": block.input} for block in made.content] == [WEATHER, CLOCK]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": f"result {n}"}]}
        for n, block in enumerate(made.content)
    ]
    engine.says = "It rains."
    blocks = [block.to_dict() for block in made.content]
    after = send([*ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}])
    assert after.stop_reason == "end_turn" and after.content[0].text == "It rains."
    assert "result 0" in engine.prompt_text and "result 1" in engine.prompt_text


# As each of mlx-lm's parsers wants it: the markers around it are the parser's own.
FORMATS = {
    "json_tools": '{"name": "f", "arguments": {"a": "é", "b": 2}}',
    "mistral": 'f[ARGS]{"a": "é", "b": 2}',
    "pythonic": '[f(a="é", b=2)]',
    "qwen3_coder": "\n<function=f>\n<parameter=a>\né\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n",
    "glm47": "f<arg_key>a</arg_key><arg_value>é</arg_value><arg_key>b</arg_key><arg_value>2</arg_value>",
    "kimi_k2": '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": "é", "b": 2}<|tool_call_end|>',
    "function_gemma": "call:f{a:<escape>é<escape>,b:2}",
    "minimax_m2": '<invoke name="f"><parameter name="a">é</parameter><parameter name="b">2</parameter></invoke>',
    "longcat": "f<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>é</longcat_arg_value>"
    "<longcat_arg_key>b</longcat_arg_key><longcat_arg_value>2</longcat_arg_value>",
    "minicpm5": '"f"><param name="a">é</param><param name="b">2</param>',
}


@pytest.mark.parametrize("name", kinds(FORMATS))
def test_the_formats_that_mlx_lm_reads(minimind, monkeypatch, name):
    url, engine = minimind
    parser = use_parser(engine, name, monkeypatch)
    engine.says = f"{parser.tool_call_start}{FORMATS[name]}{parser.tool_call_end}"
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}}
    function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": properties}}
    for stream in (False, True):
        message, reason = completion(url, stream, tools=[{"type": "function", "function": function}])
        assert calls_of(message) == [{"name": "f", "arguments": {"a": "é", "b": 2}}], message
        assert reason == "tool_calls" and not message.content


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "weather", "arguments": {"a": 1}',  # no closing brace
        '{"name": "weather"}',
        '{"name": null, "arguments": {}}',
        '{"name": "weather", "arguments": "not JSON"}',
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": {"a": NaN}}',
        '{"name": "weather", "arguments": {"a": "\\ud800"}}',
        "[]",
        "",
    ],
    ids=lambda call: call[:40],
)
def test_a_call_that_cannot_be_read_is_given_as_text(minimind, call):
    url, engine = minimind
    engine.says = f"Wait. <tool_call>{call}</tool_call>"
    for stream in (False, True):
        message, reason = completion(url, stream, max_tokens=4000)
        assert message.content == engine.says and not message.tool_calls and reason == "stop"
    made = claude(url).messages.create(model="tiny", messages=ASK, tools=CLAUDES, max_tokens=4000)
    assert made.content[0].text == engine.says and made.stop_reason == "end_turn"
    made = chat(url).responses.create(model="tiny", input=ASK, tools=FLAT, max_output_tokens=4000)
    assert made.output_text == engine.says


def test_a_call_cut_off_by_the_limit_is_text(minimind):
    url, engine = minimind
    engine.says = written("minimind", WEATHER)
    message, reason = completion(url, False, max_tokens=12)
    assert reason == "length" and not message.tool_calls
    assert message.content.startswith("<tool_call>") and engine.says.startswith(message.content)
    options = dict(model="tiny", messages=ASK, tools=TOOLS, max_tokens=12, stream=True)
    choices = [chunk.choices[0] for chunk in chat(url).chat.completions.create(**options)]
    assert "".join(choice.delta.content or "" for choice in choices) == message.content
    assert choices[-1].finish_reason == "length"


def test_brackets_without_end_are_text(minimind):
    _, engine = minimind
    answer, call = Answer(engine.tokenizer, TOOLS), "[" * 5000
    pieces = [
        Piece(text, kind, None, reason, None, None, *[0] * 6)
        for kind, text, reason in (("tool", call, None), ("normal", "", "stop"))
    ]
    assert [event.text for piece in pieces for event in answer.feed(piece)] == [f"<tool_call>{call}</tool_call>"]


def test_arguments_in_a_string_are_read(minimind):
    url, engine = minimind
    engine.says = written("minimind", {"name": "weather", "arguments": json.dumps(PLACE)})
    assert calls_of(completion(url, False)[0]) == [WEATHER]


def test_text_around_calls_is_kept_and_blanks_are_not(minimind):
    url, engine = minimind
    for before, after, content in (
        ("I look. ", "", "I look."),
        ("\n\n", "\n", None),
        ("One\n\n", "\n two \n", "One\n two"),
    ):
        engine.says = f"{before}{written('minimind', CLOCK)}{after}"
        for stream in (False, True):
            message, _ = completion(url, stream)
            assert calls_of(message) == [CLOCK] and (message.content or None) == content
    engine.says = "Blanks stay  where no tool is called. \n"
    assert completion(url, True)[0].content == completion(url, False)[0].content == engine.says


def test_without_tools_a_call_is_text(minimind):
    url, engine = minimind
    engine.says = f"So: {written('minimind', CLOCK)}"
    for options in ({"tools": openai.omit}, {"tool_choice": "none"}):
        for stream in (False, True):
            message, reason = completion(url, stream, **options)
            assert message.content == engine.says and not message.tool_calls and reason == "stop"
            assert "clock" not in engine.prompt_text
    choice = {"type": "none"}
    made = claude(url).messages.create(model="tiny", messages=ASK, tools=CLAUDES, tool_choice=choice, max_tokens=100)
    assert made.content[0].text == engine.says
    made = chat(url).responses.create(model="tiny", input=ASK, tools=FLAT, tool_choice="none", max_output_tokens=100)
    assert made.output_text == engine.says


PICK = {
    "type": "object",
    "properties": {
        "n": {"$ref": "#/$defs/digit"},
        "city": {"type": "string", "enum": ["Bern", 'a "<b>"']},
        "far": {"type": "boolean"},
    },
    "required": ["n", "city"],
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
NONE = {"type": "object", "properties": {}}
FORCED = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}
    for name, parameters in (("pick", PICK), ("clock", NONE))
]


def use_parser(engine, name: str, monkeypatch):
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    monkeypatch.setattr(engine.tokenizer, "_tool_parser", parser.parse_tool_call)
    monkeypatch.setattr(engine.tokenizer, "_tool_call_start", parser.tool_call_start)
    monkeypatch.setattr(engine.tokenizer, "_tool_call_end", parser.tool_call_end)
    return parser


@pytest.mark.parametrize("name", kinds(name for name in _FORMS if name != "laguna"))
def test_a_call_is_forced_in_the_format_of_each_parser(minimind, monkeypatch, name):
    url, engine = minimind
    use_parser(engine, name, monkeypatch)
    engine.says = None  # a model with random weights, which would never call by itself
    for chosen in ("pick", "clock"):
        choice = {"type": "function", "function": {"name": chosen}}
        message, reason = completion(url, chosen == "clock", tools=FORCED, tool_choice=choice)
        (call,) = calls_of(message)
        assert call["name"] == chosen and reason == "tool_calls" and not message.content
        if chosen == "clock":
            assert call["arguments"] == {}
        else:
            assert int(call["arguments"]["n"]) in range(10) and call["arguments"]["city"] in ("Bern", 'a "<b>"')


def test_every_interface_forces_a_call(minimind):
    url, engine = minimind
    engine.says = None
    flat = [{"type": "function", **tool["function"]} for tool in FORCED]
    both = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": FORCED[1:]}}
    for choice, names in (("required", {"pick", "clock"}), (both, {"clock"})):
        message, _ = completion(url, False, tools=FORCED, tool_choice=choice, parallel_tool_calls=False)
        assert [call["name"] in names for call in calls_of(message)] == [True]
    for choice in ("required", {"type": "function", "name": "clock"}):
        options = dict(tools=flat, tool_choice=choice, parallel_tool_calls=False)
        (item,) = chat(url).responses.create(model="tiny", input=ASK, max_output_tokens=300, **options).output
        assert item.type == "function_call" and (choice == "required" or item.name == "clock")
    claudes = [
        {"name": t["function"]["name"], "description": "", "input_schema": t["function"]["parameters"]} for t in FORCED
    ]
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "clock"}):
        options = dict(tools=claudes, tool_choice=choice, max_tokens=300)
        made = claude(url).messages.create(model="tiny", messages=ASK, **options)
        assert [block.type for block in made.content] == ["tool_use"] and made.stop_reason == "tool_use"


def test_a_schema_for_the_answer_leaves_room_for_calls(minimind):
    url, engine = minimind
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
    engine.says = None
    assert completion(url, False, response_format=schema, tool_choice="none")[0].content == "7"
    for says in ("7", written("minimind", CLOCK)):
        engine.says = says
        message, _ = completion(url, False, response_format=schema)
        assert message.content == says or calls_of(message) == [CLOCK]


def test_reasoning_comes_before_what_is_forced(minimind, monkeypatch):
    url, engine = minimind
    think, choice = "Let me see.\n</think>\n\n", {"type": "function", "function": {"name": "clock"}}
    monkeypatch.setattr(type(engine), "state_after", lambda self, tokens: "reasoning")
    engine.says = think + written("minimind", CLOCK)
    message, _ = completion(url, False, tool_choice=choice)
    assert message.reasoning_content.strip() == "Let me see." and calls_of(message) == [CLOCK]
    engine.says = "Let me see.\n</think>7"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}
    message, _ = completion(url, False, tools=openai.omit, response_format=schema)
    assert message.content == "7" and message.reasoning_content.strip() == "Let me see."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_one_call_ends_the_answer_where_several_are_not_wanted(served, stream):
    kind, url, engine = served
    engine.says = written(kind, WEATHER, CLOCK) + ("" if kind == "mistral" else "And more.")  # it has no end marker
    message, reason = completion(url, stream, parallel_tool_calls=False)
    assert calls_of(message) == [WEATHER] and reason == "tool_calls" and not message.content
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    made = claude(url).messages.create(model="tiny", messages=ASK, tools=CLAUDES, tool_choice=choice, max_tokens=300)
    assert [block.name for block in made.content] == ["weather"] and made.stop_reason == "tool_use"


def test_what_cannot_be_forced_is_an_error(minimind, monkeypatch):
    url, engine = minimind
    named = {"type": "function", "function": {"name": "nobody"}}
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]
    for options, words in (
        ({"tool_choice": named}, "no tool 'nobody'"),
        ({"tool_choice": "required", "tools": openai.omit}, "no tool to call"),
        ({"tool_choice": "sometimes"}, "sometimes"),
        ({"tool_choice": {"type": "function"}}, "no name"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x"}}}, "allowed_tools"),
        ({"tool_choice": "required", "tools": broken}, "not a JSON schema"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            completion(url, False, **options)
    with pytest.raises(openai.BadRequestError, match="web_search"):
        chat(url).responses.create(model="tiny", input=ASK, tools=FLAT, tool_choice={"type": "web_search"})
    choice = {"type": "tool", "name": "nobody"}
    with pytest.raises(anthropic.BadRequestError, match="nobody"):
        claude(url).messages.create(model="tiny", messages=ASK, tools=CLAUDES, tool_choice=choice, max_tokens=9)
    use_parser(engine, "longcat", monkeypatch)
    for options in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError, match="longcat"):
            completion(url, False, **options)


def test_tools_that_the_template_does_not_show_are_an_error(minimind, monkeypatch):
    url, engine = minimind
    monkeypatch.setattr(engine.tokenizer._tokenizer, "chat_template", "{{ messages[0].content }}")
    monkeypatch.delitem(engine.__dict__, "shows_tools", raising=False)
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        completion(url, False)
    engine.__dict__.pop("shows_tools")


def test_reasoning_is_told_apart_and_goes_back_into_the_prompt(minimind):
    url, engine = minimind
    engine.says = f"<think>\nHm, Zürich?\n</think>\n\n{written('minimind', CLOCK)}"
    for stream in (False, True):
        message, _ = completion(url, stream)
        assert message.reasoning_content.strip() == "Hm, Zürich?" and calls_of(message) == [CLOCK]
        assert not message.content
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12:00"}
    completion(url, False, messages=[*ASK, message.to_dict(), result])
    expected = list(engine.asked.tokens)
    assert "Hm, Zürich?" in engine.prompt_text
    made = claude(url).messages.create(model="tiny", messages=ASK, tools=CLAUDES, max_tokens=200)
    assert [block.type for block in made.content] == ["thinking", "tool_use"]
    blocks = [{"type": "tool_result", "tool_use_id": made.content[1].id, "content": "12:00"}]
    history = [*ASK, {"role": "assistant", "content": [block.to_dict() for block in made.content]}]
    claude(url).messages.create(
        model="tiny", messages=[*history, {"role": "user", "content": blocks}], tools=CLAUDES, max_tokens=9
    )
    assert "Hm, Zürich?" in engine.prompt_text
    made = chat(url).responses.create(model="tiny", input=ASK, tools=FLAT, max_output_tokens=200)
    assert [item.type for item in made.output] == ["reasoning", "function_call"]
    assert 3 < made.usage.output_tokens_details.reasoning_tokens < made.usage.output_tokens
    output = {"type": "function_call_output", "call_id": made.output[1].call_id, "output": "12:00"}
    chat(url).responses.create(
        model="tiny", input=[*ASK, *(item.to_dict() for item in made.output), output], tools=FLAT, max_output_tokens=9
    )
    assert list(engine.asked.tokens) == expected


def test_every_shape_of_a_message(minimind):
    url, engine = minimind
    engine.says = "Yes."
    text = lambda words, kind="text": [{"type": kind, "text": words}]  # noqa: E731
    whole = [{"role": "system", "content": "Be kind."}, *ASK]
    for messages in (
        whole,
        [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": text(ASK[0]["content"])}],
        [{"role": "system", "content": [*text("Be "), *text("kind.")]}, {**ASK[0], "name": "me"}],
    ):
        assert completion(url, False, messages=messages)[0].content == "Yes."
        assert list(engine.asked.tokens) == engine.prompt(whole, TOOLS)
    for system in ("Be kind.", [{**text("Be ")[0], "cache_control": {"type": "ephemeral"}}, *text("kind.")]):
        for content in (ASK[0]["content"], text(ASK[0]["content"])):
            asked = [{"role": "user", "content": content}]
            claude(url).messages.create(model="tiny", messages=asked, system=system, max_tokens=9)
            assert list(engine.asked.tokens) == engine.prompt(whole)
    for items in (ASK, [{"role": "user", "content": text(ASK[0]["content"], "input_text")}], ASK[0]["content"]):
        chat(url).responses.create(model="tiny", input=items, instructions="Be kind.", max_output_tokens=9)
        assert list(engine.asked.tokens) == engine.prompt(whole)


def test_images_and_sounds_are_refused_by_name(minimind):
    url, _ = minimind
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    sound = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    for part in (picture, sound):
        with pytest.raises(openai.BadRequestError, match=part["type"]):
            completion(url, False, messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.BadRequestError, match="input_image"):
        part = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "auto"}
        chat(url).responses.create(model="tiny", input=[{"role": "user", "content": [part]}])
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    image = {"type": "image", "source": source}
    for content in ([image], [{"type": "tool_result", "tool_use_id": "x", "content": [image]}]):
        with pytest.raises(anthropic.BadRequestError, match="image"):
            claude(url).messages.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=9)


def test_an_effort_of_reasoning_reaches_the_chat_template(minimind, monkeypatch):
    url, engine = minimind
    engine.says, seen, prompt = "Hi", [], engine.prompt
    monkeypatch.setattr(engine, "prompt", lambda m, t, c: (seen.append(c.chat_template_config), prompt(m, t, c))[1])
    model = {"model": "tiny"}
    for effort, variables in (
        ("high", {"reasoning_effort": "high"}),
        ("none", {"reasoning_effort": "none", "enable_thinking": False}),
    ):
        chat(url).chat.completions.create(**model, messages=ASK, reasoning_effort=effort, max_tokens=3)
        chat(url).responses.create(**model, input=ASK, reasoning={"effort": effort}, max_output_tokens=3)
        more = {"output_config": {"effort": effort}}
        claude(url).messages.create(**model, messages=ASK, max_tokens=3, extra_body=more)
        assert seen == [variables] * 3
        seen.clear()
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    chat(url).chat.completions.create(**model, messages=ASK, reasoning_effort="none", max_tokens=3, extra_body=own)
    assert seen.pop() == {"reasoning_effort": "none", "enable_thinking": True}


def test_anthropics_tool_runner_calls_the_function(minimind):
    url, engine = minimind
    cities = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        engine.says = "It rains."
        return "rain"

    engine.says = written("minimind", {"name": "weather", "arguments": {"city": "Bern"}})
    made = claude(url).beta.messages.tool_runner(model="tiny", messages=ASK, tools=[weather], max_tokens=200)
    assert made.until_done().content[0].text == "It rains." and cities == ["Bern"]
    assert "How is it in Zürich?" in engine.prompt_text, "the client sends the whole conversation"


def test_what_claude_code_sends_is_taken(minimind):
    url, engine = minimind
    engine.says = "Hi"
    cache = {"type": "ephemeral"}
    tool = {**CLAUDES[0], "cache_control": cache, "strict": True, "eager_input_streaming": True}
    body = {
        "system": [
            {"type": "text", "text": "You help.", "cache_control": cache},
            {"type": "text", "text": "Be brief."},
        ],
        "tools": [tool],
        "thinking": {"type": "adaptive"},
        "extra_body": {
            "output_config": {"effort": "medium"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "cache_control": cache,
        },
        "extra_headers": {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14"},
        "extra_query": {"beta": "true"},
    }
    counted = claude(url).messages.count_tokens(model="tiny", messages=ASK, **body).input_tokens
    with claude(url).messages.stream(
        model="tiny", messages=ASK, max_tokens=9, metadata={"user_id": "u"}, **body
    ) as stream:
        made = stream.get_final_message()
    assert "".join(block.text for block in made.content if block.type == "text") == "Hi"
    assert counted == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
    assert "Be brief." in engine.prompt_text
    wrong = {"output_config": {"format": {"type": "xml"}}}
    with pytest.raises(anthropic.BadRequestError, match="not a JSON schema"):
        claude(url).messages.create(model="tiny", messages=ASK, max_tokens=9, extra_body=wrong)
