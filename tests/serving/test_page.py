"""The chat page over HTTP and in a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")

from page_helpers import answered, ask, chromium, opened, watch  # noqa: E402
from serving_helpers import make_adapters, running  # noqa: E402

from mlx_lora import load  # noqa: E402
from mlx_lora.config import LABELS, PAIRS, SAMPLING, DataConfig, GenerateConfig  # noqa: E402
from mlx_lora.data.load import load_dataset  # noqa: E402
from mlx_lora.errors import ConfigError  # noqa: E402
from mlx_lora.serving import engine  # noqa: E402
from mlx_lora.serving.server.difference import difference  # noqa: E402
from mlx_lora.serving.server.markdown import LONGEST, code_stylesheet, render  # noqa: E402
from mlx_lora.serving.server.page import FILES, MOST_COLUMNS  # noqa: E402
from mlx_lora.tiny_base import PATH  # noqa: E402

ASK = "A red umbrella was found on a bench."
ENDLESS = {"logit_bias": {"2": -100, "0": -100, "1": -100}, "max_tokens": 1900}  # no token ends the answer
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1)) [x](&#106;avascript:alert(1)) [x](java\nscript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](vbscript:x) [x](file:///etc/passwd) <javascript:alert(1)>",
    '![x](http://127.0.0.1:1/a.png) ![x](x" onerror="alert(1))',
    '<svg onload=alert(1)><a xlink:href="javascript:alert(1)">x</a></svg>',
    "```html\n<script>alert(1)</script>\n```",
    "```python\n</code></pre><script>alert(1)</script>\n```",
    '```x" onmouseover="alert(1)\ncode\n```',
    "`<script>alert(1)</script>`",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe><style>*{display:none}</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "[x](http://a \"t' onclick='alert(1)\")",
    '<form action="/page/chat"><input name=x></form><base href="http://evil/"><meta http-equiv=refresh content=0>',
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder)
    with running(folder, max_tokens_limit=2000) as (url, state):
        yield url, state


def told(url: str, **body) -> list[dict]:
    """The events of an answer."""
    got = httpx.post(f"{url}/page/chat", json={"messages": [{"role": "user", "content": ASK}], **body}, timeout=60)
    assert got.status_code == 200, got.text
    events = [event.removeprefix("data: ") for event in got.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


# Over HTTP.


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
    assert options["max_tokens"] == GenerateConfig().max_tokens and options["temp"] == 0
    assert got["base"] == "tiny" and got["adapters"] == ["lawyer", "pirate"]


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


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_becomes_harmless(text):
    class Checked(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag in {"p", "pre", "code", "span", "a", "br", "em", "strong"}, tag
            for name, value in attributes:
                assert name in {"class", "href", "title", "rel", "target"}, name
                assert name != "href" or urlsplit(value).scheme in {"http", "https", "mailto"}, value

    Checked().feed(render(text))


def test_markdown_is_rendered(server):
    html = render("# H\n\n- *a*\n\n```python\nprint(1)\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n~~c~~ [d](https://e.org)")
    for part in ("<h1>H</h1>", "<em>a</em>", 'class="hl-nb"', "<td>1</td>", "<s>c</s>", "noopener"):
        assert part in html
    assert render("<b>" * LONGEST) == f"<pre>{'&lt;b&gt;' * LONGEST}</pre>"
    got = httpx.post(f"{server[0]}/page/markdown", json={"texts": ["*a*", "b"]}).json()
    assert got == {"html": ["<p><em>a</em></p>\n", "<p>b</p>\n"]}


def test_highlighted_code_can_be_read_in_both_themes():
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a: str, b: str) -> float:
        dark, light = sorted((luminance(a), luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    style = (FILES / "style.css").read_text()
    panels = re.search(r"--panel: light-dark\((#\w+), (#\w+)\)", style).groups()
    for colors in re.findall(r"light-dark\((.*), (.*)\)", code_stylesheet()):
        for color, panel in zip(colors, panels, strict=True):
            assert color == "var(--text)" or contrast(color, panel) >= 4.5, (color, panel)


def test_a_difference_has_both_texts():
    for old, new in (("a b c", "a x c"), ("", "a\n\nb"), ("  a", "a  "), ("same", "same"), ("ä 🙂 b", "ä b 🙂\n")):
        parts = difference(old, new)
        assert "".join(part["text"] for part in parts if part["kind"] != "added") == old
        assert "".join(part["text"] for part in parts if part["kind"] != "removed") == new
    assert [part["kind"] for part in difference("a b c", "a x c")] == ["same", "removed", "added", "same"]
    with pytest.raises(ConfigError, match="words"):
        difference("a " * 5000, "b")


# In a browser.


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, server):
    with opened(browser, server[0], accept_downloads=True) as found:
        yield found


def set_options(page, **options) -> None:
    page.evaluate("options => localStorage.setItem('options', JSON.stringify(options))", options)
    page.reload()


def answers(page):
    return page.locator(".answer .body")


def events(*told: dict) -> str:
    """A server's stream, for what the tiny model would not say."""
    return "".join(f"data: {json.dumps({'column': 0, **event})}\n\n" for event in told) + "data: [DONE]\n\n"


