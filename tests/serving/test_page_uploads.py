"""The chat page's adapters: the list, uploads over HTTP and in a headless Chromium."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from urllib.parse import urlencode

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import LIMIT, ask, expect, files_of, wait_for  # noqa: E402
from serving_helpers import running  # noqa: E402

from mlx_lora.base.locking import LOCK, locked  # noqa: E402
from mlx_lora.config import ServeConfig  # noqa: E402
from mlx_lora.errors import ConfigError  # noqa: E402
from mlx_lora.formats import load_adapter, save_adapter  # noqa: E402
from mlx_lora.serving.server.uploads import remove_left  # noqa: E402

pytest_plugins = ("page_fixtures",)


def send(client, name: str, files: dict[str, bytes], sizes: dict[str, object] | None = None, **options):
    """An upload of ``files``; ``sizes`` are announced in place of the real ones."""
    given = sizes or {file: len(content) for file, content in files.items()}
    query = urlencode([("name", name), *(("file", f"{file}:{size}") for file, size in given.items())])
    return client.post(f"/page/adapters?{query}", content=b"".join(files.values()), **options)


def names(folders) -> list[str]:
    return sorted(os.listdir(folders[0]))


def message(response) -> str:
    return response.json()["error"]["message"]


def listed(client) -> dict[str, dict]:
    return {each["name"]: each for each in client.get("/page/adapters").json()["adapters"]}


def test_list_of_adapters_tells_method_rank_size_and_what_does_not_fit(client, folders, server):
    client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    found = listed(client)
    adapter = load_adapter(folders[0] / "pirate", base=server[1].engine.bank._base)
    assert found["pirate"]["ranks"] == [4] and found["pirate"]["method"] == "lora" and found["pirate"]["alone"] == []
    assert found["pirate"]["bytes"] == adapter.nbytes and not found["pirate"]["loaded"]
    assert found["dora"]["method"] == "dora" and found["dora"]["alone"]
    other = folders[0] / "other"
    save_adapter(adapter, other, "peft")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NEW"}))
    problem = listed(client)["other"]["problem"]
    assert "NEW" in problem and str(folders[0]) not in problem
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert listed(client)["other"].get("problem") is None  # read again where its files have changed
    for file in other.iterdir():
        file.unlink()
    other.rmdir()


def test_an_upload_is_an_adapter_at_once(client, folders, server):
    made = send(client, "fresh-1", files_of(folders[2] / "fresh"))
    assert made.status_code == 201 and made.json()["ranks"] == [4], made.text
    assert files_of(folders[0] / "fresh-1") == files_of(folders[2] / "fresh")
    body = {"model": "fresh-1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert listed(client)["fresh-1"]["loaded"]
    client.post("/v1/unload_lora_adapter", json={"lora_name": "fresh-1"})
    assert not listed(client)["fresh-1"]["loaded"]
    again = send(client, "fresh-1", files_of(folders[2] / "fresh"))
    assert again.status_code == 400 and "already exists" in message(again)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../up", "a\\b", "a\0b", "é", "x" * 101, "tiny"])
def test_an_uploaded_adapter_has_a_plain_name(client, folders, name):
    before = names(folders)
    answer = send(client, name, files_of(folders[2] / "fresh"))
    assert answer.status_code == 400, answer.text
    assert names(folders) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"adapter_model.bin": pickle.dumps({})}, "run code"),
        ({"weights.PT": b"x"}, "run code"),
        ({"../adapter_model.safetensors": b"x"}, "nor the name of a .safetensors file"),
        ({"a/b.safetensors": b"x"}, "nor the name of a .safetensors file"),
        ({".safetensors": b"x"}, "nor the name of a .safetensors file"),
        ({"README.md": b"x"}, "neither adapter_config.json"),
        ({"adapter_config.json": None}, "adapter_config.json is missing"),
        ({"adapter_model.safetensors": None}, ".safetensors file is missing"),
        ({"adapter_config.json": b"{" * 100_000}, "fresh-2"),
        ({"adapter_config.json": b"[]"}, "fresh-2"),
        ({"adapter_config.json": b"\xff"}, "fresh-2"),
        ({"adapter_config.json": b" " * 1_000_001}, "larger than"),
        ({"adapter_model.safetensors": b"\xff" * 100}, "fresh-2"),
        ({"adapter_model.safetensors": b"\x02" + b"\0" * 7 + b"{}"}, "no arrays"),
        ({f"{number}.safetensors": b"x" for number in range(20)}, "may have at most 16"),
    ],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(client, folders, change, told):
    before = names(folders)
    files = {name: content for name, content in {**files_of(folders[2] / "fresh"), **change}.items() if content}
    answer = send(client, "fresh-2", files)
    assert answer.status_code == 400 and told in message(answer), answer.text
    assert str(folders[0]) not in answer.text and ".upload" not in answer.text
    assert names(folders) == before


def test_every_fault_of_an_upload_is_told_at_once(client):
    told = message(send(client, "fresh-3", {"a.bin": b"x", "b.txt": b"y"}, {"a.bin": "1", "b.txt": "-1"}))
    assert "a.bin" in told and "b.txt" in told and "-1" in told
    files = {"adapter_config.json": b"{}", "a.safetensors": b"x", "A.safetensors": b"x"}  # two are one for a Mac
    assert "'A.safetensors' is listed twice" in message(send(client, "fresh-3", files))


def test_an_adapter_for_another_base_is_refused(client, folders, tmp_path):
    from dataclasses import replace

    import mlx.core as mx

    adapter = load_adapter(folders[2] / "fresh")
    wide = {name: mx.concatenate([w, w]) if name.endswith("lora_a") else w for name, w in adapter.weights.items()}
    save_adapter(replace(adapter, weights=wide), tmp_path / "wide", "peft")
    answer = send(client, "wide", files_of(tmp_path / "wide"))
    assert answer.status_code == 400 and "lora_a" in message(answer)
    assert "wide" not in names(folders)


def test_an_upload_that_is_too_large_or_of_another_length_leaves_nothing(client, folders):
    files, before = files_of(folders[2] / "fresh"), names(folders)
    sizes = {name: len(content) for name, content in files.items()}
    weights = "adapter_model.safetensors"
    too_large = send(client, "long", files, {**sizes, weights: LIMIT})
    assert too_large.status_code == 413, too_large.text
    for size in (sizes[weights] - 1, sizes[weights] + 1):
        answer = send(client, "long", files, {**sizes, weights: size})
        assert answer.status_code == 400 and "than the sizes of its files" in message(answer)
    # Another request keeps the smaller limit of all bodies.
    json_type = {"content-type": "application/json"}
    for body in (b" " * 200_000, iter([b" " * 50_000] * 4)):  # with and without a length
        assert client.post("/v1/chat/completions", content=body, headers=json_type).status_code == 413
    assert names(folders) == before


def test_an_upload_without_a_length_is_cut_off_at_the_limit(client, folders):
    before = names(folders)
    files = files_of(folders[2] / "fresh")

    def endless():
        yield b"".join(files.values())
        for _ in range(LIMIT // 50_000):
            yield b"\0" * 100_000

    query = urlencode([("name", "endless"), *(("file", f"{name}:{len(content)}") for name, content in files.items())])
    with suppress(httpx.TransportError):  # the server may close before everything is sent
        assert client.post(f"/page/adapters?{query}", content=endless()).status_code in (400, 413)
    wait_for(lambda: names(folders) == before)


def test_an_upload_that_the_client_breaks_off_leaves_nothing(server, folders):
    before, files = names(folders), files_of(folders[2] / "fresh")

    def broken():
        yield files["adapter_config.json"]
        wait_for(lambda: any(name.startswith(".upload-") for name in names(folders)))
        raise KeyError("the user closed the tab")

    query = urlencode([("name", "broken"), *(("file", f"{name}:{len(content)}") for name, content in files.items())])
    with httpx.Client(base_url=server[0], timeout=120) as own, pytest.raises(KeyError):
        own.post(f"/page/adapters?{query}", content=broken())
    wait_for(lambda: names(folders) == before)


def test_what_a_killed_server_left_is_removed_but_not_what_another_receives(tmp_path):
    for name in (".upload-dead", ".upload-live", "pirate"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    (tmp_path / ".upload-dead" / LOCK).touch()
    with locked(tmp_path / ".upload-live"):
        remove_left(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".upload-live", "pirate"]


def test_without_the_folders_the_page_is_told_so(folders):
    with running() as (url, _), httpx.Client(base_url=url, timeout=120) as client:
        assert client.get("/page/adapters").json() == {"adapters": [], "upload": None}
        assert client.get("/page/runs").json() == {"runs": None}
        answer = send(client, "fresh", files_of(folders[2] / "fresh"))
        assert answer.status_code == 400 and "--adapters-dir" in message(answer)
        assert client.get("/page/runs/x/points").status_code == 404


@pytest.mark.parametrize("given", [{"upload_limit": 0}, {"upload_limit": 1.5}, {"runs_dir": 5}])
def test_settings_of_uploads_and_runs_are_checked(given):
    with pytest.raises(ConfigError):
        ServeConfig(**given)


# In a browser.


def test_a_folder_is_uploaded_and_answers(page, folders):
    page.allowed = ("400",)
    page.get_by_role("button", name="Adapters", exact=True).click()
    dialog = page.get_by_role("dialog", name="Adapters")
    expect(dialog.get_by_text("rank 4", exact=False).first).to_be_visible()
    page.get_by_label("a folder").set_input_files(folders[2] / "fresh")
    expect(page.locator("#adapter-name")).to_have_value("fresh")
    page.locator("#adapter-name").fill("pirate")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-result")).to_contain_text("already exists")
    page.locator("#adapter-name").fill("from-the-page")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-result")).to_contain_text("fits this model")
    page.get_by_role("button", name="Chat with from-the-page").click()
    expect(page.locator("#open-models")).to_have_text("base | from-the-page")
    ask(page, "Hello")
    expect(page.locator(".answer")).to_have_count(2)
    page.get_by_role("button", name="Adapters", exact=True).click()
    page.get_by_role("button", name="Unload from-the-page").click()
    expect(page.get_by_role("button", name="Unload from-the-page")).to_have_count(0)
    assert files_of(folders[0] / "from-the-page") == files_of(folders[2] / "fresh")


def test_files_that_are_no_adapter_are_told_before_they_are_sent(page, tmp_path):
    config, weights, pickled = (
        tmp_path / name for name in ("adapter_config.json", "x.safetensors", "adapter_model.bin")
    )
    for file in (config, weights, pickled):
        file.write_bytes(b"{}")
    with open(weights, "wb") as file:
        file.truncate(LIMIT + 1)
    page.get_by_role("button", name="Adapters", exact=True).click()
    for files, told in (
        ([config, pickled], "mlx-lora convert"),
        ([config], "no .safetensors file"),
        ([weights], "no adapter_config.json"),
        ([config, weights], "--upload-limit"),
    ):
        page.get_by_label("or its files").set_input_files(files)
        expect(page.locator("#upload-result")).to_contain_text(told)
        expect(page.get_by_role("button", name="Upload")).to_be_disabled()


def test_a_folder_is_dropped_and_its_upload_cancelled(page, folders):
    devtools = page.context.new_cdp_session(page)
    dropped = {"items": [], "files": [str(folders[2] / "fresh")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):  # on the conversation: the dialog opens
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 300, "data": dropped})
    expect(page.locator("#adapter-name")).to_have_value("fresh")
    expect(page.locator("#upload-result")).to_contain_text("adapter_config.json, adapter_model.safetensors: 185.1 kB.")
    page.route("**/page/adapters?*", lambda route: None)  # the upload does not end
    page.locator("#adapter-name").fill("cancelled")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#upload-progress")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#upload-result")).to_have_text("The upload was cancelled, and no files were kept.")
    expect(page.get_by_role("button", name="Upload")).to_be_enabled()
    assert "cancelled" not in names(folders)
