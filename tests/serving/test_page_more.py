"""Around the chat page: uploads of adapters, runs as they go, and the accessibility of every dialog."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import ask, chromium, opened  # noqa: E402
from serving_helpers import make_adapters, running  # noqa: E402

from mlx_lora.base.locking import LOCK, is_locked, locked  # noqa: E402
from mlx_lora.config import ServeConfig  # noqa: E402
from mlx_lora.errors import ConfigError  # noqa: E402
from mlx_lora.formats import load_adapter, save_adapter  # noqa: E402
from mlx_lora.serving.server.uploads import remove_left  # noqa: E402

LIMIT = 3_000_000
KEY = "a key of tests"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(adapters, runs, to_upload): the server's two folders, and adapters that it does not have yet."""
    made = [tmp_path_factory.mktemp(name) for name in ("adapters", "runs", "to_upload")]
    make_adapters(made[0], ("pirate", "dora"))
    make_adapters(made[2], ("fresh",))
    return made


@pytest.fixture(scope="module")
def server(folders):
    with running(folders[0], runs_dir=str(folders[1]), upload_limit=LIMIT, body_limit=100_000) as (url, server):
        yield url, server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server[0], timeout=120) as client:
        yield client


def send(client, name: str, files: dict[str, bytes], sizes: dict[str, object] | None = None, **options):
    """An upload of ``files``; ``sizes`` are announced in place of the real ones."""
    given = sizes or {file: len(content) for file, content in files.items()}
    query = urlencode([("name", name), *(("file", f"{file}:{size}") for file, size in given.items())])
    return client.post(f"/page/adapters?{query}", content=b"".join(files.values()), **options)


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def names(folders) -> list[str]:
    return sorted(os.listdir(folders[0]))


def message(response) -> str:
    return response.json()["error"]["message"]


def listed(client) -> dict[str, dict]:
    return {each["name"]: each for each in client.get("/page/adapters").json()["adapters"]}


# Adapters.


def test_list_of_adapters_tells_method_rank_size_and_what_does_not_fit(client, folders, server):
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
    assert again.status_code == 400 and "exists already" in message(again)


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
        ({"../adapter_model.safetensors": b"x"}, "no name of a .safetensors file"),
        ({"a/b.safetensors": b"x"}, "no name of a .safetensors file"),
        ({".safetensors": b"x"}, "no name of a .safetensors file"),
        ({"README.md": b"x"}, "not adapter_config.json"),
        ({"adapter_config.json": None}, "adapter_config.json is missing"),
        ({"adapter_model.safetensors": None}, ".safetensors file is missing"),
        ({"adapter_config.json": b"{" * 100_000}, "fresh-2"),
        ({"adapter_config.json": b"[]"}, "fresh-2"),
        ({"adapter_config.json": b"\xff"}, "fresh-2"),
        ({"adapter_config.json": b" " * 1_000_001}, "larger than"),
        ({"adapter_model.safetensors": b"\xff" * 100}, "fresh-2"),
        ({"adapter_model.safetensors": b"\x02" + b"\0" * 7 + b"{}"}, "no arrays"),
        ({f"{number}.safetensors": b"x" for number in range(20)}, "may have 16"),
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
    assert "'A.safetensors' is announced twice" in message(send(client, "fresh-3", files))


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
        assert answer.status_code == 400 and "than its files" in message(answer)
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


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# Runs.


def line(kind: str, at: float = 1000.0, **fields) -> str:
    return json.dumps({"kind": kind, "time": at, **fields}) + "\n"


def begin(iters: int = 100, at: float = 1000.0) -> str:
    return line("Run", at, iteration=0, settings={"train": {"iters": iters}}) + line("Started", at, iters=iters)


def train(iteration: int, loss: float | None, at: float = 1000.0) -> str:
    return line("TrainReport", at, iteration=iteration, train_loss=loss, iterations_per_second=1.0)


def write(folder: Path, text: str, how: str = "a") -> None:
    folder.mkdir(exist_ok=True)
    with open(folder / "log.jsonl", how) as file:
        file.write(text)


def run_of(client, name: str) -> dict:
    return {run["name"]: run for run in client.get("/page/runs").json()["runs"]}[name]


def losses(client, name: str, version: str = "", after: int = 0) -> dict:
    return client.get(f"/page/runs/{name}/points?version={version}&after={after}").json()


