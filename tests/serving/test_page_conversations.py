"""The conversations that the chat page keeps: tabs, reloads, the list, the address."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import ENDLESS, answered, answers, ask, events, expect, opened, say, set_options, watch

pytest_plugins = ("page_fixtures",)


def test_two_tabs_keep_each_others_conversations(page, server):
    say(page, "Yes")
    ask(page, "One")
    other = page.context.new_page()
    watch(other)
    say(other, "No")
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
    other.get_by_role("button", name="Delete One").focus()  # which shows it
    other.keyboard.press("Enter")
    other.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("h1")).to_have_text("New chat")
    assert not other.faults


def test_a_reload_and_a_server_that_goes_away_lose_nothing(browser, server):
    with opened(browser, server[0], allowed=("ERR_FAILED", "Failed to fetch"), options=ENDLESS) as page:
        page.get_by_role("textbox", name="Message").fill("First")
        page.keyboard.press("Enter")
        expect(answers(page)).not_to_have_text("")
        page.reload()
        expect(page.locator(".user p")).to_have_text(["First"])
        expect(page.get_by_text("This answer is not finished")).to_be_visible()
        set_options(page, max_tokens=4)
        page.clock.install()
        page.route(re.compile(r"/(page/|health)"), lambda route: route.abort())
        ask(page, "Second")
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        expect(page.get_by_text("left out of the conversation")).to_be_visible()
        expect(page.locator("#away")).to_be_visible()
        page.unroute_all()
        page.clock.fast_forward(2000)  # it tries again every two seconds
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


def test_conversations_are_found_renamed_and_deleted(page):
    say(page, "A kite")
    ask(page, "First")
    page.keyboard.press("Control+k")
    say(page, "An umbrella")
    ask(page, "Second")
    rows = page.locator("#conversations li")
    for text, found in (("umBRELLa", ["Second"]), ("first", ["First"]), ("nowhere", []), ("", ["Second", "First"])):
        page.get_by_role("searchbox").fill(text)
        expect(rows).to_have_text(found)
        expect(page.locator("#no-match")).to_be_visible(visible=not found)
    page.get_by_role("searchbox").fill("nowhere")
    page.keyboard.press("Control+k")
    expect(rows).to_have_text(["Second", "First"])
    page.get_by_role("button", name="Second", exact=True).click()
    rows.first.hover()
    page.get_by_role("button", name="Rename Second").click()
    page.get_by_label("Title").fill("Other")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Other")
    for button, left in (("Keep", ["Other", "First"]), ("Delete", ["First"])):
        rows.first.hover()
        page.get_by_role("button", name="Delete Other").click()
        page.get_by_role("button", name=button, exact=True).click()
        expect(rows).to_have_text(left)
    expect(page.locator(".turn")).to_have_count(0)


def test_back_and_forward_lead_from_one_conversation_to_the_other(page, server):
    say(page, "Yes")
    for text in ("First", "Second"):
        page.keyboard.press("Control+k")
        ask(page, text)
    title = page.locator("h1")
    page.go_back()
    expect(title).to_have_text("First")
    expect(page.locator(".user p")).to_have_text(["First"])
    page.go_forward()
    expect(title).to_have_text("Second")
    first = "import('/static/chat.js').then((chat) => { const read = chat.open(chat.state.conversation.id);"
    page.evaluate(first + " chat.startNew(); return read; })")  # a new chat while the other is still read
    expect(title).to_have_text("New chat")
    assert not page.evaluate("location.hash")
    page.goto(f"{server[0]}/#unknown")
    expect(title).to_have_text("New chat")
    expect(page).to_have_url(f"{server[0]}/")


@pytest.mark.parametrize("page", [ENDLESS], indirect=True)
def test_another_conversation_is_asked_while_one_is_answered(page):
    send, stop = page.locator("#send"), page.locator("#stop")
    for text in ("First", "Second"):
        page.keyboard.press("Control+k")
        expect(send).to_be_visible()
        page.get_by_role("textbox", name="Message").fill(text)
        page.keyboard.press("Enter")
        expect(stop).to_be_visible()
        expect(answers(page)).not_to_have_text("")
    expect(page.get_by_role("img", name="is being answered")).to_have_count(2)
    page.keyboard.press("Escape")
    answered(page)
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator(".user p")).to_have_text(["First"])
    expect(stop).to_be_visible()
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".numbers")).to_contain_text("stopped")
    expect(page.get_by_role("img", name="is being answered")).to_have_count(0)
