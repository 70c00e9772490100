"""A headless Chromium for tests of the chat page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60_000  # milliseconds that anything on the page may take on a slow machine


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
def opened(browser: Any, url: str, allowed: tuple[str, ...] = (), **context: Any) -> Iterator[Any]:
    """The page at ``url`` in a profile of its own. An error in the page, or one in its console, fails the test.

    Args:
        allowed: texts of errors in the console that the test causes on purpose.
    """
    made = browser.new_context(**context)
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
    """Collect the errors of a page, and of its console, in ``page.faults``."""
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on(
        "console",
        lambda said: (
            page.faults.append(said.text)
            if said.type == "error" and not any(text in said.text for text in allowed)
            else None
        ),
    )


def ask(page: Any, text: str) -> None:
    """Send a message and wait until it is answered."""
    from playwright.sync_api import expect

    before = page.locator(".turn").count()
    page.get_by_role("textbox", name="Message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(before + 1)
    answered(page)


def answered(page: Any) -> None:
    """Wait until nothing is being answered."""
    page.locator("#send").wait_for(state="visible")
