"""``push`` and ``pull``, run as commands against a local server that imitates the Hub."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import mlx.core as mx
import pytest
import yaml

from mlx_lora import load_adapter, save_adapter
from mlx_lora.errors import ConfigError, FormatError, HubError
from mlx_lora.formats import describe
from mlx_lora.hub import model_card, push

ROOT = Path(__file__).resolve().parent
ADAPTER = ROOT / "fixtures/peft/llama/dora"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The requests that huggingface-hub makes for small files; the repositories are in a dict."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]
    token = "hf_right"

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *_):
        pass

    def answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.token}":
            return False
        self.answer({"error": "Invalid credentials"}, 401)
        return True

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, {})
            return self.answer({"url": f"{self.here}/{name}", "name": name, "id": name}, 409 if known else 200)
        if found := re.match(r"/api/models/(.+)/preupload/(.+)$", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if found := re.match(r"/api/models/(.+)/commit/(.+)$", path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.repos[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"commitUrl": f"{self.here}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        self.answer({"error": path}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return None if self.refused() else self.answer({"name": "me", "type": "user", "orgs": []})
        if (found := re.match(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/.+)?$", path)) and found[1] in self.repos:
            files = self.repos[found[1]]
            if found[2] == "tree":
                return self.answer(
                    [{"type": "file", "path": n, "size": len(d), "oid": sha1(d).hexdigest()} for n, d in files.items()]
                )
            return self.answer({"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})
        found = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", path)
        if found and found[2] in self.repos.get(found[1], {}):
            data = self.repos[found[1]][found[2]]
            return self.answer(data, headers={"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """(repositories, a function that runs the command line against them)."""
    repos: dict[str, dict[str, bytes]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisTest", (Hub,), {"repos": repos}))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*arguments, **environment) -> subprocess.CompletedProcess:
        settings = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "hf_right",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT.parent),
            **environment,
        }
        command = [sys.executable, "-m", "mlx_lora", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)

    yield repos, run
    server.shutdown()
    server.server_close()


def test_push_and_pull(hub, tmp_path):
    repos, run = hub
    folder = shutil.copytree(ADAPTER, tmp_path / "mine")
    (folder / "training_state.safetensors").write_bytes(b"private")
    done = run("push", folder, "me/tuned", "--model", "Qwen/Qwen3-0.6B", "--metric", "val_loss=1.25", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"].endswith(COMMIT)
    assert repos["me/tuned"].keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = repos["me/tuned"]["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen3-0.6B" and "| val_loss | 1.25 |" in card
    done = run("pull", "me/tuned", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (ADAPTER / name).read_bytes()
    # An existing folder is not replaced; offline, the earlier download is copied.
    done = run("pull", "me/tuned", tmp_path / "again")
    assert done.returncode == 1 and "already exists" in done.stderr
    done = run("pull", "me/tuned", tmp_path / "offline", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert load_adapter(tmp_path / "offline").modules
    done = run("push", folder, "me/tuned", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and "Traceback" not in done.stderr


def test_a_single_file_and_the_users_own_card(hub, tmp_path):
    repos, run = hub
    base = ROOT / "fixtures/peft/llama/base"
    file = save_adapter(load_adapter(ROOT / "fixtures/peft/llama/lora"), tmp_path / "a.gguf", "gguf", base=base)
    assert run("push", file, "me/file").returncode == 0
    assert repos["me/file"].keys() == {"a.gguf", "README.md"}
    done = run("pull", "me/file", tmp_path / "back", "--json")
    assert json.loads(done.stdout)["format"] == "gguf"
    folder = shutil.copytree(ADAPTER, tmp_path / "mine")
    (folder / "README.md").write_text("mine")
    assert run("push", folder, "me/other").returncode == 0
    assert repos["me/other"]["README.md"] == b"mine"


def test_a_folder_of_a_format_of_one_file(hub):
    """DeepSpeed's folders can be read and not written; their one file is uploaded all the same."""
    repos, run = hub
    done = run("push", ROOT / "fixtures/formats/deepspeed-chat", "me/deepspeed")
    assert done.returncode == 0, done.stderr
    assert repos["me/deepspeed"].keys() == {"pytorch_model.bin", "README.md"}


def test_refusals_of_the_hub_and_of_push(hub, tmp_path):
    repos, run = hub
    done = run("push", ADAPTER, "me/tuned", HF_TOKEN="hf_wrong")
    assert done.returncode == 1 and "log in" in done.stderr and not repos
    done = run("pull", "me/none", tmp_path / "x")
    assert done.returncode == 1 and "me/none" in done.stderr and not (tmp_path / "x").exists()
    repos["me/model"] = {"config.json": b"{}", "README.md": b"x"}
    done = run("pull", "me/model", tmp_path / "x")
    assert done.returncode == 1 and "no adapter" in done.stderr and not (tmp_path / "x").exists()
    done = run("push", ADAPTER, "no-owner")
    assert done.returncode == 2 and "owner/name" in done.stderr
    done = run("push", tmp_path, "me/empty")
    assert done.returncode == 1 and "me/empty" not in repos


