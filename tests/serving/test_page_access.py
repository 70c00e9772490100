"""Keyboard, screen reader, widths and themes of the chat page, and its key."""

from __future__ import annotations

import re

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


# No colour depends on the width, and no width on the colours. From 832 pixels the list of conversations is in the page.
@pytest.mark.parametrize(("theme", "widths"), [("light", (390, 820, 1440)), ("dark", (390,))])
def test_the_page_fits_every_width_and_axe_finds_no_serious_fault(browser, server, folders, theme, widths):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    write(folders[1] / "drawn", begin() + train(10, 12.34) + train(20, 0.0000432))

    # The dark theme changes colours only.
    rules = {"runOnly": ["color-contrast"]} if theme == "dark" else {}

    def check(page, where: str, part: str = "body") -> None:
        run = "([part, options]) => axe.run(part, options)"
        found = page.evaluate(run, [part, {"resultTypes": ["violations"], **rules}])["violations"]
        told = [
            (each["id"], node["html"][:200], node.get("failureSummary", "")[:300])
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert not told, f"{where}: {told}"

    with opened(browser, f"{server[0]}/?columns=base,pirate", color_scheme=theme, reduced_motion="reduce") as page:
        page.evaluate(axe.axe_script)
        ask(page, "Anna left a red kite at the park " + "far" * 60)
        expect(page.locator(".answer")).to_have_count(2)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 844})
            if width != 820:
                check(page, f"compare view at {width}")
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, f"the page is {overflow} pixels wider than {width}"
            heads = {head.bounding_box()["height"] for head in page.locator(".answer h3").all()}
            assert len(heads) == 1, f"the answers' texts begin at different heights at {width}: {heads}"
            if width == 390:
                page.get_by_role("button", name="Conversations").click()
                check(page, "list of conversations", "#sidebar")
            for name in DIALOGS:
                page.locator(f"#open-{name}").dispatch_event("click")
                dialog = page.locator(f"dialog#{name}")
                expect(dialog).to_be_visible()
                if name in ("adapters", "runs"):
                    expect(dialog.locator(".card").first).to_be_visible()
                if name == "runs":
                    assert dialog.evaluate(CUT_OFF) == [], f"labels of a chart are cut off at {width}"
                if width == 390:
                    check(page, name, f"#{name}")
                assert dialog.evaluate("it => it.scrollWidth - it.clientWidth") <= 0, f"{name} at {width} is too wide"
                page.keyboard.press("Escape")
                expect(dialog).to_be_hidden()
            if width == 390:
                page.locator("#close-sidebar").dispatch_event("click")
            page.get_by_role("button", name="Show the difference").click()
            expect(page.locator("#difference-text ins").first).to_be_visible()
            for name in ("difference", "rename", "delete", "key"):
                dialog = page.locator(f"dialog#{name}")
                if name != "difference":
                    dialog.evaluate("it => it.showModal()")
                if width == 390:
                    check(page, name, f"#{name}")
                assert dialog.evaluate("it => it.scrollWidth - it.clientWidth") <= 0, f"{name} at {width} is too wide"
                dialog.evaluate("it => it.close()")
        background = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(background)
        assert (int(re.findall(r"\d+", before)[0]) < 128) == (theme == "dark")
        for _ in range(2 if theme == "light" else 1):  # auto, light, dark
            page.get_by_role("button", name="Theme").click()
        assert page.evaluate(background) != before


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


def test_enter_that_ends_the_input_of_a_word_sends_nothing(page):
    box = page.get_by_role("textbox", name="Message")
    box.fill("にほん")
    box.press("Shift+Enter")
    press = "(it, how) => it.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...how}))"
    for how in ({"isComposing": True}, {"keyCode": 229}):  # as Chromium and Firefox tell it, and as Safari does
        box.evaluate(press, how)
    expect(box).to_have_value("にほん\n")
    say(page, "はい")
    box.press("Enter")
    expect(page.locator(".user p")).to_have_text("にほん\n")


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
