"""The slash commands of ``chat``: what they take, what they say, and what a typing error gets."""

from __future__ import annotations

import io
import json
import sys

import click
import pytest
from chat_helpers import scripted

from mlx_lora.cli.chat import attempt
from mlx_lora.cli.chat.commands import TABLE, Commands, Leave
from mlx_lora.cli.chat.screens import JSON
from mlx_lora.cli.main import main
from mlx_lora.errors import AdapterError, ConfigError
from mlx_lora.tiny_base import PATH

CALLS = [("tool", "f(1)"), ("tool", ""), ("tool", "g")]


def said(commands: Commands, capsys, *lines: str) -> tuple[str, str]:
    """stdout and stderr of these lines."""
    for line in lines:
        attempt(commands, line)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_every_command_has_a_method_and_a_line_of_help(capsys):
    commands = scripted()
    _, err = said(commands, capsys, "/help")
    for name in TABLE:
        assert callable(getattr(commands, name)) and f"/{name}" in err
    assert "Alt+Enter" in err and "Ctrl-C" in err and "after the conversation so far" in err


@pytest.mark.parametrize(
    "line, meant",
    [
        ("/retyr", "did you mean /retry?"),
        ("/re", "did you mean /retry or /reset?"),
        ("/adap", "/adapter or /adapters"),
        ("/comp A B", "did you mean /compare?"),
        ("/zzz", "/zzz is not a command\n"),
        ("/", "is not a command"),
        ("/undo 3", "takes no arguments, not '3'"),
        ("/adapter pirat", "no adapter named 'pirat'; did you mean pirate?"),
        ("/set tmep 1", "did you mean temp?"),
        ("/set temp warm", "temp: 'warm' is not a valid float"),
        ("/set temp 0.5 top_p", "top_p: has no value"),
        ("/set kv_bits 7", "kv_bits must be 2, 3, 4, 5, 6 or 8"),
        ("/set draft_model x", "Start chat again with --draft-model"),
        ("/save", "which file?"),
        ("/load", "which file?"),
        ("/load nowhere.jsonl", "No such file"),
        ("/stats", "no answer yet"),
        ("/retry", "no question yet"),
        ("/compare pirat lawyer", "did you mean /compare pirate lawyer?"),
        ("/compare pirate --", "no text after --"),
    ],
)
def test_what_is_wrong_is_said_with_a_fix(line, meant, capsys):
    out, err = said(scripted(names=("pirate", "lawyer")), capsys, line)
    assert not out and meant in err + "\n" and err.startswith("Error: ") and "\nHint: " in err


@pytest.mark.parametrize(
    "text, adapters, question",
    [
        ("", [], None),
        ("pirate lawyer none", ["pirate", "lawyer", None], None),
        ("pirate base -- Who?", ["pirate", None], "Who?"),
        ("-- pirate", [], "pirate"),
        ("What is a -- b", [], "What is a -- b"),
        ("pirate songs are old", [], "pirate songs are old"),
        ("What's that?", [], "What's that?"),
        ("'two words' pirate", ["two words", "pirate"], None),
    ],
)
def test_names_and_texts_are_told_apart(text, adapters, question):
    commands = scripted(names=("pirate", "lawyer", "two words"))
    assert commands._names_and_text(text) == (adapters, question)


def test_compare_shows_one_answer_after_the_other(capsys):
    commands = scripted("first", ["one", "two", "three"], names=("pirate", "lawyer"))
    said(commands, capsys, "Hello")
    out, err = said(commands, capsys, "/compare none pirate lawyer -- Who are you?")
    assert out == "[base]\none\n[pirate]\ntwo\n[lawyer]\nthree\n"
    assert err == "Asked after the 1 question so far, without adding it to the conversation: Who are you?\n"
    assert [request.adapter for request in commands.conversation.engine.requests] == [None, "pirate", "lawyer"]
    assert commands.conversation.questions == 1


def test_answers_go_to_stdout_and_reasoning_to_stderr(capsys):
    parts = [
        ("reasoning", "hm"),
        ("reasoning", "..."),
        ("normal", "Yes"),
        ("tool", "f(1)"),
        ("tool", ""),
        ("tool", "g"),
    ]
    out, err = said(scripted([parts]), capsys, "Hello")
    assert out == "Yes\nTool call: f(1)\nTool call: g\n" and err == "hm...\n"


def test_json_has_one_line_for_each_answer(capsys):
    commands = scripted([[("reasoning", "hm"), ("normal", "Yes")]], ["a", "b"], names=("pirate",), screen=JSON())
    out, _ = said(commands, capsys, "Hello", "/compare")
    first, base, pirate = map(json.loads, out.splitlines())
    assert first["event"] == "Answer" and (first["text"], first["reasoning"]) == ("Yes", "hm")
    assert first["finish_reason"] == "stop" and first["generation_tokens"] == 4 and first["tool_calls"] == []
    assert [(each["adapter"], each["text"]) for each in (base, pirate)] == [(None, "a"), ("pirate", "b")]


