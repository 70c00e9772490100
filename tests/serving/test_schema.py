"""Schemathesis over the OpenAPI description: what it says is what the server does, also for requests no one would send.

A few seconds with a fixed seed. By hand, with hundreds of examples an operation:
``schemathesis run http://127.0.0.1:8080/openapi.json --checks all --max-examples 300``.
"""

from __future__ import annotations

import json
import re

import pytest

schemathesis = pytest.importorskip("schemathesis")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from schemathesis.engine import events, from_schema  # noqa: E402
from serving_helpers import make_adapters, running  # noqa: E402

from mlx_lora.serving.server.document import below  # noqa: E402

# What a JSON schema cannot say: which JSON schemas a grammar can follow, what a chat template refuses, and which fields
# need others.
SEMANTIC = (
    *("this schema is not supported", "the chat template refuses these messages", "the prompt is too long"),
    *("tool_choice: ", "lora: ", "thread: ", "continue_final_message", "min_tokens and ignore_eos", "best_of: "),
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder, ("pirate",))
    return folder


def found_by_schemathesis(url: str, examples: int, **headers: str) -> list[str]:
    """The failures, each as one text, and none that only says what ``SEMANTIC`` does."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    config = schema.config
    config.seed = 1
    config.update(headers=headers)
    config.generation.update(max_examples=examples, database="none")
    config.phases.update(phases=["examples", "fuzzing"])  # the others take minutes
    faults = []
    for event in from_schema(schema).execute():
        if isinstance(event, (events.FatalError, events.NonFatalError)):
            faults.append(str(getattr(event, "exception", None) or event.info.format()))
        if isinstance(event, events.ScenarioFinished):
            for case, checks in event.recorder.checks.items():
                response = event.recorder.interactions[case].response
                faults += [
                    f"{event.recorder.label}: {check.failure_info.failure.title}: {response and response.text}"
                    for check in checks
                    if check.failure_info is not None
                ]
    return [fault for fault in faults if not any(text in fault for text in SEMANTIC)]


def test_the_description_is_true(adapters):
    with running(adapters, max_tokens_limit=4) as (url, _):
        assert found_by_schemathesis(url, 3) == []


def test_the_description_knows_the_key(adapters):
    with running(api_key="a-secret-key", max_tokens_limit=4) as (url, _):
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        key = {"Authorization": "Bearer a-secret-key"}
        described = httpx.get(f"{url}/openapi.json", headers=key).json()
        asked = {path for path, found in described["paths"].items() for each in found.values() if each.get("security")}
        assert asked == set(described["paths"]) - {"/health"}
        for path in asked:
            method = next(iter(described["paths"][path]))
            assert httpx.request(method, f"{url}{path}").status_code == 401, path


def test_the_description_knows_the_models_and_the_vocabulary(adapters):
    with running(adapters) as (url, server):
        schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
        assert schemas["ChatCompletion"]["properties"]["model"]["examples"] == ["tiny", "pirate"]
        most = f'"maximum": {server.engine.vocab_size - 1}'
        assert json.dumps(schemas["Completion"]["properties"]["prompt"]).count(most) == 2


@pytest.mark.parametrize("number", [1, 2, 10, 11, 100, 101, 512, 999, 1000, 1024, 32000])
def test_the_pattern_of_numbers_below_another(number):
    pattern = re.compile(f"^({below(number)})$")
    assert [text for text in map(str, range(2 * number + 20)) if pattern.match(text)] == list(map(str, range(number)))
    assert not any(pattern.match(text) for text in ("", "-1", "00", "01", "1.0", "x"))