def test_a_run_in_progress_is_read_as_it_grows(client, folders):
    folder = folders[1] / "growing"
    folder.mkdir()
    with locked(folder):
        assert run_of(client, "growing")["state"] == "starting"
        now = time.time()
        write(folder, begin(at=now - 20) + line("ValReport", now - 20, iteration=0, val_loss=3.0))
        write(folder, train(10, 2.0, now - 10) + train(20, 1.5, now)[:-20])
        found = run_of(client, "growing")
        assert found["state"] == "running" and found["iteration"] == 10 and found["points"] == 2
        assert found["unreadable"] == 0 and (found["train_loss"], found["val_loss"]) == (2.0, 3.0)
        first = losses(client, "growing")
        assert first["losses"] == [["validation", 0, 3.0], ["training", 10, 2.0]]
        write(folder, train(20, 1.5, now)[-20:])
        more = losses(client, "growing", first["version"], 2)
        assert more["start"] == 2 and more["losses"] == [["training", 20, 1.5]]
        assert 0 < more["seconds_left"] <= 80  # 80 iterations at one a second, less what has passed since
        write(folder, line("Done", iteration=100, stopped=False, reason="complete"))
        assert run_of(client, "growing")["state"] == "finished"
    assert not (folder / LOCK).exists()


def test_a_killed_run_an_empty_one_and_broken_lines(client, folders):
    killed, empty, broken = (folders[1] / name for name in ("killed", "empty", "broken"))
    write(killed, begin() + train(10, None))
    (killed / LOCK).touch()  # as a process that is killed leaves it
    write(empty, "")
    write(broken, 'not JSON\n[1]\n{"kind": 5}\n' + "[" * 100_000 + "\n" + begin() + train(10, 1.0))
    write(broken, line("Done", iteration=10, stopped=True, reason="stopped"))
    (folders[1] / "no run").mkdir()
    outside = folders[2] / "outside"
    write(outside, begin())
    (folders[1] / "link").symlink_to(outside)
    found = {run["name"]: run for run in client.get("/page/runs").json()["runs"]}
    assert not {"no run", "link", "outside"} & set(found)
    assert found["killed"]["state"] == "interrupted" and found["killed"]["train_loss"] is None
    assert found["empty"]["state"] == "empty" and found["empty"]["report"] is None
    assert found["broken"]["state"] == "stopped" and found["broken"]["unreadable"] == 4
    assert losses(client, "killed")["losses"] == [["training", 10, None]]
    assert (killed / LOCK).exists()  # looking changes nothing


def test_a_log_that_is_begun_anew_is_sent_from_its_beginning(client, folders):
    folder = folders[1] / "resumed"
    write(folder, begin() + train(10, 2.0) + train(20, 1.5))
    first = losses(client, "resumed")
    new = folder / "new"
    new.write_text(begin() + train(10, 2.0) + line("Run", settings={}) + train(15, 1.0) + train(25, 0.9))
    os.replace(new, folder / "log.jsonl")  # as resuming does, here with a longer log than before
    more = losses(client, "resumed", first["version"], len(first["losses"]))
    assert more["start"] == 0 and [point[1] for point in more["losses"]] == [10, 15, 25]
    write(folder, begin(), "w")
    assert losses(client, "resumed", more["version"], 3)["losses"] == []


def test_early_end_is_a_state_of_its_own(client, folders):
    write(folders[1] / "early", begin() + line("Done", iteration=50, stopped=False, reason="patience"))
    assert run_of(client, "early")["state"] == "ended early"


def test_report_is_shown_isolated(client, folders):
    write(folders[1] / "a b&c", begin() + train(10, 2.0))
    address = run_of(client, "a b&c")["report"]
    answer = client.get(f"/{address}")
    assert answer.status_code == 200 and "<html" in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox") and "default-src 'none'" in policy and "allow-scripts" not in policy


@pytest.mark.parametrize("name", ["%2e%2e", "..%2f..", "%2fetc", "no run", "link", ""])
def test_only_names_of_runs_can_be_asked_for(client, folders, name):
    for path in (f"/page/runs/{name}/points", f"/reports/{name}"):
        assert client.get(path).status_code in (404, 405), path
    assert client.post(f"/page/runs/{name}/adapter", json={"checkpoint": "best"}).status_code in (404, 405)