def test_options_are_typed_as_on_the_command_line(capsys):
    commands = scripted()
    lines = ['/set temp 0.7 --top-p 0.9 seed 3 stop "END it"', '/set logit_bias {"5": -1}', "/set max_tokens=9"]
    _, err = said(commands, capsys, *lines)
    config = commands.conversation.config
    assert (config.temp, config.top_p, config.seed, config.stop) == (0.7, 0.9, 3, ("END it",))
    assert config.logit_bias == {5: -1.0} and config.max_tokens == 9 and "Error" not in err
    said(commands, capsys, '/set stop ["a", "b"]', "/set temp default top_p default seed none logit_bias default")
    assert commands.conversation.config.stop == ("a", "b") and commands.conversation.config.seed is None
    _, err = said(commands, capsys, "/set", "/set temp")
    assert "max_tokens" in err and "temp: 0.0. Sampling temperature" in err


def test_every_wrong_value_is_told_at_once_and_none_is_set(capsys):
    commands = scripted()
    before = commands.conversation.config
    _, err = said(commands, capsys, "/set temp hot seed y tmp 4 top_k 5 max_tokens -1")
    assert err.count("Error") == 1 and commands.conversation.config == before
    for told in ("temp: 'hot'", "seed: 'y'", "no option 'tmp'", "did you mean temp", "max_tokens must be", "top_k"):
        assert told in err, err


def test_a_message_may_begin_with_a_slash(capsys):
    commands = scripted("yes")
    assert said(commands, capsys, "//etc/hosts?")[0] == "yes\n"
    assert commands.conversation.messages[0]["content"] == "/etc/hosts?"


def test_the_system_message_starts_a_new_conversation(capsys):
    commands = scripted("yes")
    said(commands, capsys, "Hello", "/system Be brief.")
    assert commands.conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert said(commands, capsys, "/system")[1] == "System message: Be brief.\n"
    said(commands, capsys, "/reset")
    assert commands.conversation.system == "Be brief."
    said(commands, capsys, "/system none")
    assert commands.conversation.messages == []


def test_retry_says_why_the_answer_is_the_same(capsys):
    commands = scripted("yes", "yes", "no")
    assert "with temp 0 answers do not vary" in said(commands, capsys, "Hello", "/retry")[1]
    assert "vary" not in said(commands, capsys, "/retry")[1] and commands.conversation.messages[-1]["content"] == "no"


def test_save_and_load(capsys, tmp_path):
    commands, path = scripted("yes", "no"), tmp_path / "my chat.jsonl"
    _, err = said(commands, capsys, "Hello", f"/save {path}", f"/save {path}", f"/save! {path}")
    assert err.count("Saved") == 2 and "/save!" in err
    path.write_text(path.read_text() * 2)
    said(commands, capsys, "/undo", f"/load {path} 2")
    assert commands.conversation.questions == 1 and commands.conversation.messages[-1]["content"] == "yes"


def test_stats(capsys):
    commands = scripted("yes", ["a", "b"], names=("pirate",))
    said(commands, capsys, "Hello", "/compare")
    _, err = said(commands, capsys, "/stats")
    for fact in ("prompt tokens", "cached", "tokens/s", "first token", "peak memory", "Context length: not known"):
        assert fact in err
    assert "base" in err and "pirate" in err


def test_adapters(capsys, tmp_path):
    commands = scripted(names=("pirate", "none"))
    with click.Context(click.Command("chat")):
        lines = ["/adapter pirate", "/adapters", "/adapter", "/adapter none", f"/adapter {tmp_path}"]
        _, err = said(commands, capsys, *lines)
    assert "pirate (active)" in err and "Adapter: pirate\n" in err and "Adapter: none (" in err
    assert commands.conversation.adapter is None and commands.conversation.engine.bank.loaded == ["pirate"]
    assert "Error" in err, "a folder without an adapter"


def test_leaving():
    for line in ("/quit", "/exit", "/q", " /QUIT "):
        with pytest.raises(Leave):
            scripted().do(line)
    with pytest.raises(AdapterError):
        scripted().do("/adapter x")
    with pytest.raises(ConfigError):
        scripted().do("/x")


def test_piped_chat_is_plain_text_and_reads_a_line_a_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who left the kite?\\\n\n/stats\nAnd now?\n"))
    with pytest.raises(SystemExit) as end:
        main(["chat", "--model", str(PATH), "--max-tokens", "4"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and len(out.splitlines()) == 2 and "\x1b" not in out + err
    assert "prompt tokens" in err and ">" not in out


def test_input_that_is_no_text_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    monkeypatch.setattr("mlx_lora.cli.chat.load_engine", lambda *_: (scripted().conversation.engine, []))
    with pytest.raises(SystemExit) as end:
        main(["chat", "--model", "x"])
    assert end.value.code == 2 and "not UTF-8" in capsys.readouterr().err