END = {"kind": "end", "finish_reason": "stop", "first_token": 0.1, "tokens": 2, "tokens_per_second": 9.0}


def say(page, text: str, reasoning: str = "") -> None:
    """Let the server answer ``text``."""
    thought = [{"kind": "reasoning", "text": reasoning}] if reasoning else []
    body = events(*thought, {"kind": "text", "text": text}, {**END, "html": render(text)})
    page.unroute("**/page/chat")
    page.route("**/page/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def exported(page, button: str, folder):
    page.get_by_role("button", name="Import and export").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name=button).click()
    path = folder / saved.value.suggested_filename
    saved.value.save_as(path)
    page.get_by_role("button", name="Done").click()
    return path


def test_a_question_is_answered_and_kept(page, expect):
    ask(page, ASK)
    expect(page.locator(".user p")).to_have_text(ASK)
    expect(page.locator(".numbers")).to_contain_text("a second · first after")
    text = answers(page).inner_text()
    expect(page.locator("#announce")).to_contain_text(text)
    ask(page, "And then?")
    page.reload()
    expect(page.locator(".user p")).to_have_text([ASK, "And then?"])
    expect(answers(page).first).to_have_text(text)
    expect(page.locator("#conversations li")).to_have_count(1)
    assert page.title().startswith(ASK)
    page.keyboard.press("Control+k")
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name=ASK, exact=True).click()
    expect(page.locator(".turn")).to_have_count(2)


def test_several_answer_side_by_side_and_one_is_continued(page, expect):
    page.get_by_role("button", name="Who answers").click()
    for name in ("lawyer", "pirate"):
        page.get_by_role("checkbox", name=name).check()
    page.get_by_role("button", name="Done").click()
    set_options(page, max_tokens=8)
    ask(page, ASK)
    expect(page.get_by_role("group", name="Answer of")).to_have_count(3)
    page.get_by_role("group", name="Answer of pirate").get_by_role("button", name="Continue with this").click()
    text = page.get_by_role("group", name="Answer of pirate").locator(".body").inner_text()
    page.get_by_role("button", name="Show the difference").click()
    shown = page.locator("#difference-text")
    expect(shown.locator("ins").first).to_contain_text("+")
    expect(shown.locator("del").first).to_contain_text("−")
    page.keyboard.press("Escape")
    with page.expect_request("**/page/chat") as sent:
        ask(page, "And then?")
    body = json.loads(sent.value.post_data)
    assert body["adapters"] == [None, "lawyer", "pirate"] and body["options"] == {"max_tokens": 8}
    said = [message["content"].split() for message in body["messages"]]
    assert said == [ASK.split(), text.split(), ["And", "then?"]]


