"""Fixtures of the chat page's tests: one server for all modules of a process, and a Chromium for each module.

The Chromium ends with its module, as Playwright's event loop keeps other tests of the process from running theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_helpers import LIMIT, chromium, opened, set_options
from serving_helpers import make_adapters, running


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """(adapters, runs, to_upload): the server's two folders, and adapters that it does not have yet."""
    made = [tmp_path_factory.mktemp(name) for name in ("adapters", "runs", "to_upload")]
    make_adapters(made[0], ("pirate", "lawyer", "dora"))
    make_adapters(made[2], ("fresh",))
    return made


@pytest.fixture(scope="session")
def server(folders) -> Iterator[tuple[str, Any]]:
    """(address, server) of the tiny base, whose answers are short unless a test asks for more."""
    settings = {"runs_dir": str(folders[1]), "upload_limit": LIMIT, "body_limit": 100_000, "max_tokens_limit": 2000}
    with running(folders[0], **settings) as (url, server):
        server.defaults = replace(server.defaults, max_tokens=12)
        yield url, server


@pytest.fixture(scope="session")
def client(server) -> Iterator[Any]:
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server[0], timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def tab(browser) -> Iterator[Any]:
    """A tab of a module's tests. A context for each test would take twice the time: it starts processes anew."""
    with opened(browser, "about:blank") as found:
        found.devtools = found.context.new_cdp_session(found)
        yield found


@pytest.fixture
def page(tab, server, request) -> Iterator[Any]:
    """The page as a new user finds it; with options of sampling where a test gives them as the fixture's parameter.

    Errors that a test causes on purpose are named in ``page.allowed``.
    """
    tab.allowed = ()
    tab.goto(server[0])
    if hasattr(request, "param"):
        set_options(tab, **request.param)
    yield tab
    for other in tab.context.pages:
        if other is not tab:
            other.close()
    tab.unroute_all(behavior="ignoreErrors")
    tab.context.clear_permissions()
    tab.evaluate("sessionStorage.clear()")
    tab.goto("about:blank")
    tab.devtools.send("Storage.clearDataForOrigin", {"origin": server[0], "storageTypes": "all"})
    faults, tab.faults = tab.faults, []
    assert not faults, faults
