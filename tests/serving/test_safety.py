"""The server as an attacker would use it: what each attempt gets, and that the server answers afterwards."""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import socket
import time

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from serving_helpers import make_adapters, running  # noqa: E402

from mlx_lora.config import ServeConfig  # noqa: E402
from mlx_lora.errors import ConfigError  # noqa: E402

ASK = [{"role": "user", "content": "A red umbrella was found on a bench."}]
CHAT = {"model": "tiny", "messages": ASK, "max_tokens": 2, "temperature": 0}
JSON = {"content-type": "application/json"}
POSTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)


class Exploit:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder, outside = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("outside")
    make_adapters(folder, ("pirate",))
    make_adapters(outside, ("secret",))
    (folder / "link").symlink_to(outside / "secret", target_is_directory=True)
    for name in ("pickled", "broken"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text((folder / "pirate/adapter_config.json").read_text())
    with open(folder / "pickled/adapter_model.bin", "wb") as file:
        pickle.dump(Exploit(folder / "executed"), file)
    (folder / "broken/adapter_model.safetensors").write_bytes(b"\xff" * 100)
    return folder


@pytest.fixture(scope="module")
def server(adapters):
    with running(adapters, body_limit=100_000, max_tokens_limit=200) as (url, server):
        yield url, server


@pytest.fixture
def url(server):
    """The server's address; afterwards it must still answer, and nothing may be left in it."""
    yield server[0]
    assert httpx.post(f"{server[0]}/v1/chat/completions", json=CHAT, timeout=60).status_code == 200
    until(lambda: server[1].engine.active == server[1].engine.queued == 0)


def until(done, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def raw(url: str, data: bytes) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as line:
        line.sendall(data)
        found = b""
        while part := line.recv(65536):
            found += part
    return found


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def post(url: str, path: str = "/v1/chat/completions", **options):
    return httpx.post(f"{url}{path}", timeout=60, **options)


def refused(answer, *statuses: int) -> bool:
    """Whether the answer is an error in the interface's shape that shows nothing of the server's inside."""
    error = answer.json()["error"]
    inside = ("Traceback", "site-packages", "mlx_lora/", ".py", "Error(", "/tmp", "object at 0x")
    assert not any(text in answer.text for text in inside), answer.text
    return answer.status_code in (statuses or (400,)) and bool(error["message"])


def test_adapters_come_by_name_and_never_by_path(server, adapters):
    url, state = server
    for path in ("../pirate", "/etc", str(adapters / "pirate"), "pirate/..", ".", "", "nobody"):
        got = httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
        assert got.status_code == 404, path
    assert httpx.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "pirate"}).status_code == 200
    assert "x" in state.engine.bank.names
    assert {each["name"] for each in httpx.get(f"{url}/lora-adapters").json()} >= {"x", "pirate"}
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 200
    assert "x" not in state.engine.bank.names
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 404


def test_other_hosts_and_pages_are_refused(server):
    url, _ = server
    port = url.rpartition(":")[2]
    for host in ("evil.com", f"evil.com:{port}", "127.0.0.1.evil.com", "localhost.evil.com", ""):
        assert httpx.get(f"{url}/health", headers={"Host": host}).status_code in (400, 403), host
    for host in (f"localhost:{port}", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == 200, host
    for origin in ("http://evil.com", "null", "http://localhost:1", f"https://evil.com/{url}"):
        got = httpx.post(f"{url}/v1/chat/completions", json={}, headers={"Origin": origin})
        assert got.status_code == 403 and "access-control-allow-origin" not in got.headers, origin
    assert httpx.get(f"{url}/v1/models", headers={"Origin": url}).status_code == 200


def test_bodies_are_limited(server):
    url, _ = server
    big = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200_000}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=big).status_code == 413

    def endless():
        for _ in range(300):
            yield b'{"model": "' + b"x" * 1000

    got = httpx.post(f"{url}/v1/chat/completions", content=endless(), headers={"content-type": "application/json"})
    assert got.status_code == 413