def test_stop_answer_again_and_edit_lose_nothing(page, expect):
    set_options(page, **ENDLESS)
    page.get_by_role("textbox", name="Message").fill("First")
    page.get_by_role("button", name="Send", exact=True).dblclick()
    expect(answers(page)).not_to_have_text("")
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(".numbers")).to_contain_text("stopped")
    stopped = answers(page).inner_text()
    set_options(page, max_tokens=6, temp=1.0, seed=3)
    page.get_by_role("button", name="Answer again").click()
    answered(page)
    expect(page.get_by_role("group", name="Answers")).to_have_text("2/2")
    ask(page, "Second")
    page.get_by_role("group", name="Answers").first.get_by_role("button", name="Previous").click()
    expect(answers(page)).to_have_text([stopped])  # the second message followed the other answer
    page.get_by_role("button", name="Edit the message").click()
    page.get_by_role("textbox", name="Edit the message").fill("Other")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".user p")).to_have_text(["Other"])
    page.get_by_role("group", name="Version of this message").get_by_role("button", name="Previous").click()
    page.get_by_role("group", name="Answers").get_by_role("button", name="Next").click()
    expect(page.locator(".user p")).to_have_text(["First", "Second"])


def test_hostile_answers_do_nothing_in_the_browser(page, server, expect):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: page.faults.append(f"a dialog: {dialog.message}"))
    say(page, "\n\n".join(HOSTILE), "<img src=x onerror=alert(2)>")
    ask(page, "<img src=x onerror=alert(3)>")
    page.unroute("**/page/chat")
    page.reload()
    expect(page.locator(".rendered .code").first).to_be_visible()
    assert not page.locator("#turns :is(img, script, iframe, svg a, style, form[action], math)").count()
    assert all(url.startswith((server[0], "blob:")) for url in asked), asked
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    assert "Content Security Policy" in page.faults.pop()


def test_reasoning_is_folded_and_code_can_be_copied(page, expect):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "See:\n\n```python\nx = 1\n```", "I think.")
    ask(page, "Code?")
    expect(page.get_by_text("I think.")).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(page.get_by_text("I think.")).to_be_visible()
    copied = page.evaluate_handle("() => navigator.clipboard")
    for name, text in (("Copy the code", "x = 1\n"), ("Copy the answer", "See:\n\n```python\nx = 1\n```")):
        page.get_by_role("button", name=name).click()
        expect(page.locator("#announce")).to_have_text("Copied")
        assert copied.evaluate("clipboard => clipboard.readText()") == text


def test_what_the_page_exports_is_read_by_train(page, expect, tmp_path):
    _, tokenizer = load(PATH)
    page.keyboard.press("Control+,")
    page.get_by_label("System prompt").fill("Be\u2028kind 🙂")
    page.keyboard.press("Escape")
    say(page, "Yes", "Because.")
    ask(page, "One?")
    page.get_by_role("button", name="Good answer").click()
    ask(page, "Two?")
    page.get_by_role("button", name="Bad answer").last.click()
    say(page, 'No "no"\n')
    page.get_by_role("button", name="Answer again").last.click()
    answered(page)
    page.get_by_role("button", name="Good answer").last.click()
    system = {"role": "system", "content": "Be\u2028kind 🙂"}
    one = [system, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes"}]
    two = [*one, {"role": "user", "content": "Two?"}]
    bad = {"role": "assistant", "content": "Yes", "reasoning_content": "Because."}
    good = {"role": "assistant", "content": 'No "no"\n'}
    for button, kind, rows in (
        (
            "This conversation",
            None,
            [{"messages": [*one[:2], {**one[2], "reasoning_content": "Because."}, two[3], good]}],
        ),
        ("Preference pairs", PAIRS, [{"prompt": two, "chosen": [good], "rejected": [bad]}]),
        (
            "Judged answers",
            LABELS,
            [
                {"prompt": one[:2], "completion": [bad], "label": True},
                {"prompt": two, "completion": [bad], "label": False},
                {"prompt": two, "completion": [good], "label": True},
            ],
        ),
    ):
        path = exported(page, button, tmp_path)
        assert [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] == rows, button
        options = {} if kind is None else {"kind": kind}
        assert len(load_dataset(DataConfig(data=str(path)), tokenizer, ("train",), **options).train)
    chats = exported(page, "All conversations", tmp_path)
    page.get_by_role("button", name="Import and export").click()
    page.get_by_label("Conversations, one JSON object").set_input_files(chats)
    expect(page.locator("#import-result")).to_have_text("1 conversation imported.")
    page.keyboard.press("Escape")
    page.locator("#conversations li button").first.click()
    expect(page.get_by_role("group", name="Answer of imported")).to_have_count(2)
    page.get_by_role("button", name="Import and export").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="This conversation").click()
    assert saved.value.path().read_bytes() == chats.read_bytes()


