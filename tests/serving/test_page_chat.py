"""Asking and answering on the chat page, in a headless Chromium."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import ASK, END, ENDLESS, HOSTILE, answered, answers, ask, events, expect, say, set_options

pytest_plugins = ("page_fixtures",)


def test_a_question_is_answered_and_kept(page):
    box = page.get_by_role("textbox", name="Message")
    box.fill("にほん")
    box.press("Shift+Enter")
    press = "(it, how) => it.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...how}))"
    for how in ({"isComposing": True}, {"keyCode": 229}):  # ends a word: as Chromium and Firefox tell it, and Safari
        box.evaluate(press, how)
    expect(box).to_have_value("にほん\n")
    ask(page, ASK)
    expect(page.locator(".user p")).to_have_text(ASK)
    expect(page.locator(".numbers")).to_contain_text("tokens/s · first token after")
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


@pytest.mark.parametrize("page", [{"max_tokens": 8}], indirect=True)
def test_several_answer_side_by_side_and_one_is_continued(page):
    page.get_by_role("button", name="Who answers").click()
    for name in ("lawyer", "pirate"):
        page.get_by_role("checkbox", name=name).check()
    page.get_by_role("button", name="Done").click()
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


@pytest.mark.parametrize("page", [ENDLESS], indirect=True)
def test_stop_answer_again_and_edit_lose_nothing(page):
    page.get_by_role("textbox", name="Message").fill("First")
    page.get_by_role("button", name="Send", exact=True).dblclick()
    expect(answers(page)).not_to_have_text("")
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(".numbers")).to_contain_text("stopped")
    expect(page.locator(".plain")).to_have_text("")  # all of it is rendered
    stopped = answers(page).text_content()
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


def test_hostile_answers_do_nothing_in_the_browser(page, server):
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


def test_an_answer_is_read_in_full_scrolled_and_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    table = "|" + "|".join(f"column-{number}" for number in range(20)) + "|\n" + "|-:" * 20 + "|"
    text = f"{table}\n\n" + "long\n\n" * 40 + "```python\nx = 1\n```"
    say(page, text, "I think.")
    ask(page, "Code?")
    thought = page.get_by_text("I think.")
    expect(thought).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    page.get_by_role("button", name="Good answer").click()  # draws the answer anew
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    expect(thought).to_be_visible()
    copied = page.evaluate_handle("() => navigator.clipboard")
    for name, expected in (("Copy the code", "x = 1\n"), ("Copy the answer", text)):
        page.get_by_role("button", name=name).click()
        expect(page.locator("#announce")).to_have_text("Copied")
        assert copied.evaluate("clipboard => clipboard.readText()") == expected
    expect(page.locator(".code .language")).to_have_text("python")
    assert page.get_by_role("region", name="Table").evaluate("it => it.scrollWidth > it.clientWidth")
    assert page.locator("th").first.evaluate("it => getComputedStyle(it).textAlign") == "right"
    page.locator(".user p").scroll_into_view_if_needed()
    page.get_by_role("button", name="Go to the end").click()
    expect(page.get_by_role("button", name="Go to the end")).to_be_hidden()
    expect(page.get_by_role("button", name="Copy the code")).to_be_in_viewport()


def test_an_error_in_one_column_is_shown_there_and_the_conversation_goes_on_with_the_other(page):
    page.get_by_role("button", name="Who answers").click()
    page.get_by_role("checkbox", name="pirate").check()
    page.get_by_role("button", name="Done").click()
    body = events(
        {"kind": "error", "text": "it is broken"},
        {"kind": "text", "column": 1, "text": "Arr"},
        {**END, "column": 1, "html": "<p>Arr</p>"},
    )
    page.route("**/page/chat", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    with page.expect_request("**/page/settings"):  # the adapter may be gone
        ask(page, "First")
    expect(page.locator(".answer").first.get_by_role("alert")).to_have_text("It is broken.")
    expect(page.get_by_role("alert")).to_have_count(1)
    expect(page.get_by_text("left out of the conversation")).to_have_count(0)
    expect(answers(page).last).to_have_text("Arr")
    expect(page.get_by_role("group", name="Answer of pirate").get_by_text("Chosen")).to_be_visible()


def test_settings_are_sent_and_wrong_ones_are_said(page):
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


def test_an_address_chooses_who_answers_and_a_message_waits_until_the_adapters_are_known(page, server):
    held = []
    page.route("**/page/settings", lambda route: held.append(route))
    with page.expect_request("**/page/settings"):
        page.goto(f"{server[0]}/?columns=base,pirate,nobody&prompt=Hello")
    expect(page.get_by_role("textbox", name="Message")).to_have_value("Hello")
    page.get_by_role("textbox", name="Message").press("Enter")
    expect(page.locator("#send")).to_be_hidden()
    for route in held:
        route.continue_()
    expect(page.get_by_role("group", name="Answer of")).to_have_count(2)
    answered(page)
    expect(page.locator("#notice")).to_contain_text("nobody is not among this server's adapters.")
    page.get_by_role("button", name="Close this message").click()
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Who answers").click()
    expect(page.get_by_role("checkbox", name="base (tiny)")).to_be_checked()
    assert "?" not in page.url