def test_checkpoints_of_a_run_in_the_folder_of_adapters_can_be_chosen(folders, tmp_path):
    run = tmp_path / "mine"
    adapter = load_adapter(folders[2] / "fresh")
    for folder in (run, run / "best"):
        save_adapter(adapter, folder)
    (run / "training_state.safetensors").write_bytes(b"")
    write(run, begin() + train(10, 2.0))
    with (
        running(tmp_path, runs_dir=str(tmp_path), api_key=KEY) as (url, server),
        httpx.Client(base_url=url, timeout=120, headers={"authorization": f"Bearer {KEY}"}) as client,
    ):
        found = run_of(client, "mine")
        assert found["checkpoints"] == ["best", "last"]
        for checkpoint, path in (("best", run / "best"), ("last", run / "adapters.safetensors")):
            for _ in range(2):  # again is no error
                made = client.post("/page/runs/mine/adapter", json={"checkpoint": checkpoint})
                assert made.json() == {"name": f"mine-{checkpoint}"}, made.text
            assert server.engine.bank._sources[f"mine-{checkpoint}"].path == path
        assert client.post("/page/runs/mine/adapter", json={"checkpoint": "../x"}).status_code == 400
        # A report is opened without the key, by a signed address only.
        with httpx.Client(base_url=url, timeout=120) as other:
            assert other.get("/page/runs").status_code == 401
            assert other.get(f"/{found['report']}").status_code == 200
            for wrong in ("reports/mine", found["report"][:-1], found["report"].replace("until=", "until=9")):
                assert other.get(f"/{wrong}").status_code == 403


def test_without_the_folders_the_page_is_told_so(folders):
    with running() as (url, _), httpx.Client(base_url=url, timeout=120) as client:
        assert client.get("/page/adapters").json() == {"adapters": [], "upload": None}
        assert client.get("/page/runs").json() == {"runs": None}
        answer = send(client, "fresh", files_of(folders[2] / "fresh"))
        assert answer.status_code == 400 and "--adapters-dir" in message(answer)
        assert client.get("/page/runs/x/points").status_code == 404


def test_the_lock_of_a_run_is_looked_at_without_taking_it(tmp_path):
    assert not is_locked(tmp_path)
    (tmp_path / LOCK).touch()
    assert not is_locked(tmp_path) and (tmp_path / LOCK).exists()
    with open(tmp_path / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(tmp_path)


@pytest.mark.parametrize("given", [{"upload_limit": 0}, {"upload_limit": 1.5}, {"runs_dir": 5}])
def test_settings_of_uploads_and_runs_are_checked(given):
    with pytest.raises(ConfigError):
        ServeConfig(**given)


# The page itself.


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_a_folder_is_uploaded_and_answers(browser, server, folders):
    from playwright.sync_api import expect

    with opened(browser, server[0], allowed=("400",)) as page:
        page.get_by_role("button", name="Adapters", exact=True).click()
        dialog = page.get_by_role("dialog", name="Adapters")
        expect(dialog.get_by_text("rank 4", exact=False).first).to_be_visible()
        page.get_by_label("a folder").set_input_files(folders[2] / "fresh")
        expect(page.locator("#adapter-name")).to_have_value("fresh")
        page.locator("#adapter-name").fill("pirate")
        page.get_by_role("button", name="Upload").click()
        expect(page.locator("#upload-result")).to_contain_text("exists already")
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


def test_files_that_are_no_adapter_are_told_before_they_are_sent(browser, server, tmp_path):
    from playwright.sync_api import expect

    config, weights, pickled = (
        tmp_path / name for name in ("adapter_config.json", "x.safetensors", "adapter_model.bin")
    )
    for file in (config, weights, pickled):
        file.write_bytes(b"{}")
    with open(weights, "wb") as file:
        file.truncate(LIMIT + 1)
    with opened(browser, server[0]) as page:
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


def test_a_run_is_drawn_as_it_goes(browser, server, folders):
    from playwright.sync_api import expect

    folder = folders[1] / "watched"
    folder.mkdir()
    with locked(folder), opened(browser, server[0]) as page:
        write(folder, begin(at=time.time()) + line("ValReport", iteration=0, val_loss=3.0) + train(10, 2.0))
        page.get_by_role("button", name="Runs", exact=True).click()
        card = page.locator("#run-list > li", has_text="watched")
        expect(card).to_contain_text("Running")
        expect(card).to_contain_text("Iteration 10 of 100 · loss 2.000 · validation loss 3.000")
        expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("training from 2.00 to 2.00"))
        write(folder, train(20, 1.0))
        expect(card).to_contain_text("Iteration 20 of 100")
        expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("training from 2.00 to 1.00"))
        write(folder, line("Done", iteration=100, stopped=False, reason="complete"))
        expect(card).to_contain_text("Finished")
        with page.expect_popup() as popup:
            card.get_by_role("link", name="Report of watched").click()
        expect(popup.value.locator("h1")).to_contain_text("watched")