def test_a_malformed_file_is_refused_with_its_lines(page, expect, tmp_path):
    ask(page, "Kept")
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    bad = {
        "{": "Line 2: it is not JSON",
        "[]": 'no list "messages"',
        '{"messages": []}': "no message of the user",
        '{"messages": [{"role": "tool", "content": "x"}]}': 'role "tool"',
        '{"messages": [{"role": "user", "content": 5}]}': "message 1 is not text",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "one of the user was expected",
        '{"messages": [null]}': "message 1 has the role undefined",
    }
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, *bad]))
    page.get_by_role("button", name="Import and export").click()
    page.locator("#import").set_input_files(path)
    result = page.locator("#import-result")
    expect(result).to_contain_text("Nothing was imported.")
    for text in bad.values():
        expect(result).to_contain_text(text)
    expect(page.locator("#conversations li")).to_have_count(1)


def test_the_page_asks_for_the_key_and_sends_it(browser, expect):
    with (
        running(api_key="a-secret-key") as (url, _),
        opened(browser, url, allowed=("401",)) as page,
    ):
        for key in ("wrong", "a-secret-key"):
            expect(page.get_by_role("dialog", name="API key")).to_be_visible()
            page.get_by_role("textbox", name="Key").fill(key)
            page.keyboard.press("Enter")
            if key == "wrong":
                expect(page.get_by_text("does not accept this key")).to_be_visible()
        ask(page, "Hello")
        expect(page.locator(".numbers")).to_contain_text("tokens")
        assert "a-secret-key" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.reload()
        ask(page, "Again")  # without asking for the key


def test_two_tabs_keep_each_others_conversations(page, server, expect):
    ask(page, "One")
    other = page.context.new_page()
    watch(other)
    other.goto(page.url)
    expect(other.locator(".turn")).to_have_count(1)
    ask(other, "Two")
    expect(page.locator(".turn")).to_have_count(2)
    other.get_by_role("button", name="Good answer").first.click()
    page.get_by_role("button", name="Bad answer").last.click()
    other.keyboard.press("Control+k")
    ask(other, "Elsewhere")
    expect(page.locator("#conversations li")).to_have_count(2)
    page.reload()
    expect(page.locator(".user p")).to_have_text(["One", "Two"])
    expect(page.get_by_role("button", name="Good answer").first).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Bad answer").last).to_have_attribute("aria-pressed", "true")
    assert not other.faults


