"""Runs on the chat page as they go: over HTTP and in a headless Chromium."""

from __future__ import annotations

import fcntl
import os
import re
import time

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import begin, expect, line, opened, train, write  # noqa: E402
from serving_helpers import running  # noqa: E402

from mlx_lora.base.locking import LOCK, is_locked, locked  # noqa: E402
from mlx_lora.formats import load_adapter, save_adapter  # noqa: E402

pytest_plugins = ("page_fixtures",)


KEY = "a key of tests"


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


def test_the_lock_of_a_run_is_looked_at_without_taking_it(tmp_path):
    assert not is_locked(tmp_path)
    (tmp_path / LOCK).touch()
    assert not is_locked(tmp_path) and (tmp_path / LOCK).exists()
    with open(tmp_path / LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(tmp_path)


# In a browser.


def test_a_run_is_drawn_as_it_goes(browser, server, folders):
    folder = folders[1] / "watched"
    folder.mkdir()
    with locked(folder), opened(browser, server[0]) as page:
        page.clock.install()
        write(folder, begin(at=time.time()) + line("ValReport", iteration=0, val_loss=3.0) + train(10, 2.0))
        page.get_by_role("button", name="Runs", exact=True).click()
        card = page.locator("#run-list > li", has_text="watched")
        expect(card).to_contain_text("Running")
        expect(card).to_contain_text("Iteration 10 of 100 · loss 2.000 · validation loss 3.000")
        expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("training from 2.00 to 2.00"))
        write(folder, train(20, 1.0))
        page.clock.fast_forward(2000)  # the page looks every two seconds
        expect(card).to_contain_text("Iteration 20 of 100")
        expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("training from 2.00 to 1.00"))
        write(folder, line("Done", iteration=100, stopped=False, reason="complete"))
        page.clock.fast_forward(2000)
        expect(card).to_contain_text("Finished")
        with page.expect_popup() as popup:
            card.get_by_role("link", name="Report of watched").click()
        expect(popup.value.locator("h1")).to_contain_text("watched")


def test_a_checkpoint_of_a_run_answers_beside_the_base(browser, folders, tmp_path):
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
