"""A distributed run ends with a message, in seconds, when one of its processes dies, fails or hangs.

The processes are real where their end is tested, and connected by MLX's ring on this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from mlx_lora.errors import DataError, LostProcessError
from mlx_lora.runs import links, peers
from ranks import ROOT, SECONDS, Ranks, bound, free_ports

# A run that only sums over all processes: it starts in a second. argv: folder, what rank 1 does at step 5.
LOOP = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
import mlx.core as mx
from mlx_lora.errors import DataError, MLXLoRAError
from mlx_lora.runs import links, peers
from mlx_lora.runs.group import group

class Progress: ...

folder, act = Path(sys.argv[1]), sys.argv[2]
everyone = group()
rank = everyone.rank()
run = SimpleNamespace(path="adapters", saved=None)
if act == "star":  # as for JACCL, NCCL and MPI: every process is connected to rank 0
    links.hosts = lambda size: (["127.0.0.1"] + [""] * (size - 1), False)

def steps():
    for step in range(10**6):
        if act == "fail" and rank == 1 and step == 5:
            raise DataError("row 7 is empty", "Remove it.")
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=everyone))
        if step == 3:
            run.saved = 3 if rank == 0 else None
        if step > 3 and peers._watch.saved == 3:  # the news has come
            (folder / f"ready-{rank}").touch()
        if act == "end" and step == 6:
            time.sleep(rank == 0)
            return
        yield Progress()
        time.sleep(0.02)

try:
    for _ in peers.watched(steps(), run, timeout=5):
        pass
except MLXLoRAError as error:
    sys.exit(f"Error: {error.message} Hint: {error.hint}")
print("completed", rank, flush=True)
"""


KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM


class Case(NamedTuple):
    """Processes of ``LOOP``; ``victim`` gets the signal ``number``, and the output then has all of ``said``."""

    count: int
    said: str
    victim: int
    number: int = KILL
    act: str = "-"


CLOSED, SILENT = "ended unexpectedly: its connection was closed", "has not answered for 5 seconds"
LOST = {
    "rank 0 of 4 killed": Case(4, CLOSED, 0),
    "suspended": Case(2, SILENT, 0, STOP),
    "told to end": Case(2, "was told to end", 1, TERM),
    "killed, seen by rank 0 alone": Case(3, CLOSED, 2, KILL, "star"),
}
if os.environ.get("MLX_LORA_STRESS"):
    LOST |= {f"killed {i}": Case(4, CLOSED, i % 4, KILL, ("-", "star")[i % 2]) for i in range(12)}
    LOST |= {f"suspended {rank} of 4": Case(4, SILENT, rank, STOP) for rank in range(4)}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_process_ends_the_run_with_a_message(name, tmp_path):
    case = LOST[name]
    with Ranks(tmp_path, case.count, "-c", LOOP, tmp_path, case.act) as ranks:
        ranks.wait_for(*(f"ready-{rank}" for rank in range(case.count)))
        ranks.signal(case.number, case.victim)
        assert 0 not in ranks.end()  # a suspended process is killed by another one
        output = ranks.output
    assert f"rank {case.victim}" in output and case.said in output
    assert "The checkpoint of iteration 3" in output and "--resume" in output
    assert "is complete in adapters of rank 0." in output and "completed" not in output


def test_processes_may_end_at_different_times(tmp_path):
    with Ranks(tmp_path, 3, "-c", LOOP, tmp_path, "end") as ranks:
        assert ranks.end() == [0, 0, 0]
    assert [line for line in ranks.output.splitlines() if line] == [f"completed {rank}" for rank in range(3)]


def test_the_reason_is_known_before_mlx_launch_ends_the_others(tmp_path):
    """``mlx.launch`` ends all processes where one has failed."""
    launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    ports = ["-n", "2", "-p", str(free_ports(2))]
    # It leaves its temporary files behind.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*launch, *ports, "--", sys.executable, "-c", LOOP, str(tmp_path), "fail"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert "rank 1 (127.0.0.1) failed: row 7 is empty" in done.stdout and "completed" not in done.stdout


# ---- two processes' watches in this process, with times that are given


