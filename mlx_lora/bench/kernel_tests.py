"""Runs a checkout's kernel tests on one backend, even if a test ends the process. See ``tests/kernel_run.py``."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from .report import Failure, KernelTests

FOLDERS = ("tests/kernels", "tests/fast")
PATIENCE = 60  # seconds for one test


def load_emulator(tests: str | Path) -> ModuleType:
    """The Metal emulator among the tests of a checkout."""
    if str(tests) not in sys.path:
        sys.path.insert(0, str(tests))
    return importlib.import_module("mslemu")


def run_kernel_tests(
    root: Path,
    log: Path,
    backend: str,
    seconds: float,
    environment: dict[str, str],
    most: int | None = None,
    folders: tuple[str, ...] = FOLDERS,
    patience: float = PATIENCE,
) -> Iterator[KernelTests]:
    """Run the tests whose ``backend`` fixture is ``backend``, and continue after tests that end or hang the process.

    Args:
        root: of the checkout. log: pytest's output. most: tests at most. patience: seconds for one test.

    Yields: about once a second, the results so far.
    """
    begin, results = time.monotonic(), log.with_suffix(".jsonl")
    results.unlink(missing_ok=True)
    paths = [str(root / "tests"), *(environment.get("PYTHONPATH") or "").split(os.pathsep)]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "kernel_run"]
    command += ["--backend", backend, "--results", str(results), *(["--most", str(most)] if most else []), *folders]
    with open(log, "w", encoding="utf-8") as output:
        while True:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            size, moved = _size(results), math.inf  # patience begins with the first test
            try:
                while process.poll() is None:
                    now = time.monotonic()
                    if (new := _size(results)) != size:
                        size, moved = new, now
                        yield _read(results, backend)
                    if now - begin > seconds or now - moved > patience:
                        break
                    time.sleep(min(1.0, patience / 4))
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            out_of_time = time.monotonic() - begin > seconds
            if out_of_time or not _mark_unfinished(results, process.returncode):
                break
    yield _read(results, backend)


def _size(results: Path) -> int:
    return results.stat().st_size if results.exists() else 0


def _lines(results: Path) -> list[dict]:
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _mark_unfinished(results: Path, code: int) -> bool:
    """Record the test that was running when the process ended as failed. False if none had begun."""
    lines = _lines(results)
    done = {line["test"] for line in lines if "outcome" in line}
    running = [line["test"] for line in lines if "begins" in line and line["test"] not in done]
    if not running:
        return False
    what = "did not end in its time" if code == -signal.SIGKILL else f"ended its process with code {code}"
    with open(results, "a", encoding="utf-8") as file:
        failed = {"test": running[-1], "outcome": "failed", "message": f"The test {what}.", "seed": ""}
        file.write(json.dumps(failed) + "\n")
    return True


def _read(results: Path, backend: str) -> KernelTests:
    names = {"metal": "Metal", "cuda": "CUDA"}
    found = KernelTests(backend=names.get(backend, backend))
    for line in _lines(results):
        if "selected" in line:
            found.selected = max(found.selected, line["selected"])
        elif line.get("outcome") == "passed":
            found.passed += 1
        elif line.get("outcome") == "skipped":
            found.skipped[line["message"]] = found.skipped.get(line["message"], 0) + 1
        elif "outcome" in line:
            command = f"{os.path.relpath(sys.executable)} -m pytest '{line['test']}'"
            found.failures.append(Failure(line["test"], line["seed"], line["message"], command))
    return found