def test_a_reload_and_a_server_that_goes_away_lose_nothing(browser, server, expect):
    with opened(browser, server[0], allowed=("ERR_FAILED", "Failed to fetch")) as page:
        set_options(page, **ENDLESS)
        page.get_by_role("textbox", name="Message").fill("First")
        page.keyboard.press("Enter")
        expect(answers(page)).not_to_have_text("")
        page.reload()
        expect(page.locator(".user p")).to_have_text(["First"])
        expect(page.get_by_text("This answer was not finished.")).to_be_visible()
        set_options(page, max_tokens=4)
        page.route(re.compile(r"/(page/|health)"), lambda route: route.abort())
        ask(page, "Second")
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        expect(page.get_by_text("left out of the conversation")).to_be_visible()
        expect(page.locator("#away")).to_be_visible()
        page.unroute_all()
        expect(page.locator("#away")).to_be_hidden()
        page.get_by_role("button", name="Answer again").last.click()
        answered(page)
        expect(page.locator(".user p")).to_have_text(["First", "Second"])
        expect(page.locator(".numbers").last).to_contain_text("tokens")
        broken = events({"kind": "text", "text": "Half"}).removesuffix("data: [DONE]\n\n")
        page.route("**/page/chat", lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
        ask(page, "Third")
        expect(answers(page).last).to_have_text("Half")
        expect(page.get_by_role("alert")).to_contain_text("ended the answer early")
        page.unroute_all()
        page.route(
            "**/page/chat", lambda route: route.fulfill(status=429, json={"error": {"message": "busy. Try again"}})
        )
        ask(page, "Fourth")
        expect(page.get_by_role("alert").last).to_contain_text("Busy. Try again.")
        page.faults = [fault for fault in page.faults if "429" not in fault]


def test_an_error_in_one_column_is_shown_there_and_the_other_goes_on(page, expect):
    page.get_by_role("button", name="Who answers").click()
    page.get_by_role("checkbox", name="pirate").check()
    page.get_by_role("button", name="Done").click()
    body = events(
        {"kind": "error", "text": "it is broken"},
        {"kind": "text", "column": 1, "text": "Arr"},
        {**END, "column": 1, "html": "<p>Arr</p>"},
    )
    page.route("**/page/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "First")
    answered(page)
    expect(page.locator(".answer").first.get_by_role("alert")).to_have_text("It is broken.")
    expect(page.get_by_role("alert")).to_have_count(1)
    expect(answers(page).last).to_have_text("Arr")


def test_settings_are_sent_and_wrong_ones_are_said(page, expect):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in (("max tokens", "5"), ("temp", "0.7"), ("seed", "11"), ("stop", "x\ny"), ("logit bias", "{")):
        page.get_by_role("textbox", name=name, exact=True).fill(value)
    expect(page.get_by_text("Write a JSON object")).to_be_visible()
    page.get_by_role("button", name="Done").click()
    with page.expect_request("**/page/chat") as sent:
        ask(page, "Hello")
    body = json.loads(sent.value.post_data)
    assert body["options"] == {"max_tokens": 5, "temp": 0.7, "seed": 11, "stop": ["x", "y"]}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_conversations_are_renamed_and_deleted(page, expect):
    ask(page, "First")
    row = page.locator("#conversations li")
    row.hover()
    page.get_by_role("button", name="Rename First").click()
    page.get_by_label("Title").fill("Other")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Other")
    row.hover()
    page.get_by_role("button", name="Delete Other").click()
    page.get_by_role("button", name="Keep").click()
    expect(row).to_have_count(1)
    row.hover()
    page.get_by_role("button", name="Delete Other").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(row).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(0)


def test_a_message_that_is_sent_before_the_adapters_are_known_waits_for_them(page, server, expect):
    held = []
    page.route("**/page/settings", lambda route: held.append(route))
    with page.expect_request("**/page/settings"):
        page.goto(f"{server[0]}/?columns=base,pirate&prompt=Hello")
    expect(page.get_by_role("textbox", name="Message")).to_have_value("Hello")
    page.get_by_role("textbox", name="Message").press("Enter")
    expect(page.locator("#send")).to_be_hidden()
    for route in held:
        route.continue_()
    expect(page.get_by_role("group", name="Answer of")).to_have_count(2)
    answered(page)


@pytest.mark.parametrize("theme", ("light", "dark"))
def test_the_page_fits_a_phone_in_both_themes(browser, server, expect, theme):
    size = {"width": 390, "height": 844}
    with opened(browser, f"{server[0]}/?columns=base,pirate&prompt=Hello", viewport=size, color_scheme=theme) as page:
        expect(page.get_by_role("textbox", name="Message")).to_have_value("Hello")
        ask(page, "A long " + "word" * 60)
        expect(page.get_by_role("group", name="Answer of")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.get_by_role("button", name="Conversations").click()
        expect(page.get_by_role("button", name="New chat")).to_be_visible()
        page.keyboard.press("Escape")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", background)[0]) < 128) == (theme == "dark")
        for _ in range(2 if theme == "light" else 1):  # auto, light, dark
            page.get_by_role("button", name="Theme").click()
        changed = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert changed != background


@pytest.fixture(scope="module")
def expect(browser):
    from playwright.sync_api import expect as found

    return found
