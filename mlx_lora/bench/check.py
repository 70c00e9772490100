"""``bench check``: all checks that need a GPU, in one run, the most informative first in case it is cut short.

The kernel tests run under pytest, the measured parts in a worker: both in separate processes, so that a failing GPU
ends only one test or part. The complete report is written again after every result.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from .. import __version__, device
from ..errors import ConfigError
from .kernel_tests import load_emulator, run_kernel_tests
from .markdown import markdown
from .parts import PARTS
from .report import CUT_SHORT, DONE, FAILED, NOT_REACHED, RUNNING, Figure, Part, Report, write_report, write_whole
from .thermal import thermal_state

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; the tests are not part of an installed package
TESTS = "kernel tests"
# The order, and each part's share of the time. Time that a part leaves goes to later parts.
SHARES = {TESTS: 35, "kernels": 15, "decoding": 22, "training": 20, "prompts": 4, "swaps": 4}
WORKER = (sys.executable, "-m", "mlx_lora.bench.worker")
GRACE = 20  # seconds beyond its time after which a part is killed


class Check:
    """One run. ``report`` always holds the results so far.

    Args:
        out: folder for report.json, report.md and kernel-tests.log.
        minutes: the budget. emulate: a dry run on the Metal emulator of the tests, with tiny models.
        tests: how many kernel tests at most; all by default.

    Raises: ConfigError: MLX does not compute on a GPU, there is no checkout for ``emulate``, or no time is given.
    """

    def __init__(self, out: str | Path, minutes: float = 6.0, emulate: bool = False, tests: int | None = None):
        if minutes <= 0:
            raise ConfigError(f"minutes must be above 0, not {minutes}", "A whole check takes about 6 minutes.")
        if emulate and not (ROOT / "tests" / "mslemu").is_dir():
            raise ConfigError("the emulator is in a checkout's tests/, which is not here", "Run it from a checkout.")
        if emulate and (why := load_emulator(ROOT / "tests").unavailable()):
            raise ConfigError(f"the emulator does not run here: {why}", "Leave --emulate out on a machine with a GPU.")
        if not emulate and device.is_cpu():
            raise ConfigError(
                "MLX computes on neither Metal nor CUDA here, so there is nothing to check",
                "Run it on a Mac with Apple silicon or on Linux with an NVIDIA GPU, or add --emulate for a dry run.",
            )
        self.out, self.emulate, self.most_tests = Path(out), emulate, tests
        self.out.mkdir(parents=True, exist_ok=True)
        self._begin, self._budget = time.monotonic(), 60 * minutes
        found = device.describe()
        self.report = Report(
            machine=found,
            advice=device.advice(found),
            versions=versions(),
            started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            minutes=float(minutes),
            emulated=emulate,
            parts=[Part("doctor", DONE), *(Part(name) for name in SHARES)],
        )

    def run(self) -> Iterator[Part]:
        """Run everything; yields each part when it begins and when it has ended. Ctrl-C leaves a complete report."""
        try:
            self._write()
            yield self.report.parts[0]
            yield from self._tests()
            yield from self._measure()
            reached = all(part.state != NOT_REACHED for part in self.report.parts)
            self.report.ended = "finished" if reached else "out of time"
        except BaseException as error:
            self.report.ended = "failed" if isinstance(error, Exception) else "interrupted"
            raise
        finally:
            self._write()

    def _left(self) -> float:
        return self._budget - (time.monotonic() - self._begin)

    def _write(self) -> None:
        self.report.seconds = round(time.monotonic() - self._begin, 1)
        write_report(self.report, self.out / "report.json")
        write_whole(self.out / "report.md", markdown(self.report))

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), *(os.environ.get("PYTHONPATH") or "").split(os.pathsep)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MLX_LORA_KERNELS": "on"}

    def _tests(self) -> Iterator[Part]:
        part = self.report.parts[1]
        part.state, part.thermal = RUNNING, [thermal_state()]
        yield part
        if not (ROOT / "tests" / "kernels").is_dir():
            part.state, part.notes = FAILED, ["the tests are in a checkout, and this is an installed package"]
            yield part
            return
        backend = "emulated" if self.emulate else "metal" if mx.metal.is_available() else "cuda"
        tests, begin = self.report.tests, time.monotonic()
        seconds, log = self._left() * SHARES[TESTS] / sum(SHARES.values()), self.out.resolve() / "kernel-tests.log"
        for tests in run_kernel_tests(ROOT, log, backend, seconds, self._environment(), self.most_tests):
            self.report.tests = tests
            part.seconds = tests.seconds = round(time.monotonic() - begin, 1)
            self._write()
        part.thermal.append(thermal_state())
        complete = tests.selected and tests.ran == tests.selected
        part.state = FAILED if tests.failures or not tests.selected else DONE if complete else CUT_SHORT
        yield part

    def _measure(self) -> Iterator[Part]:
        left = list(PARTS)
        parts = {part.name: part for part in self.report.parts}
        while left and self._left() > 0:
            yield from self._work(left, parts)  # repeated if a part has ended its worker

    def _work(self, left: list[str], parts: dict[str, Part]) -> Iterator[Part]:
        """Run a worker for the parts in ``left``; removes the parts that have ended or have crashed it."""
        arguments = {
            "shares": {name: SHARES[name] for name in left},
            "seconds": self._left(),
            "emulator": str(ROOT / "tests") if self.emulate else None,
        }
        worker = subprocess.Popen(
            [*WORKER, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            env=self._environment(),
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the worker
        )
        begin, part, ending = time.monotonic(), None, _end_after(worker, self._left() + GRACE)
        try:
            for line in worker.stdout:
                if not line.startswith('{"event"'):  # a library has printed something
                    continue
                event = json.loads(line)
                kind = event.pop("event")
                part = parts[event["part"]]
                if kind == "begin":
                    begin = time.monotonic()
                    ending.cancel()
                    ending = _end_after(worker, event["seconds"] + GRACE)
                    part.state, part.thermal = RUNNING, [event["thermal"]]
                    yield part
                elif kind == "figure":
                    self.report.put(Figure(**event))
                elif kind == "note":
                    part.notes.append(event["text"])
                else:
                    part.state, part.thermal = event["state"], [*part.thermal, event["thermal"]]
                    left.remove(part.name)
                part.seconds = round(time.monotonic() - begin, 1)
                self._write()
                if kind == "end":
                    yield part
        finally:
            late = ending.finished.is_set()
            ending.cancel()
            code = _end(worker)
        if part is None and left and code:  # it ended before its first part began
            part = parts[left[0]]
        if part is not None and part.name in left:
            part.notes.append(
                "it was ended because it took too long" if late else f"its process ended with code {code}"
            )
            part.state = CUT_SHORT if late else FAILED
            left.remove(part.name)
            yield part


def _end_after(worker: subprocess.Popen, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, worker.kill)
    timer.daemon = True
    timer.start()
    return timer


def _end(worker: subprocess.Popen) -> int:
    """Wait for a worker without further events to exit; kill it if it does not."""
    worker.stdout.close()
    try:
        return worker.wait(timeout=2)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def versions() -> dict[str, str]:
    """Versions of the system and of the measured packages."""
    mac = platform.mac_ver()[0]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = ""
    return {
        "os": f"macOS {mac}" if mac else platform.platform(),
        "mlx": mx.__version__,
        "mlx-lm": importlib.metadata.version("mlx-lm"),
        "mlx-lora": __version__,
        "revision": revision or "unknown",
    }
