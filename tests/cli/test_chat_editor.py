"""The line editor of ``chat``: keys, completion, history, the toolbar. prompt_toolkit reads from a pipe here."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from chat_helpers import scripted
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_lora.cli.chat import editor as editors
from mlx_lora.cli.chat import talk
from mlx_lora.cli.chat.editor import Editor, history_file


@pytest.fixture(autouse=True)
def history(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "state" / "history"
    monkeypatch.setenv("MLX_LORA_HISTORY", str(path))
    return path


@pytest.fixture
def keyboard():
    with create_pipe_input() as pipe:
        yield pipe


def read(keyboard, keys: str, commands=None) -> str:
    keyboard.send_text(keys)
    return Editor(commands or scripted(), input=keyboard, output=DummyOutput())()


@pytest.mark.parametrize(
    "keys, text",
    [
        ("Hello\r", "Hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt+Enter
        ("one\\\rtwo\r", "one\ntwo"),
        ("a\\b\r", "a\\b"),
        ("\x1b[200~one\n\ntwo\x1b[201~\r", "one\n\ntwo"),  # pasted
        ("Hullo\x1b[D\x1b[D\x1b[D\x7fe\r", "Hello"[:1] + "ello"),
    ],
)
def test_what_is_sent(keyboard, keys, text):
    assert read(keyboard, keys) == text


def test_ctrl_c_and_ctrl_d(keyboard):
    with pytest.raises(KeyboardInterrupt):
        read(keyboard, "Hello\x03")
    with pytest.raises(EOFError):
        read(keyboard, "\x04")


def test_history_lasts_over_sessions(keyboard, history):
    assert read(keyboard, "one\x1b\rtwo\r") == "one\ntwo"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert read(keyboard, "\x1b[A\r") == "one\ntwo"  # the arrow upwards


def test_a_history_that_others_could_read_is_closed_to_them(keyboard, history):
    history.parent.mkdir()
    history.write_text("\n+before\n")
    history.chmod(0o644)
    assert read(keyboard, "\x1b[A\r") == "before" and stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["", "/proc/nowhere/history", "{folder}", "{file}/history"])
def test_without_a_place_for_the_history(keyboard, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MLX_LORA_HISTORY", place.format(folder=tmp_path, file=tmp_path / "file"))
    assert read(keyboard, "Hello\r") == "Hello" and (tmp_path / "file").read_text() == "mine"


def test_a_history_that_cannot_be_read_or_written_any_more(keyboard, history):
    kept = Editor(scripted(), input=keyboard, output=DummyOutput())._session.history
    history.unlink()
    history.mkdir()
    assert list(kept.load_history_strings()) == []
    kept.append_string("Hello")
    assert kept.get_strings() == ["Hello"]


def test_where_the_history_is_by_default(monkeypatch):
    monkeypatch.delenv("MLX_LORA_HISTORY")
    assert history_file().name == "chat_history" and "mlx-lora" in str(history_file())


@pytest.mark.parametrize(
    "text, words",
    [
        ("/", {"adapter", "adapters", "compare", "system", "retry", "undo", "save", "load", "set", "stats"}),
        ("/ad", {"adapter", "adapters"}),
        ("/adapter pi", {"pirate"}),
        ("/adapter ", {"pirate", "lawyer", "none", "folder"}),
        ("/adapter fo", {"folder"}),
        ("/compare pirate la", {"lawyer"}),
        ("/set te", {"temp"}),
        ("/set temp 0.7 top", {"top_p", "top_k"}),
        ("/set temp ", set()),
        ("/save! ch", {"chat.jsonl"}),
        ("/load ", {"chat.jsonl", "folder"}),
        ("Hello /ad", set()),
        ("/undo ", set()),
        ("/system /ad", set()),
    ],
)
def test_completion(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "chat.jsonl").touch()
    completer = editors._completer(scripted(names=("pirate", "lawyer")))
    found = {}
    for each in completer.get_completions(Document(text, len(text)), CompleteEvent()):
        begun = text[len(text) + each.start_position :] if each.start_position else ""
        found[each.display_text.rstrip("/")] = begun + each.text
    names = set(found) - {"state"}
    assert names >= words if text == "/" else names == words


def test_the_toolbar(keyboard):
    commands = scripted("yes", names=("pirate",))
    edit = Editor(commands, input=keyboard, output=DummyOutput())
    assert edit._toolbar() == "adapter: none"
    commands.do("/adapter pirate")
    commands.do("Hello")
    assert edit._toolbar() == "adapter: pirate  7 tokens  8.0 tokens/s"


def test_a_conversation_from_first_to_last_key(keyboard, capsys):
    commands = scripted("yes", "no")
    edit = Editor(commands, input=keyboard, output=DummyOutput())
    keys = iter(["Hello\r", "half\x03", "/undo\r", "/wrong\r", "Again\r", "\x04"])

    def typed() -> str:
        keyboard.send_text(next(keys))
        return edit()

    talk(commands, typed)
    out, err = capsys.readouterr()
    assert out == "yes\nno\n" and [m["content"] for m in commands.conversation.messages] == ["Again", "no"]
    for text in ("/help lists", "Ctrl-D or /quit", "Removed: Hello", "/wrong is not a command"):
        assert text in err


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_answering(capsys, times):
    import signal

    commands, before = scripted(["one", "two"], "three", names=("a",)), signal.getsignal(signal.SIGINT)
    show = commands.screen.show

    def interrupted(events, *args):
        def at_the_first(events):
            for number, event in enumerate(events):
                if number == 0:
                    for _ in range(times):
                        signal.raise_signal(signal.SIGINT)
                yield event

        show(at_the_first(events), *args)

    commands.screen.show = interrupted
    lines = iter(["/compare a none -- Hello", "/quit"])
    talk(commands, lambda: next(lines))
    err = capsys.readouterr().err
    assert "Stopped." in err and ("Interrupted." in err) == (times == 2)
    assert signal.getsignal(signal.SIGINT) is before and not commands.conversation.messages


def test_ctrl_c_in_a_command_that_is_no_answer(capsys, monkeypatch):
    import signal

    commands = scripted(names=("a",))
    monkeypatch.setattr(commands.conversation, "switch", lambda name: signal.raise_signal(signal.SIGINT))
    lines = iter(["/adapter a", "/quit"])
    talk(commands, lambda: next(lines))
    assert "Interrupted." in capsys.readouterr().err


@pytest.mark.parametrize("term, codes", [("dumb", False), ("xterm", True)])
def test_a_dumb_terminal_gets_no_control_codes(monkeypatch, keyboard, capsys, term, codes):
    import prompt_toolkit.output

    monkeypatch.setenv("TERM", term)
    made = []
    monkeypatch.setattr(prompt_toolkit.output, "create_output", lambda **_: made.append(1) or DummyOutput())
    edit = Editor(scripted(), input=keyboard)
    keyboard.send_text("Hello\r")
    assert edit() == "Hello" and bool(made) == codes and "\x1b" not in capsys.readouterr().out