def test_a_key_is_asked_for(adapters):
    with running(adapters, api_key="a-secret-key") as (url, _):
        body = {"model": "tiny", "messages": ASK, "max_tokens": 2}
        for headers in (
            {},
            {"Authorization": "Bearer wrong-key"},
            {"Authorization": "a-secret-key"},
            {"x-api-key": ""},
        ):
            assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == 401
        for headers in ({"Authorization": "Bearer a-secret-key"}, {"x-api-key": "a-secret-key"}):
            assert httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/openapi.json").status_code == 401
    for host in ("0.0.0.0", "192.168.0.4", "example.org", "::"):
        with pytest.raises(ConfigError, match="api_key"):
            ServeConfig(host=host)
    assert ServeConfig(host="::1").local and not ServeConfig(host="0.0.0.0", api_key="12345678").local


def test_pages_of_an_allowed_origin(adapters):
    with running(adapters, allow_origin=("http://localhost:3000",)) as (url, _):
        origin = {"Origin": "http://localhost:3000"}
        asked = {**origin, "Access-Control-Request-Method": "POST"}
        wanted = "authorization,x-stainless-os,anthropic-beta"  # of the clients in a browser, among others
        asked["Access-Control-Request-Headers"] = wanted
        got = httpx.options(f"{url}/v1/chat/completions", headers=asked)
        assert got.headers["access-control-allow-headers"] == wanted
        assert got.status_code in (200, 204) and got.headers["access-control-allow-origin"] == origin["Origin"]
        assert httpx.get(f"{url}/v1/models", headers=origin).headers["access-control-allow-origin"] == origin["Origin"]


@pytest.mark.parametrize("path", POSTS)
def test_a_form_of_another_page_is_no_request(url, path):
    body = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"):
        assert refused(post(url, path, content=body, headers={"content-type": kind}), 415), kind
        evil = {"content-type": kind, "origin": "http://evil.example"}
        assert refused(post(url, path, content=body, headers=evil), 403)
    assert refused(post(url, path, content=body), 415)


def test_the_preflight_of_another_page_is_refused(url):
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    got = httpx.options(f"{url}/v1/chat/completions", headers=asked)
    assert refused(got, 403) and not any(name.startswith("access-control") for name in got.headers)


