"""A pytest plugin (``-p kernel_run``) that runs the tests of one ``backend`` and writes each result at once.

``mlx_lora/bench/kernel_tests.py`` uses it on a GPU. A line of the file of results is JSON: how many tests were
selected; which test begins; or its outcome. So if a test ends its process, the file tells which one it was, and the
next process goes on after it. The tests take turns, one of each function, then the next of each: a run cut short has
seen every kind.
"""

from __future__ import annotations

import json
from collections import defaultdict

import mlx_lora  # isort: skip  (opens a BLAS before MLX is imported)
import mlx.core as mx
import pytest

assert mlx_lora


def pytest_addoption(parser):
    group = parser.getgroup("kernel run")
    group.addoption("--backend", help="run only the tests on this backend: metal, cuda, emulated or reference")
    group.addoption("--results", help="file to add a line to for every test that begins or ends")
    group.addoption("--most", type=int, help="run at most this many tests")


def pytest_configure(config):
    config.pluginmanager.register(_Run(config.getoption("backend"), config.getoption("results"), config))


class _Run:
    def __init__(self, backend: str, results: str, config: pytest.Config):
        self.backend, self.results, self.most = backend, results, config.getoption("most")
        self.seeds: list[str] = []

    def write(self, line: dict) -> None:
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        wanted = [i for i in items if (s := getattr(i, "callspec", None)) and s.params.get("backend") == self.backend]
        turns: dict[str, int] = defaultdict(int)
        place = {}
        for item in wanted:
            kind = item.nodeid.partition("[")[0]
            place[item] = turns[kind]
            turns[kind] += 1
        wanted = sorted(wanted, key=place.get)[: self.most]
        try:
            with open(self.results, encoding="utf-8") as file:
                done = {line["test"] for line in map(json.loads, file) if "outcome" in line}
        except FileNotFoundError:
            done = set()
        self.write({"selected": len(wanted)})
        items[:] = [item for item in wanted if item.nodeid not in done]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.seeds.clear()
        self.outcome = {"outcome": "passed", "message": "", "seed": ""}
        self.write({"test": item.nodeid, "begins": True})
        seed = mx.random.seed

        def noted(value):
            self.seeds.append(str(value))
            seed(value)

        mx.random.seed = noted
        try:
            yield
        finally:
            mx.random.seed = seed
        self.write({"test": item.nodeid, **self.outcome, "seed": ", ".join(self.seeds[-3:])})

    def pytest_runtest_logreport(self, report):
        if report.failed:
            text = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
            self.outcome = {"outcome": "failed", "message": " ".join(text.split())[:400]}
        elif report.skipped and self.outcome["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome = {"outcome": "skipped", "message": reason.removeprefix("Skipped: ")}