def test_the_card_describes_the_adapter_and_names_no_local_path():
    facts = describe(ADAPTER)
    training = {"data": str(ROOT), "iters": 100, "learning_rate": 1e-4}
    card = model_card({**facts, "base": str(ROOT)}, "me/tuned", training=training, metrics={"test_loss": 0.5})
    head = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in head and head["library_name"] == "peft" and "dora" in head["tags"]
    assert str(ROOT) not in card and "| iters | 100 |" in card and "| test_loss | 0.5 |" in card
    for words in ("PeftModel.from_pretrained", "mlx_lm.generate", "llama-cli", "| Rank | 4 |", "| Alpha | 8 |"):
        assert words in card


class FakeApi:
    """Stands for ``HfApi``: keeps what would be uploaded, or raises ``error``."""

    uploaded: ClassVar[dict[str, bytes]] = {}
    public, error = False, None

    def create_repo(self, repo, **_):
        if self.error is not None:
            raise self.error

    def repo_info(self, repo):
        return type("Info", (), {"private": not self.public})

    def create_commit(self, repo, operations, **_):
        type(self).uploaded = {
            o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations
        }  # the files exist only now
        return type("Commit", (), {"commit_url": f"https://hub/{repo}"})


@pytest.fixture
def api(monkeypatch):
    import huggingface_hub

    kind = type("Api", (FakeApi,), {})
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    return kind


@pytest.mark.parametrize("base", [None, "Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("format", ["mlx-lm", "peft"])
def test_what_is_uploaded_names_no_path(format, base, api, tmp_path):
    adapter = replace(load_adapter(ADAPTER), base=str(ROOT / "fixtures/peft/llama/base"))
    folder = save_adapter(adapter, tmp_path / "mine", format)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["training"] = {"data": str(tmp_path), "iters": 7}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    notes: list[str] = []
    push(folder, "me/tuned", base=base, notes=notes)
    assert len(api.uploaded) == 3
    for data in api.uploaded.values():
        assert str(ROOT).encode() not in data and str(tmp_path).encode() not in data
    sent = json.loads(api.uploaded["adapter_config.json"])
    key = "model" if format == "mlx-lm" else "base_model_name_or_path"
    assert sent.get(key) == base and sent["training"] == {"iters": 7}
    assert str(tmp_path) in (folder / "adapter_config.json").read_text(), "the user's own folder stays as it is"
    assert any("--model" in note for note in notes) == (base is None)


def test_a_private_push_is_not_made_public(api):
    push(ADAPTER, "me/tuned", private=True)
    api.public, api.uploaded = True, {}
    with pytest.raises(HubError, match="is public, so --private has no effect"):
        push(ADAPTER, "me/tuned", private=True)
    assert not api.uploaded


def test_damage_is_told_from_missing_facts(api, tmp_path):
    """A file without alpha can be pushed; NaN cannot, whatever the message is called."""
    save_adapter(load_adapter(ROOT / "fixtures/peft/llama/lora"), tmp_path / "a.pt", "loralib")
    push(tmp_path / "a.pt", "me/loralib")
    adapter = load_adapter(ROOT / "fixtures/peft/llama/lora")
    name = next(iter(adapter.weights))
    broken = replace(adapter, weights={**adapter.weights, name: adapter.weights[name].astype(mx.int32)})
    folder = save_adapter(adapter, tmp_path / "broken")
    mx.save_safetensors(str(folder / "adapters.safetensors"), broken.weights)
    with pytest.raises(FormatError, match="int32"):
        push(folder, "me/broken")


@pytest.mark.parametrize(
    ("kind", "status", "hint"),
    [
        ("RepositoryNotFoundError", 401, "log in with a valid token"),
        ("RepositoryNotFoundError", 404, "Check the name"),
        ("GatedRepoError", 403, "Accept the repository's conditions"),
        ("RevisionNotFoundError", 404, "main branch"),
        ("HfHubHTTPError", 403, "write access"),
        ("HfHubHTTPError", 400, "correct what it names"),
        ("HfHubHTTPError", 503, "try again"),
        ("OfflineModeIsEnabled", None, "Unset HF_HUB_OFFLINE"),
        ("LocalTokenNotFoundError", None, "log in"),
    ],
)
def test_each_refusal_has_its_own_hint(kind, status, hint, api, monkeypatch):
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = getattr(errors, kind)
    api.error = error("It says no", response=response) if status else error("It says no")
    with pytest.raises(HubError) as caught:
        push(ADAPTER, "me/tuned")
    assert (hint in caught.value.hint and "It says no" in caught.value.message) or kind == "OfflineModeIsEnabled"
    api.error = ConnectionError("no route")
    with pytest.raises(HubError, match="no route") as caught:
        push(ADAPTER, "me/tuned")
    assert caught.value.hint == "Check the network, and try again."


def test_a_model_is_not_pushed_as_an_adapter(api, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match="is a model") as error:
        push(tmp_path, "me/tuned")
    assert "hf upload" in error.value.hint


def test_a_base_is_named_as_on_the_hub(api, tmp_path):
    with pytest.raises(ConfigError, match="is a path"):
        push(ADAPTER, "me/tuned", base=str(tmp_path))
    folder = shutil.copytree(ADAPTER, tmp_path / "mine")
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="without metrics"):
        push(folder, "me/tuned", metrics={"loss": 1.0})
