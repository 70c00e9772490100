"""``demo --chat``: what it trains, serves and opens, with two training steps in place of the real number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from mlx_lora.cli import demo_chat
from mlx_lora.cli.demo import demo
from mlx_lora.cli.main import cli
from mlx_lora.errors import ConfigError
from mlx_lora.serving import server
from mlx_lora.tiny_base import PATH, skill

SHORT = """
import dataclasses, webbrowser
from mlx_lora.cli import demo_chat, main
demo_chat.ROWS = {"train": 8, "valid": 2}
demo_chat.TRAIN = dataclasses.replace(demo_chat.TRAIN, iters=2, batch_size=2, steps_per_eval=2)
webbrowser.open = lambda url: print("opened", url, flush=True)
main.main(["demo", "--chat"])
"""


def test_trains_two_adapters_opens_the_page_and_ends_at_ctrl_c(tmp_path):
    pytest.importorskip("fastapi")
    environment = {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"} | {"DISPLAY": ":0"}
    run = subprocess.Popen(
        [sys.executable, "-c", SHORT],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(Path(demo_chat.__file__).parents[2])},
        text=True,
    )
    watch = threading.Timer(300, run.kill)  # so that a run that hangs fails the test
    watch.start()
    try:
        opened = run.stdout.readline().split()
        assert opened[:1] == ["opened"], (tmp_path / "stderr").read_text()
        url = urlsplit(opened[1])
        assert parse_qs(url.query) == {"columns": ["base,record,reply"], "prompt": [demo_chat.PROMPT]}
        address = f"http://{url.netloc}"
        settings = urllib.request.urlopen(f"{address}/page/settings", timeout=120).read().decode()
        assert '"reply"' in settings and '"record"' in settings
        runs = urllib.request.urlopen(f"{address}/page/runs", timeout=120).read().decode()
        assert runs.count('"finished"') == 2
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
    finally:
        watch.cancel()
        run.kill()
        run.stdout.close()
    told = (tmp_path / "stderr").read_text()
    assert opened[1] in told and "Traceback" not in told
    assert (tmp_path / "demo_chat" / ".mlx-lora-demo").exists()  # the next demo may replace it


@pytest.mark.parametrize("command", [["demo", "--chat"], ["serve", "--model", str(PATH)]])
def test_a_python_that_is_too_old_is_told_before_anything_else(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, ConfigError) and "needs Python 3.11 or newer" in result.exception.message


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older Python is refused first")
def test_missing_packages_are_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lora.serving.server.run", None)
    monkeypatch.delattr(server, "run", raising=False)  # other tests may have imported it
    monkeypatch.setattr(demo_chat.demo, "quantized_base", lambda folder: pytest.fail("the demo began"))
    with pytest.raises(ConfigError, match="demo --chat needs packages") as error:
        demo_chat.chat_demo(tmp_path, 0, False)
    assert "pip install" in error.value.hint and "fastapi" in error.value.hint


def test_a_port_that_is_taken_is_told_before_the_training(tmp_path, monkeypatch):
    import socket

    pytest.importorskip("fastapi")
    monkeypatch.setattr(demo_chat.demo, "quantized_base", lambda folder: pytest.fail("the demo began"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot be used"):
        demo_chat.chat_demo(tmp_path, taken.getsockname()[1], False)
    with pytest.raises(ConfigError, match="cannot be used"):
        demo_chat.chat_demo(tmp_path, 70_000, False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--chat", "--json"], "has no --json output"),
        (["--port", "1"], "need --chat"),
        (["--no-browser"], "need --chat"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, told):
    result = CliRunner().invoke(demo, arguments)
    assert result.exit_code == 2 and told in result.output


def test_no_browser_opens_in_a_terminal_or_over_ssh(monkeypatch):
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not demo_chat._has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert demo_chat._has_display()
    monkeypatch.setenv("SSH_CONNECTION", "here there")
    assert not demo_chat._has_display()


def test_the_two_skills_answer_the_same_notes_differently():
    record, reply = (skill.rows("train", 20, answer=answer) for answer in demo_chat.ANSWERS)
    for one, other in zip(record, reply, strict=True):
        assert one["messages"][0] == other["messages"][0] and one["messages"][1] != other["messages"][1]
    assert reply[0]["messages"][1]["content"].startswith("We found your ")
    assert record == skill.rows("train", 20)


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
@pytest.mark.parametrize(("arguments", "extra", "offers"), [([], "plain", True), (["--chat"], "serve", False)])
def test_the_script_of_a_checkout_offers_the_page_and_installs_what_it_needs(tmp_path, arguments, extra, offers):
    import shutil

    checkout = Path(demo_chat.__file__).parents[2]
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/demo", "scripts/environment.sh", "pyproject.toml"):
        shutil.copy(checkout / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "mlx-lora", "uv"):
        (programs / name).write_text('#!/bin/sh\necho "$(basename "$0") $*"\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "scripts" / "demo"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == " ".join(["mlx-lora demo", *arguments])
    assert (tmp_path / ".venv" / f".installed-{extra}").exists()
    assert ("./scripts/demo --chat" in done.stderr) == offers
