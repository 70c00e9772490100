"""A headless Chromium for tests of the chat page, what they do there, and the logs of runs that it shows."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ASK = "A red umbrella was found on a bench."
ENDLESS = {"logit_bias": {"2": -100, "0": -100, "1": -100}, "max_tokens": 1900}  # no token ends the answer
END = {"kind": "end", "finish_reason": "stop", "first_token": 0.1, "tokens": 2, "tokens_per_second": 9.0}
LIMIT = 3_000_000  # bytes of an upload to the server of the page's tests
PATIENCE = 60_000  # milliseconds that anything on the page may take on a slow machine

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


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's sync API. Skips the test where Playwright or a Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, _NAMES)), None)
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be started: {error.message.splitlines()[0]}")
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Any, url: str, allowed: tuple[str, ...] = (), options: dict | None = None, **context: Any
) -> Iterator[Any]:
    """The page at ``url`` in a profile of its own. An error in the page, or one in its console, fails the test.

    Args:
        allowed: texts of errors in the console that the test causes on purpose.
        options: of sampling, as if they had been set on the page before.
    """
    stored = [{"name": "options", "value": json.dumps(options)}]
    known = {"origins": [{"origin": "/".join(url.split("/")[:3]), "localStorage": stored}]} if options else None
    # A small page without animations costs little to draw.
    context = {"viewport": {"width": 1000, "height": 700}, "reduced_motion": "reduce", **context}
    made = browser.new_context(storage_state=known, **context)
    made.set_default_timeout(PATIENCE)
    page = made.new_page()
    watch(page, allowed)
    page.goto(url)
    try:
        yield page
        assert not page.faults, page.faults
    finally:
        made.close()


def watch(page: Any, allowed: tuple[str, ...] = ()) -> None:
    """Collect the errors of a page, and of its console, in ``page.faults``, but those in ``page.allowed``."""
    page.faults, page.allowed = [], allowed
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on(
        "console",
        lambda said: (
            page.faults.append(said.text)
            if said.type == "error" and not any(text in said.text for text in page.allowed)
            else None
        ),
    )


def expect(subject: Any) -> Any:
    from playwright.sync_api import expect as found

    return found(subject)


def set_options(page: Any, **options: Any) -> None:
    page.evaluate("options => localStorage.setItem('options', JSON.stringify(options))", options)
    page.reload()


def ask(page: Any, text: str) -> None:
    """Send a message and wait until it is answered."""
    before = page.locator(".turn").count()
    page.get_by_role("textbox", name="Message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(before + 1)
    answered(page)


def answered(page: Any) -> None:
    """Wait until nothing is being answered."""
    page.locator("#send").wait_for(state="visible")


def answers(page):
    return page.locator(".answer .body")


def events(*told: dict) -> str:
    """A server's stream, for what the tiny model would not say."""
    return "".join(f"data: {json.dumps({'column': 0, **event})}\n\n" for event in told) + "data: [DONE]\n\n"


def say(page, text: str, reasoning: str = "") -> None:
    """Let the server answer ``text``."""
    from mlx_lora.serving.server.markdown import render

    thought = [{"kind": "reasoning", "text": reasoning}] if reasoning else []
    body = events(*thought, {"kind": "text", "text": text}, {**END, "html": render(text)})
    page.unroute("**/page/chat")
    page.route("**/page/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def line(kind: str, at: float = 1000.0, **fields) -> str:
    return json.dumps({"kind": kind, "time": at, **fields}) + "\n"


def begin(iters: int = 100, at: float = 1000.0) -> str:
    return line("Run", at, iteration=0, settings={"train": {"iters": iters}}) + line("Started", at, iters=iters)


def train(iteration: int, loss: float | None, at: float = 1000.0) -> str:
    return line("TrainReport", at, iteration=iteration, train_loss=loss, iterations_per_second=1.0)


def write(folder: Path, text: str, how: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "log.jsonl", how) as file:
        file.write(text)
