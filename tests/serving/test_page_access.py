"""Keyboard, screen reader, widths and themes of the chat page, and its key."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import ask, begin, expect, opened, say, train, write
from serving_helpers import running

pytest_plugins = ("page_fixtures",)


# Labels that reach over the edge of their chart.
CUT_OFF = """dialog => [...dialog.querySelectorAll("svg:not([hidden]) text")].filter((it) => {
    const own = it.getBoundingClientRect(), chart = it.ownerSVGElement.getBoundingClientRect();
    return own.left < chart.left || own.right > chart.right;
}).map((it) => it.textContent)"""


DIALOGS = ("adapters", "runs", "models", "settings", "files", "help")


def faults_of_axe(page, part: str, **options) -> list[tuple]:
    """The serious faults that axe-core finds in a part of the page."""
    run = "([part, options]) => axe.run(part, options)"
    found = page.evaluate(run, [part, {"resultTypes": ["violations"], **options}])["violations"]
    return [
        (each["id"], node["html"][:200], node.get("failureSummary", "")[:300])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def check_size(page, answers: int) -> None:
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0, f"the page is {overflow} pixels too wide"
    heads = [head.bounding_box()["height"] for head in page.locator(".answer h3").all()]
    assert len(heads) == answers and len(set(heads)) == 1, f"the answers' texts begin at different heights: {heads}"


# The dark theme changes colours only, and the dialogs are narrower than a phone.
def test_the_page_fits_every_width_and_axe_finds_no_serious_fault(browser, server, folders):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    write(folders[1] / "drawn", begin() + train(10, 12.34) + train(20, 0.0000432))
    with opened(browser, f"{server[0]}/?columns=base,pirate", color_scheme="light") as page:
        page.evaluate(axe.axe_script)
        ask(page, "Anna left a red kite at the park " + "far" * 60)
        for width in (1440, 820, 390):
            page.set_viewport_size({"width": width, "height": 844})
            check_size(page, answers=2)
        background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"  # how red it is
        for theme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=theme)
            assert (int(page.evaluate(background)) < 128) == (theme == "dark")
            check_parts(page, **rules)
        for theme in ("light", "dark"):
            page.get_by_role("button", name="Theme").click()
            assert (int(page.evaluate(background)) < 128) == (theme == "dark")


def check_parts(page, **rules) -> None:
    """What axe-core finds in the conversation, in the list of conversations and in each dialog."""
    assert not faults_of_axe(page, "body", **rules)
    page.get_by_role("button", name="Conversations").click()
    assert not faults_of_axe(page, "#sidebar", **rules)
    page.locator("#close-sidebar").click()
    for name in (*DIALOGS, "difference", "rename", "delete", "key"):
        dialog = page.locator(f"dialog#{name}")
        if name in DIALOGS:
            page.locator(f"#open-{name}").dispatch_event("click")
        elif name == "difference":
            page.get_by_role("button", name="Show the difference").click()
            expect(dialog.locator("ins").first).to_be_visible()
        else:
            dialog.evaluate("it => it.showModal()")
        if name in ("adapters", "runs"):
            expect(dialog.locator(".card").first).to_be_visible()
        if name == "runs":
            assert dialog.evaluate(CUT_OFF) == [], "labels of a chart are cut off"
        assert not faults_of_axe(page, f"#{name}", **rules)
        assert dialog.evaluate("it => it.scrollWidth - it.clientWidth") <= 0, f"{name} is too wide"
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()


def test_every_control_is_reached_with_the_keyboard_and_shows_it(page):
    say(page, "[a link](http://127.0.0.1:1/) and\n\n```\ncode\n```")
    ask(page, "Hello")
    page.evaluate("document.activeElement.blur()")
    controls = page.locator("a[href]:visible, :is(button, input, textarea):visible:enabled").all()
    reached = set()
    for _ in range(2 * len(controls)):
        page.keyboard.press("Tab")
        here = page.evaluate_handle("document.activeElement")
        if here.evaluate("it => it === document.body"):
            continue
        shown = here.evaluate("it => it.id === 'question' || getComputedStyle(it).outlineStyle !== 'none'")
        assert shown, here.evaluate("it => it.outerHTML")
        reached.add(here.evaluate("it => it.outerHTML"))
    missing = {control.evaluate("it => it.outerHTML") for control in controls} - reached
    assert not missing
    page.get_by_role("button", name="Settings").press("Enter")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    page.get_by_role("button", name="Settings").press("Enter")
    page.mouse.click(3, 3)  # beside the dialog
    expect(page.locator("dialog#settings")).to_be_hidden()


def test_the_page_asks_for_the_key_and_sends_it(browser):
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
