"""The chat page's requests: its files, settings, answers in columns."""

from __future__ import annotations

import json
import re
import shutil

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import ASK, ENDLESS  # noqa: E402
from serving_helpers import running  # noqa: E402

from mlx_lora.config import SAMPLING, GenerateConfig  # noqa: E402
from mlx_lora.serving import engine  # noqa: E402
from mlx_lora.serving.server.page import FILES, MOST_COLUMNS  # noqa: E402

pytest_plugins = ("page_fixtures",)


def told(url: str, **body) -> list[dict]:
    """The events of an answer."""
    got = httpx.post(f"{url}/page/chat", json={"messages": [{"role": "user", "content": ASK}], **body}, timeout=60)
    assert got.status_code == 200, got.text
    events = [event.removeprefix("data: ") for event in got.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_inline_code(server):
    client = httpx.Client(base_url=server[0])
    page = client.get("/")
    assert page.status_code == client.head("/").status_code == 200 and "text/html" in page.headers["content-type"]
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?://", page.text)
    for name in set(re.findall(r"static/([\w.]+)", page.text)) | {path.name for path in FILES.iterdir()}:
        got = client.get(f"/static/{name}")
        assert got.status_code == 200, name
        assert not re.search(r"//(?!www\.w3\.org)[\w-]+\.\w+/|eval\(|document\.write", got.text), name
        for imported in re.findall(r'from "\./([\w.]+)"', got.text):
            assert client.get(f"/static/{imported}").status_code == 200, (name, imported)
    for path in (
        "nothing.js",
        "../server/page.py",
        "%2e%2e/server/page.py",
        "..%2fserver%2fpage.py",
        "/etc/passwd",
        "",
    ):
        assert client.get(f"/static/{path}").status_code == 404, path


def test_settings_list_every_option_of_sampling_with_the_servers_defaults(server):
    got = httpx.get(f"{server[0]}/page/settings").json()
    options = {option["name"]: option["default"] for option in got["options"]}
    fields = GenerateConfig.__dataclass_fields__.values()
    assert {field.name for field in fields if field.metadata.get("section") == SAMPLING} <= set(options)
    assert options["max_tokens"] == server[1].defaults.max_tokens and options["temp"] == 0
    assert got["base"] == "tiny" and got["adapters"] == server[1].engine.bank.names


def test_all_columns_are_computed_in_one_batch_and_answer_as_alone(server, monkeypatch):
    url, state = server
    lanes, step = set(), state.engine.step

    def looking():
        lanes.add(tuple(len(rows) for rows in state.engine.schedule.active.values() if rows))
        return step()

    monkeypatch.setattr(state.engine, "step", looking)
    columns, together = [None, "pirate", "lawyer"], {}
    options = {"max_tokens": 12, "logit_bias": ENDLESS["logit_bias"]}
    for event in told(url, adapters=columns, options=options):
        if event["kind"] == "text":
            together[event["column"]] = together.get(event["column"], "") + event["text"]
        elif event["kind"] == "end":
            assert event["finish_reason"] == "length" and event["tokens"] == 12
            assert event["first_token"] > 0 and event["tokens_per_second"] > 0 and event["html"].startswith("<p>")
    assert (3,) in lanes
    for number, adapter in enumerate(columns):
        alone = told(url, adapters=[adapter], options=options)
        assert "".join(event["text"] for event in alone if event["kind"] == "text") == together[number]


def test_a_column_that_fails_ends_alone(server, monkeypatch, tmp_path):
    url, state = server
    options = {"max_tokens": 12, "logit_bias": ENDLESS["logit_bias"]}
    (alone,) = [event for event in told(url, options=options) if event["kind"] == "end"]
    broken = tmp_path / "broken"
    shutil.copytree(state.engine.bank.folder / "pirate", broken)
    state.engine.bank.add("broken", broken)
    (broken / "adapter_config.json").write_text("{")
    deliver = engine.deliver

    def failing(row, *rest):
        if row.request.adapter == "lawyer" and len(row.made) == 5:
            raise RuntimeError("secret inside")
        return deliver(row, *rest)

    monkeypatch.setattr(engine, "deliver", failing)
    try:
        found = told(url, adapters=["broken", "lawyer", None, "pirate"], options=options)
        named = told(url, adapters=["nobody", None], options=options)
        only = httpx.post(
            f"{url}/page/chat", json={"messages": [{"role": "user", "content": "x"}], "adapters": ["broken"]}
        )
    finally:
        state.engine.bank.unload("broken")
    errors = {event["column"]: event["text"] for event in found if event["kind"] == "error"}
    assert errors.keys() == {0, 1} and "adapter_config.json" in errors[0] and "secret" not in errors[1]
    ends = {event["column"]: event["html"] for event in found if event["kind"] == "end"}
    assert ends.keys() == {2, 3} and ends[2] == alone["html"]
    unknown, *answered = named
    assert unknown["column"] == 0 and unknown["kind"] == "error" and "'nobody' does not exist" in unknown["text"]
    assert {event["column"] for event in answered} == {1} and answered[-1]["html"] == alone["html"]
    assert only.status_code == 400 and "adapter_config.json" in only.json()["error"]["message"]


def test_what_is_wrong_with_a_request_is_said(server):
    url, _ = server
    message = {"role": "user", "content": "x"}
    for body, status, text in (
        ({"messages": []}, 400, "messages"),
        ({"messages": [message], "adapters": ["nobody"]}, 404, "Known: tiny"),
        ({"messages": [message], "adapters": []}, 400, "adapters"),
        ({"messages": [message], "adapters": [None] * (MOST_COLUMNS + 1)}, 400, "adapters"),
        ({"messages": [message], "options": {"nothing": 1}}, 400, "nothing"),
        ({"messages": [message], "options": {"draft_model": "x"}}, 400, "draft_model"),
        ({"messages": [message], "options": {"temp": 1, "top_p": 3}}, 400, "top_p"),
        ({"messages": [message], "options": {"max_tokens": "x"}}, 400, "max_tokens"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "wizard"),
    ):
        got = httpx.post(f"{url}/page/chat", json=body)
        assert got.status_code == status and text in got.json()["error"]["message"], (body, got.text)


def test_only_the_pages_files_are_open_without_the_key(tmp_path):
    with running(api_key="a-secret-key") as (url, _):
        for path in ("/", "/static/main.js", "/static/code.css"):
            assert httpx.get(f"{url}{path}").status_code == 200
        assert httpx.get(f"{url}/page/settings").status_code == 401
        for path in ("chat", "markdown", "difference"):
            assert httpx.post(f"{url}/page/{path}", json={}).status_code == 401
        key = {"Authorization": "Bearer a-secret-key"}
        assert httpx.get(f"{url}/page/settings", headers=key).status_code == 200