BODIES = {
    "not JSON": b"{",
    "NaN": b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    "Infinity": b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
    "1e999": b'{"model": "tiny", "prompt": "x", "metadata": {"a": 1e999}}',
    "a lone surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
    "broken UTF-8": b'{"model": "tiny", "prompt": "\xff"}',
    "a number of 5,000 digits": b'{"model": "tiny", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
    "a number of 400 digits": b'{"model": "tiny", "prompt": "x", "temperature": 1' + b"0" * 400 + b"}",
    "50,000 levels": b'{"model": "tiny", "prompt": ' + b"[" * 50_000 + b"]" * 40_000 + b"}",
    "500 levels": b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    "another character set": '{"model": "tiny", "prompt": "x"}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_json(url, name):
    assert refused(post(url, "/v1/completions", content=BODIES[name], headers=JSON)), name


def test_a_compressed_body_is_not_unpacked(url):
    bomb = gzip.compress(b'{"model": "' + b"x" * 10_000_000 + b'"}')
    for kind in ("gzip", "deflate", "br", "zstd"):
        assert refused(post(url, content=bomb, headers={**JSON, "content-encoding": kind}), 415)


OPTIONS = {
    "n": (0, -1, 17, 10**9, 1.5, "2", True, [1]),
    "max_tokens": (0, -1, 10**18, 1.5, "9", True),
    "seed": (-1, 2**53 + 1, 2**64, 1e300, "x"),
    "temperature": (-1, 101, "1", True),
    "top_p": (0, -0.1, 1.1),
    "top_logprobs": (-1, 21, 10**9),
    "stop": (["x"] * 65, "x" * 1001, [1], {"a": 1}),
    "logit_bias": ({"-1": 1}, {"5000": 1}, {"01": 1}, {"1": 101}, {"x": 1}, [1], {str(n): 1 for n in range(1025)}),
    "messages": ([], [{}], "x", [ASK], ASK * 10_001, [{"role": "user"}], [{"role": "root", "content": "x"}]),
    "tools": ([{}], [{"type": "function"}], "x", [{"type": "code", "function": {"name": "x"}}], [None]),
    "response_format": ({}, "json", [], {"type": "json_schema"}, {"type": "json_schema", "json_schema": [1]}),
    "chat_template_kwargs": ({"chat_template": "{{ 1 }}"}, {"tokenize": False}, {"messages": []}, {"self": 1}, [1]),
    "metadata": ("x", [1]),
    "tool_choice": ("any", "required", {"type": "function"}, {"type": "function", "function": {"name": "x"}}, 1),
    "stream_options": ({"include": 1}, {"include_usage": 1}),
    "parallel_tool_calls": ("false", 1),
    "functions": ([],),
    "model": ("", 5, "x" * 501),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_beyond_their_limits(url, name):
    for value in OPTIONS[name]:
        got = post(url, json={**CHAT, name: value})
        # 10,001 messages are larger than a body may be here.
        assert refused(got, 400, 413) and (name in got.text or got.status_code == 413), (name, str(value)[:80])


def test_many_messages_are_read_or_refused(server):
    with running(body_limit=4_000_000) as (url, _):
        asked = [{"role": "user", "content": "x"}]
        assert refused(post(url, json={**CHAT, "messages": asked * 10_001}))
        assert "maximum context length is 512" in post(url, json={**CHAT, "messages": asked * 1000}).text
        assert post(url, json={**CHAT, "messages": asked * 50}).status_code == 200


def deep(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


SCHEMAS = {
    "a loop of references": {"$ref": "#"},
    "two references to each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a reference to another machine": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "repeated repetitions": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "a pattern that backtracks": {"type": "string", "pattern": "^(a+)+$"},
    "an automaton of 2^40 states": {"type": "string", "pattern": "(a|b)*a(a|b){40}"},
    "a string of 1e9 characters": {"type": "string", "minLength": 10**9},
    "a list of 1e9 values": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "60 levels": deep(60),
    "5,000 choices": {"enum": [f"choice {n}" for n in range(5000)]},
    "2^12 choices of choices": {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": -n}]} for n in range(12)]},
    "a type of number": {"type": 5},
    "nothing fits": False,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_would_take_for_ever(url, name):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    got = post(url, json={**CHAT, "response_format": wanted})
    assert got.status_code == 200 or refused(got), (name, got.text)


def test_templates_in_messages_are_text(server, url):
    engine, text = server[1].engine, "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}{{ self.__init__ }}"
    shown = engine.tokenizer.decode(engine.prompt([{"role": "user", "content": text}]))
    assert text.replace(" ", "") in shown.replace(" ", "")
    # As in mlx-lm and vLLM, text that looks like a special token is one: who asks can write the template's markers.
    (marker,) = [token for token in ("<|im_end|>",) if token in engine.tokenizer.get_vocab()]
    with_marker = engine.prompt([{"role": "user", "content": f"a{marker}b"}])
    ident = engine.tokenizer.convert_tokens_to_ids(marker)
    assert with_marker.count(ident) == engine.prompt([{"role": "user", "content": "ab"}]).count(ident) + 1


def test_folders_that_are_links_or_pickles(url, adapters):
    load = lambda name: post(url, "/v1/load_lora_adapter", json={"lora_name": name})  # noqa: E731
    assert refused(load("link"), 404)
    assert post(url, json={**CHAT, "model": "link"}).status_code == 404
    for name in ("pickled", "broken"):
        assert refused(load(name), 400, 404), name
        assert refused(post(url, json={**CHAT, "model": name}), 400, 404), name
    assert not (adapters / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "a\0b", "a\r\nX-Evil: 1", "%00"]
)
def test_names_of_models_are_looked_up_and_nothing_else(url, name, caplog):
    got = post(url, json={**CHAT, "model": name})
    assert refused(got, 404) and "x-evil" not in got.headers
    target = name.replace("\0", "%00").replace("\r\n", "%0d%0a").replace(" ", "%20")
    assert refused(httpx.get(f"{url}/v1/models/{target}"), 404)
    assert not any("\r" in record.getMessage() or "\0" in record.getMessage() for record in caplog.records)


def test_null_bytes_in_text_are_text(url):
    assert post(url, json={**CHAT, "messages": [{"role": "user", "content": "a\0b"}]}).status_code == 200


def test_requests_that_http_does_not_allow(url):
    head, body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n", b"{}"
    smuggled = (
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    for lines in (
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n" + body,
        b"Content-Length: -2\r\n\r\n" + body,
        b"Content-Length: 99999999999999999999999\r\n\r\n" + body,
        b"Transfer-Encoding: gzip, chunked\r\n\r\n" + body,
        b"Host: evil.example\r\nContent-Length: 2\r\n\r\n" + body,
        b"X: " + b"x" * 100_000 + b"\r\nContent-Length: 2\r\n\r\n" + body,
        b"X\r\nContent-Length: 2\r\n\r\n" + body,
        smuggled,
    ):
        answer = raw(url, head + b"Connection: close\r\n" + lines)
        assert 400 <= status(answer) < 500, lines[:60]
        assert answer.count(b"HTTP/1.1") == 1, answer  # nothing after it is read as another request
    assert raw(url, head + smuggled).count(b"HTTP/1.1") == 1, "the server itself closes the connection"


def test_old_and_other_ways_to_ask(url):
    assert status(raw(url, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")) == 200
    assert status(raw(url, b"GET /health HTTP/1.0\r\n\r\n")) == 403  # without Host, which would tell the page's name
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n"
    key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    assert b"101 Switching" not in raw(url, upgrade + b"Connection: close\r\n" + key)
    for method in ("TRACE", "OPTIONS", "PUT", "PATCH", "DELETE", "CONNECT", "PROPFIND", "HEAD"):
        got = httpx.request(method, f"{url}/v1/chat/completions", headers={"Cookie": "secret"})
        assert got.status_code in (404, 405) and "secret" not in got.text, method


def test_clients_that_never_finish_are_cut_off(server, url, monkeypatch):
    from mlx_lora.serving.server import protocol, safety

    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: 1\r\n"):
        assert raw(url, begun) == b""  # closed, without an answer
    monkeypatch.setattr(safety, "_BODY_SECONDS", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert status(raw(url, head + b'Content-Length: 50\r\n\r\n{"model"')) == 408


def test_a_client_that_takes_nothing_is_cut_off(server, url, monkeypatch):
    from mlx_lora.serving.server import protocol

    monkeypatch.setattr(protocol, "TAKE_SECONDS", 0.5)
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "logprobs": 20, "max_tokens": 200, "n": 16})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    with line:
        line.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        ours = lambda: [  # noqa: E731
            each.transport
            for each in list(server[1].runner.server_state.connections)
            if each.transport.get_extra_info("peername") == line.getsockname()
        ]
        until(ours)
        for opened in ours():  # the system would keep the whole answer for the client
            opened.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        line.sendall((head + "Content-Type: application/json\r\n\r\n" + body).encode())
        until(lambda: server[1].engine.active > 0)
        until(lambda: server[1].engine.active == 0 and not ours())
        taken = b""
        with contextlib.suppress(ConnectionResetError):
            while some := line.recv(100_000):
                taken += some
        assert taken.startswith(b"HTTP/1.1 200") and b"[DONE]" not in taken


def test_many_large_bodies_at_a_time_are_refused(server, url, monkeypatch):
    from mlx_lora.serving.server import safety

    monkeypatch.setattr(safety, "_BODIES", 0.5)
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * 60_000}]}
    got = post(url, json=large)
    assert refused(got, 503) and got.headers["retry-after"] == "1"


def test_every_answer_tells_browsers_to_be_careful(url):
    for path in ("/health", "/nowhere", "/v1/models"):
        headers = httpx.get(f"{url}{path}").headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "server" not in headers and "access-control-allow-origin" not in headers
