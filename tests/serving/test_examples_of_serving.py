"""The settings for other programs in examples/: they parse, their options exist, and the clients get answers."""

from __future__ import annotations

import configparser
import json
import os
import plistlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_lora.cli.serve import serve

EXAMPLES = Path(__file__).parents[2] / "examples"
# Python code blocks are no commands; a command goes on after a backslash at a line's end.
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string((EXAMPLES / "serve.service").read_text())
    return parser


def commands(name: str) -> list[list[str]]:
    """The commands of mlx-lora in a file of examples, without the program."""
    if name.endswith(".plist"):
        return [plistlib.loads((EXAMPLES / name).read_bytes())["ProgramArguments"][1:]]
    if name.endswith(".service"):
        return [shlex.split(unit()["Service"]["ExecStart"])[1:]]
    lines = [line for block in _BLOCK.findall((EXAMPLES / name).read_text()) for line in shell_lines(block)]
    return [shlex.split(line)[1:] for line in lines if line.startswith("mlx-lora ")]


def shell_lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("name", ["serve.launchd.plist", "serve.service", "open_webui.md", "zed.md"])
def test_every_option_in_the_examples_exists(name):
    found = commands(name)
    assert found
    for command, *arguments in found:
        assert command == "serve"
        assert serve.make_context("serve", arguments).params["model"]


def test_the_system_services_stop_after_the_answers_are_finished():
    from mlx_lora.serving.server.run import _DRAIN

    assert int(unit()["Service"]["TimeoutStopSec"]) > _DRAIN
    plist = plistlib.loads((EXAMPLES / "serve.launchd.plist").read_bytes())
    assert plist["ExitTimeOut"] > _DRAIN and plist["Label"] == "mlx-lora.serve"


def test_the_settings_of_zed_are_json_and_name_the_server():
    (text,) = re.findall(r"^```json\n(.*?)^```", (EXAMPLES / "zed.md").read_text(), re.MULTILINE | re.DOTALL)
    provider = json.loads(text)["language_models"]["openai_compatible"]["mlx-lora"]
    port = serve.make_context("serve", commands("zed.md")[0][1:]).params["port"]
    assert provider["api_url"] == f"http://127.0.0.1:{port}/v1"
    assert [model["name"] for model in provider["available_models"]] == ["base", "reviewer"]


def test_open_webui_asks_the_port_and_host_that_the_server_has():
    text = (EXAMPLES / "open_webui.md").read_text()
    asked = re.findall(r"OPENAI_API_BASE_URL=http://([\w.]+):(\d+)/v1", text)
    contexts = [serve.make_context("serve", arguments).params for _, *arguments in commands("open_webui.md")]
    assert len(asked) == len(contexts) == 3
    for (host, port), params in zip(asked, contexts, strict=True):
        assert params["port"] == int(port)
        assert host == params["host"] or host in params["allow_host"] or params["api_key"]


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    from serving_helpers import running

    with running(api_key="a key of tests") as (url, _):
        yield url


@pytest.mark.parametrize(("script", "package", "path"), [("openai", "openai", "/v1"), ("anthropic", "anthropic", "")])
def test_the_clients_print_an_answer(server, script, package, path):
    pytest.importorskip(package)
    given = {"MLX_LORA_URL": server + path, "MLX_LORA_API_KEY": "a key of tests", "MODEL": "base"}
    command = [sys.executable, str(EXAMPLES / f"{script}_client.py")]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.strip()) > 3, done.stderr
