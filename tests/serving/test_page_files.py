"""Conversations and judged answers as files: exported, trained on, imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import answered, ask, expect, say

from mlx_lora.cli.main import cli
from mlx_lora.tiny_base import PATH

pytest_plugins = ("page_fixtures",)


def exported(page, button: str, folder):
    page.get_by_role("button", name="Import and export").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name=button).click()
    path = folder / saved.value.suggested_filename
    saved.value.save_as(path)
    page.get_by_role("button", name="Done").click()
    return path


def train(data: Path, loss: str | None) -> None:
    """Two iterations of ``mlx-lora train`` on the file."""
    given = {"--model": PATH, "--data": data, "--adapter-path": data.with_suffix(""), "--iters": 2}
    given.update({"--loss": loss} if loss else {})
    done = CliRunner().invoke(cli, ["train", *(str(part) for pair in given.items() for part in pair)])
    assert done.exit_code == 0, done.output
    assert (data.with_suffix("") / "adapters.safetensors").is_file()


def test_train_learns_from_what_the_page_exports(page, tmp_path):
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
    for button, loss, rows in (
        (
            "This conversation",
            None,
            [{"messages": [*one[:2], {**one[2], "reasoning_content": "Because."}, two[3], good]}],
        ),
        ("Preference pairs", "dpo", [{"prompt": two, "chosen": [good], "rejected": [bad]}]),
        (
            "Judged answers",
            "kto",
            [
                {"prompt": one[:2], "completion": [bad], "label": True},
                {"prompt": two, "completion": [bad], "label": False},
                {"prompt": two, "completion": [good], "label": True},
            ],
        ),
    ):
        path = exported(page, button, tmp_path)
        assert [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] == rows, button
        train(path, loss)
    chats = exported(page, "All conversations", tmp_path)
    page.get_by_role("button", name="Import and export").click()
    page.get_by_label("Conversations: one JSON object").set_input_files(chats)
    expect(page.locator("#import-result")).to_have_text("1 conversation imported.")
    page.keyboard.press("Escape")
    page.locator("#conversations li button").first.click()
    expect(page.get_by_role("group", name="Answer of imported")).to_have_count(2)
    page.get_by_role("button", name="Import and export").click()
    with page.expect_download() as saved:
        page.get_by_role("button", name="This conversation").click()
    assert saved.value.path().read_bytes() == chats.read_bytes()


def test_a_malformed_file_is_refused_with_its_lines_and_files_of_other_tools_are_imported(page, tmp_path):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    bad = {
        "{": "Line 2: it is not JSON",
        "[]": 'no list "messages"',
        '{"messages": []}': "no message of the user",
        '{"messages": [{"role": "tool", "content": "x"}]}': 'role "tool"',
        '{"messages": [{"role": "user", "content": 5}]}': "message 1 is not text",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "expected user",
        '{"messages": [null]}': "message 1 has the role undefined",
        '{"conversations": [{"from": "tool", "value": "x"}]}': 'role "tool"',
    }
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, *bad]))
    page.get_by_role("button", name="Import and export").click()
    page.locator("#import").set_input_files(path)
    result = page.locator("#import-result")
    expect(result).to_contain_text("Nothing was imported.")
    for text in bad.values():
        expect(result).to_contain_text(text)
    expect(page.locator("#conversations li")).to_have_count(0)
    sharegpt = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}, {"role": "user", "content": "c"}]
    files = {
        "lines.jsonl": f"\ufeff{json.dumps({'id': 1, 'conversations': sharegpt})}\r\n\r\n",
        "array.json": json.dumps([{"messages": parts}, {"conversations": sharegpt}], indent=2),
    }
    told = ("1 conversation imported.", "2 conversations imported.")
    for (name, text), expected in zip(files.items(), told, strict=True):
        (tmp_path / name).write_text(text, "utf-8", newline="")
        page.locator("#import").set_input_files(tmp_path / name)
        expect(result).to_have_text(expected)
    page.keyboard.press("Escape")
    expect(page.locator("#conversations li")).to_have_text(["c", "a", "a"])
    page.get_by_role("button", name="a", exact=True).first.click()
    expect(page.locator(".user p")).to_have_text(["a"])
    expect(page.get_by_role("group", name="Answer of imported").locator(".body")).to_have_text("b")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be kind.")
