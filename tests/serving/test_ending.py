"""How a server ends: it drains, or stops at once, or is killed, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from serving_helpers import running  # noqa: E402

from mlx_lora.serving import delivery  # noqa: E402
from mlx_lora.serving.server import run  # noqa: E402
from mlx_lora.tiny_base import PATH  # noqa: E402

CHAT = {"model": "base", "messages": [{"role": "user", "content": "A red umbrella."}], "temperature": 0}
ENDLESS = {"2": -100, "0": -100, "1": -100}  # the biases of the tokens that end an answer


def until(done, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def ask(url: str, **options):
    return httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **options}, timeout=100)


@pytest.fixture
def held(monkeypatch):
    """(address, server, event that lets it compute, list for the answer that one client waits for)."""
    monkeypatch.setattr(run, "_DRAIN", 100.0)
    with running() as (url, server):
        go, step, got = threading.Event(), server.engine.step, []
        monkeypatch.setattr(server.engine, "step", lambda: go.wait(0.02) and step())
        client = threading.Thread(target=lambda: got.append(ask(url, max_tokens=5)), daemon=True)
        client.start()
        until(lambda: server.engine.queued == 1)
        try:
            yield url, server, go, got
        finally:
            go.set()
            client.join(60)


def test_running_answers_are_finished_and_new_ones_refused(held):
    url, server, go, got = held
    server.runner.handle_exit(signal.SIGTERM, None)
    refused = ask(url, max_tokens=5)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/health").json()["status"] == "shutting down"
    assert not server.runner.should_exit and not got
    go.set()
    until(lambda: got and not server.worker.alive)
    assert got[0].status_code == 200 and got[0].json()["usage"]["completion_tokens"] == 5
    assert server.runner._captured_signals == []  # so that the process exits with 0


def test_a_second_signal_ends_at_once(held):
    _, server, _, _ = held
    server.runner.handle_exit(signal.SIGINT, None)
    server.runner.handle_exit(signal.SIGTERM, None)
    assert server.runner.force_exit and server.runner._captured_signals == [signal.SIGINT, signal.SIGTERM]
    server.runner._captured_signals.clear()
    server.worker.stop()
    until(lambda: not server.worker.alive)


def test_an_answer_that_takes_too_long_is_cut_off_with_an_error_and_does_not_hold_the_end_up(held, monkeypatch):
    url, server, go, got = held
    monkeypatch.setattr(run, "_DRAIN", 0.1)
    server.runner.config.timeout_graceful_shutdown = 60
    go.set()
    until(lambda: got)
    engine, step, steps = server.engine, server.engine.step, iter(range(10))  # too few for the whole answer
    monkeypatch.setattr(engine, "step", lambda: (not engine.active or next(steps, None) is not None) and step())
    body = {**CHAT, "stream": True, "max_tokens": 8000, "logit_bias": ENDLESS}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=100) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.runner.handle_exit(signal.SIGTERM, None)
        last = [line for line in lines if line][-1]  # httpx raises where the connection breaks off
    assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    until(lambda: not server.worker.alive)


def test_a_dead_thread_shows_in_health_and_refuses_at_once(monkeypatch):
    with running() as (url, server):
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "active": 0, "queued": 0}
        assert "mlx_lora_worker_alive 1.0" in httpx.get(f"{url}/metrics").text

        def dies():
            raise SystemExit  # no Exception, which would end the rows alone

        monkeypatch.setattr(server.engine, "step", dies)
        until(lambda: not server.worker.alive)
        assert httpx.get(f"{url}/health").status_code == 503
        assert "mlx_lora_worker_alive 0.0" in httpx.get(f"{url}/metrics").text
        got = ask(url)
        assert got.status_code == 503 and "retry-after" in got.headers and server.engine.queued == 0


def test_a_row_that_fails_ends_alone(monkeypatch):
    with running() as (url, _):
        answers = []
        text = ask(url, max_tokens=8).json()["choices"][0]["message"]["content"]

        def failing(row, *rest):
            if row.request.config.max_tokens == 9:
                row.guard.error = RuntimeError("secret inside")
            return delivery.deliver(row, *rest)

        monkeypatch.setattr("mlx_lora.serving.engine.deliver", failing)
        threads = [
            threading.Thread(target=lambda most=most: answers.append(ask(url, max_tokens=most)))
            for most in (8, 9, 8, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 200, 500, 500] and not any("secret" in answer.text for answer in answers)
        good = [answer.json() for answer in answers if answer.status_code == 200]
        assert all(answer["choices"][0]["message"]["content"] == text for answer in good)


def start(port: int, temporary) -> tuple[subprocess.Popen, str]:
    """A server as a process of its own, and its address. It loads MLX anew, which takes seconds."""
    command = [sys.executable, "-m", "mlx_lora", "serve", "--model", str(PATH), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("Serving at "):
            return process, line.split()[2]
    raise AssertionError("".join(said))


def left_in(folder) -> list[str]:
    """The files there, but for MLX's own cache of compiled kernels."""
    return [path.name for path in folder.iterdir() if path.name != "mlx"]


def test_a_killed_server_leaves_nothing_behind_and_sigterm_is_a_clean_end(tmp_path):
    process, url = start(0, tmp_path)
    try:
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 8000, "logit_bias": ENDLESS})
        headers = {"content-type": "application/json"}
        lines: list[str] = []
        with (
            suppress(httpx.HTTPError),  # the connection breaks
            httpx.stream("POST", f"{url}/v1/chat/completions", content=body, headers=headers, timeout=100) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    process.kill()
        assert len(lines) >= 4 and "data: [DONE]" not in lines
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stderr.close()
    assert left_in(tmp_path) == []
    process, again = start(int(url.rpartition(":")[2]), tmp_path)  # on the same port, at once
    try:
        assert again == url and ask(url, max_tokens=2).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()
    assert left_in(tmp_path) == []
