"""Threads that ran MLX do not abort the process at its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mlx_lora import threads

# Compiled in another thread than the one that uses it, as mlx-lm's activations are. The lists make Python's end slow.
SCRIPT = """
import threading
import mlx.core as mx
from mlx_lora.serving.worker import Worker

double = mx.compile(lambda x: 2 * x)
stepped = threading.Event()

class Engine:
    active = queued = 0

    def step(self):
        mx.eval(double(mx.ones(4)))
        stepped.set()

    def fail_all(self, error): pass
    def close(self): pass

slow = [[number] for number in range(2_000_000)]
worker = Worker(Engine()).start()
stepped.wait()
assert worker.alive
{end}
print("the end")
"""


@pytest.mark.parametrize("end", ["worker.stop(); assert not worker.alive", ""], ids=["stopped", "running"])
def test_a_process_ends_normally_after_a_worker_has_computed(end):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr


# Ctrl-C before another step is traced, and twice more while the end of that trace is waited for.
INTERRUPTED = """
import os, signal, time
from mlx_lora.config import AdapterConfig, OptimizerConfig, TrainConfig
from mlx_lora.planning.bare import base_named
from mlx_lora.planning.estimate import Estimator
from mlx_lora.planning.machines import Variant
from mlx_lora.tiny_base import PATH

class Slow(Estimator):
    def _estimate(self, *args):
        super()._estimate(*args)  # all that it imports
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return super()._estimate(*args)

slow = [[number] for number in range(2_000_000)]
try:
    with Slow(base_named(str(PATH)), OptimizerConfig()) as estimate:
        estimate(Variant(AdapterConfig(), TrainConfig(), length=64), False)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_process_interrupted_while_it_plans_ends_normally():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def until(done, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def test_a_thread_whose_work_fails_says_so_and_takes_other_work(monkeypatch, caplog):
    monkeypatch.setattr(threads, "_waiting", [])
    seen = []

    def fails():
        seen.append(threading.get_ident())
        raise SystemExit

    for _ in range(2):
        threads.run_in_thread(fails)
        until(lambda: threads._waiting)
    assert len(seen) == 2 and len(set(seen)) == 1
    assert caplog.text.count("the work of a thread failed") == 2