def test_a_checkpoint_of_a_run_answers_beside_the_base(browser, folders, tmp_path):
    from playwright.sync_api import expect

    save_adapter(load_adapter(folders[2] / "fresh"), tmp_path / "mine")
    (tmp_path / "mine" / "training_state.safetensors").write_bytes(b"")
    write(tmp_path / "mine", begin() + train(10, 2.0))
    with (
        running(tmp_path, runs_dir=str(tmp_path), api_key=KEY) as (url, _),
        opened(browser, url, allowed=("401",)) as page,
    ):
        page.locator("#key-value").fill(KEY)
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name="Runs", exact=True).click()
        page.get_by_role("button", name="Chat with the last checkpoint of mine").click()
        expect(page.locator("#open-models")).to_have_text("base | mine-last")
        page.get_by_role("button", name="Runs", exact=True).click()
        with page.expect_popup() as popup:
            page.get_by_role("link", name="Report of mine").click()
        expect(popup.value.locator("h1")).to_contain_text("mine")


# Labels that reach over the edge of their chart.
CUT_OFF = """dialog => [...dialog.querySelectorAll("svg:not([hidden]) text")].filter((it) => {
    const own = it.getBoundingClientRect(), chart = it.ownerSVGElement.getBoundingClientRect();
    return own.left < chart.left || own.right > chart.right;
}).map((it) => it.textContent)"""
DIALOGS = ("adapters", "runs", "models", "settings", "files", "help")


# No colour depends on the width, and no width on the colours. From 832 pixels the list of conversations is in the page.
@pytest.mark.parametrize(("theme", "widths"), [("light", (390, 820, 1440)), ("dark", (390,))])
def test_axe_finds_no_serious_fault(browser, server, folders, theme, widths):
    from playwright.sync_api import expect

    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    write(folders[1] / "drawn", begin() + train(10, 12.34) + train(20, 0.0000432))

    def check(page, where: str, part: str = "body") -> None:
        found = page.evaluate("part => axe.run(part, {resultTypes: ['violations']})", part)["violations"]
        told = [
            (each["id"], node["html"][:200], node.get("failureSummary", "")[:300])
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert not told, f"{where}: {told}"

    with opened(browser, f"{server[0]}/?columns=base,pirate", color_scheme=theme, reduced_motion="reduce") as page:
        page.evaluate(axe.axe_script)
        ask(page, "Anna left a red kite at the park.")
        expect(page.locator(".answer")).to_have_count(2)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 844})
            if width != 820:
                check(page, f"compare view at {width}")
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, f"the page is {overflow} pixels wider than {width}"
            heads = {head.bounding_box()["height"] for head in page.locator(".answer h3").all()}
            assert len(heads) == 1, f"the answers' texts begin at different heights at {width}: {heads}"
            if width == 390:
                page.get_by_role("button", name="Conversations").click()
                check(page, "list of conversations", "#sidebar")
            for name in DIALOGS:
                page.locator(f"#open-{name}").dispatch_event("click")
                dialog = page.locator(f"dialog#{name}")
                expect(dialog).to_be_visible()
                if name in ("adapters", "runs"):
                    expect(dialog.locator(".card").first).to_be_visible()
                if name == "runs":
                    assert dialog.evaluate(CUT_OFF) == [], f"labels of a chart are cut off at {width}"
                if width == 390:
                    check(page, name, f"#{name}")
                assert dialog.evaluate("it => it.scrollWidth - it.clientWidth") <= 0, f"{name} at {width} is too wide"
                page.keyboard.press("Escape")
                expect(dialog).to_be_hidden()
            if width == 390:
                page.locator("#close-sidebar").dispatch_event("click")
            page.get_by_role("button", name="Show the difference").click()
            expect(page.locator("#difference-text ins").first).to_be_visible()
            for name in ("difference", "rename", "delete", "key"):
                dialog = page.locator(f"dialog#{name}")
                if name != "difference":
                    dialog.evaluate("it => it.showModal()")
                if width == 390:
                    check(page, name, f"#{name}")
                assert dialog.evaluate("it => it.scrollWidth - it.clientWidth") <= 0, f"{name} at {width} is too wide"
                dialog.evaluate("it => it.close()")