@pytest.fixture
def pair(monkeypatch) -> Iterator[list[peers.Peers]]:
    """The watches of two processes, connected to each other. A limit of 100 s without progress, 1000 s to answer."""
    ends = dict(enumerate(socket.socketpair()))
    for end in ends.values():
        end.setblocking(False)
    connection = lambda all: [links.Link(1 - all.rank(), "here", 0, False, ends[all.rank()])]  # noqa: E731
    monkeypatch.setattr(peers, "connect", connection)
    monkeypatch.setattr(peers.Peers, "_handle_signals", lambda self: setattr(self, "_handlers", {}))
    monkeypatch.setattr(peers.Peers, "_end", lambda self, failure: None)
    monkeypatch.setattr(peers, "_TIMEOUTS", 0.1)
    two = [peers.Peers(SimpleNamespace(rank=lambda r=rank: r, size=lambda: 2), None, 1000) for rank in (0, 1)]
    yield two
    for one in two:
        one._stop()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_without_progress_ends_unless_a_process_works(pair):
    one, two = pair
    one._judge(one._last + 900)
    assert one.lost is None  # training has not begun: a model may be downloaded
    for report in ("Started", "Progress"):
        one.progress(report)
    two.note(True)
    wait_until(lambda: one._work.get(1) == [1, 1])
    one._judge(one._last + 900)
    assert one.lost is None
    two.note(False)
    wait_until(lambda: one._work[1] == [2, 0])
    one._longest = 50.0
    one._judge(one._last + 400)  # ten times the longest iteration
    assert one.lost is None
    one._longest = 0.0
    one._judge(one._last + 150)
    assert one.lost == (0, "has waited for 150 seconds without completing an iteration")
    wait_until(lambda: two.lost == one.lost)
    assert "rank 0 (here) has waited" in two.failure().message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("row 7 is empty", "Remove it."), "failed: row 7 is empty"),
        (OSError(28, "No space left on device"), "failed: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "was interrupted"),
    ],
    ids=["expected", "unexpected", "interrupt"],
)
def test_the_other_process_says_what_happened(error, said, pair):
    one, two = pair
    assert one.leave(error) is None
    wait_until(lambda: two.lost == (0, said))
    with pytest.raises(LostProcessError, match=re.escape(f"rank 0 (here) {said}")):
        two.finish()


def test_an_interrupt_after_the_end_does_not_fail_the_others(pair, monkeypatch):
    """A process that has completed waits for the others; Ctrl-C ends that wait, and the watch with it."""
    one, two = pair
    monkeypatch.setattr(peers, "Peers", lambda *_: one)
    monkeypatch.setattr(peers, "group", lambda: SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(one, "_news", SimpleNamespace(wait=lambda: (_ for _ in ()).throw(KeyboardInterrupt), set=int))
    with pytest.raises(KeyboardInterrupt):
        list(peers.watched(_ for _ in ()))
    assert not one._thread.is_alive()
    wait_until(lambda: 0 in two.done)
    two.finish()
    assert two.lost is None


def test_processes_that_cannot_connect_say_so(monkeypatch, tmp_path):
    (tmp_path / "hosts.json").write_text(json.dumps([["127.0.0.1:1"], ["not an address"]]))
    environment = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"}
    code = "from mlx_lora.runs.group import group; group()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the processes of this run cannot connect to each other" in done.stderr


def test_a_process_that_does_not_start_is_not_waited_for_without_end(tmp_path):
    held = [bound() for _ in range(2)]
    (tmp_path / "hosts.json").write_text(json.dumps([[address] for _, address in held]))
    environment = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"}
    code = "from mlx_lora.runs import group; group.START = 1; group.group()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1 and "Timeout" in done.stderr and "in group" in done.stderr


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"MLX_HOSTFILE": "hosts.json"}, (["10.0.0.1", "10.0.0.2"], True)),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}, (["10.0.0.1", ""], False)),
        ({"NCCL_HOST_IP": "10.0.0.1"}, (["10.0.0.1", ""], False)),
        ({}, (None, False)),
    ],
)
def test_addresses_come_from_the_variables_of_each_backend(variables, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts.json").write_text(json.dumps([["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002", "10.0.1.2:5003"]]))
    for name in ("MLX_HOSTFILE", *links._COORDINATORS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert links.hosts(2) == expected
