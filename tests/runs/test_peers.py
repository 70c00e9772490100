"""A distributed run ends with a message, in seconds, when one of its processes dies, fails or hangs.

The processes are real, started by ``mlx.launch`` over MLX's ring on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lora
from conftest import assert_close
from mlx_lora.runs import links
from mlx_lora.tiny_base import PATH, skill
from mlx_lora.training import TrainingState

ROOT = Path(mlx_lora.__file__).parents[1]
LAUNCH = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch here")

# A run that only sums over all processes: it starts in a second. argv: folder, what rank 1 does at step 5.
LOOP = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
import mlx.core as mx
from mlx_lora.errors import DataError, MLXLoRAError
from mlx_lora.runs import links
from mlx_lora.runs.peers import group, watched

class Progress: ...

folder, act = Path(sys.argv[1]), sys.argv[2]
everyone = group()
rank = everyone.rank()
run = SimpleNamespace(path="adapters", saved=None)
if act == "star":  # as for JACCL, NCCL and MPI: every process is connected to rank 0
    links.hosts = lambda size: (["127.0.0.1"] + [""] * (size - 1), False)

def steps():
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    for step in range(10**6):
        if rank == 1 and step == 5:
            if act == "fail":
                raise DataError("row 7 is empty", "Remove it.")
            if act == "full" :
                raise OSError(28, "No space left on device")
            if act == "stuck":
                time.sleep(1000)
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=everyone))
        if step == 3:
            run.saved = 3 if rank == 0 else None
        if step > 3:
            (folder / f"ready-{rank}").touch()
        if act == "end" and step == 6:
            time.sleep(2 * (rank == 0))
            return
        yield Progress()
        time.sleep(0.02)

try:
    for _ in watched(steps(), run, timeout=0.25 if act == "stuck" else 3):
        pass
except MLXLoRAError as error:
    sys.exit(f"Error: {error.message} Hint: {error.hint}")
print("completed", rank, flush=True)
"""


def free_port(count: int) -> int:
    """The first of ``count`` ports in a row that are free."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        try:
            for number in range(port + 1, port + count):
                socket.create_server(("127.0.0.1", number)).close()
            return port
        except OSError:
            continue
    raise AssertionError("no free ports")


class Launched:
    """``mlx.launch`` with ``count`` processes of a command; its output goes to a file."""

    def __init__(self, folder: Path, count: int, *command: str):
        self.folder, self.count, self.log = folder, count, folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [LAUNCH, "-n", str(count), "-p", str(free_port(count)), "--", sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait_for(self, *names: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def output(self, seconds: float) -> str:
        """All that was written until the end, which must come within ``seconds``."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} seconds:\n{self.log.read_text()}")
        return self.log.read_text()


def loop(folder: Path, count: int, act: str = "-") -> Launched:
    launched = Launched(folder, count, "-c", LOOP, str(folder), act)
    launched.wait_for(*(f"ready-{rank}" for rank in range(count) if act in ("-", "star")))
    return launched


CLOSED, SILENT = "ended unexpectedly: its connection was closed", "has not answered for 3 seconds"
TOLD = "was told to end"


@pytest.mark.parametrize(
    "count, victim, number, said, seconds",
    [
        (2, 1, signal.SIGKILL, CLOSED, 15),
        (4, 0, signal.SIGKILL, CLOSED, 15),
        (2, 0, signal.SIGSTOP, SILENT, 20),
        (4, 3, signal.SIGSTOP, SILENT, 20),
        (2, 1, signal.SIGTERM, TOLD, 15),
    ],
)
def test_a_lost_process_ends_the_run_with_a_message(count, victim, number, said, seconds, tmp_path):
    launched = loop(tmp_path, count)
    os.kill(launched.pid(victim), number)
    output = launched.output(seconds)
    assert f"rank {victim}" in output and said in output
    assert "is complete in adapters of rank 0." in output and "--resume" in output
    assert "The checkpoint of iteration 3" in output
    for rank in range(count):
        with pytest.raises(ProcessLookupError):
            os.kill(launched.pid(rank), 0)


@pytest.mark.parametrize("victim", [0, 2])
def test_processes_that_reach_only_rank_0_learn_it_from_there(victim, tmp_path):
    launched = loop(tmp_path, 4, "star")
    os.kill(launched.pid(victim), signal.SIGKILL)
    output = launched.output(20)
    assert f"rank {victim} " in output and CLOSED in output


@pytest.mark.parametrize(
    "act, said",
    [("fail", "rank 1 (127.0.0.1) failed: row 7 is empty"), ("full", "failed: [Errno 28] No space left on device")],
)
def test_an_error_in_one_process_is_told_by_the_others(act, said, tmp_path):
    output = loop(tmp_path, 2, act).output(30)
    assert said in output and "completed" not in output


def test_a_process_that_answers_but_makes_no_progress_ends_the_run(tmp_path):
    output = loop(tmp_path, 2, "stuck").output(40)
    assert "seconds without completing an iteration" in output


def test_processes_that_end_at_different_times_have_completed(tmp_path):
    output = loop(tmp_path, 4, "end").output(40)
    assert sorted(line for line in output.splitlines() if "completed" in line) == [f"completed {r}" for r in range(4)]
    assert "Error" not in output


def test_processes_that_cannot_connect_say_so(monkeypatch, tmp_path):
    (tmp_path / "hosts.json").write_text(json.dumps([["127.0.0.1:1"], ["not an address"]]))
    environment = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"}
    code = "from mlx_lora.runs.peers import group; group()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the processes of this run cannot connect to each other" in done.stderr


def test_a_process_that_does_not_start_is_not_waited_for_without_end(tmp_path):
    first = free_port(2)
    (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(2)]))
    environment = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"}
    code = "from mlx_lora.runs import peers; peers.START = 1; peers.group()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
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


# ---- whole runs of the command line

# Writes its process id, then is `mlx-lora`.
MAIN = """
import os, sys
from pathlib import Path
Path(sys.argv[1], f"pid-{os.environ['MLX_RANK']}").write_text(str(os.getpid()))
from mlx_lora.cli.main import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for split, count in (("train", 32), ("valid", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, count)))
    return folder


def flags(folder: Path, rows: Path, iters: int, *more: str) -> list[str]:
    options = {"model": PATH, "data": rows, "adapter-path": folder / "out", "iters": iters, "batch-size": 4}
    options |= {"steps-per-eval": 4, "save-every": 3, "val-batches": 1, "rank": 2, "peer-timeout": 4}
    return ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value)), *more]


def train(folder: Path, count: int, rows: Path, iters: int, *more: str) -> Launched:
    return Launched(folder, count, "-c", MAIN, str(folder), *flags(folder, rows, iters, *more))


def test_a_run_is_resumed_from_the_checkpoint_that_is_named(rows, tmp_path):
    count, victim = 4, 2
    launched = train(tmp_path, count, rows, 10**4)
    launched.wait_for("out/0000003_adapters.safetensors", seconds=120)
    os.kill(launched.pid(victim), signal.SIGKILL)
    output = launched.output(20)
    assert f"Error: rank {victim} (127.0.0.1) {CLOSED}" in output
    done = TrainingState.load(tmp_path / "out" / "training_state.safetensors").iteration
    assert done >= 3
    output = train(tmp_path, count, rows, done + 2, "--resume").output(120)
    assert f"Iteration {done + 2:>5}: saved" in output and output.count("Next") == 1
    assert not list((tmp_path / "out").glob(".[a-z]*"))  # no lock and no temporary folder


def test_interrupting_the_launcher_saves_and_stops_every_process(rows, tmp_path):
    launched = train(tmp_path, 2, rows, 10**4)
    launched.wait_for("out/0000003_adapters.safetensors", seconds=120)
    os.killpg(launched.process.pid, signal.SIGINT)  # as Ctrl-C does
    output = launched.output(20)
    assert output.count("exited with code 130") == 2 and "Error: " not in output
    assert TrainingState.load(tmp_path / "out" / "training_state.safetensors").iteration >= 3


@pytest.mark.parametrize("pack", [[], ["--pack", "--max-seq-length", "128"]], ids=["padded", "packed"])
def test_two_processes_train_as_one(pack, rows, tmp_path):
    options = [6, "--learning-rate", "1e-3", *pack]
    output = train(tmp_path, 2, rows, *options).output(120)
    assert "Done" in output, output
    code = "import sys; from mlx_lora.cli.main import main; main(sys.argv[1:])"
    (tmp_path / "one").mkdir()
    command = [sys.executable, "-c", code, *flags(tmp_path / "one", rows, *options)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    two, one = (mx.load(str(folder / "out" / "adapters.safetensors")) for folder in (tmp_path, tmp_path / "one"))
    assert two.keys() == one.keys()
    for name, expected in one.items():
        assert_close(two[name], expected, 1e-3, name)  # Adam divides by the root of small squares


def test_processes_with_other_data_are_refused(rows, tmp_path):
    text = f"Path({str(tmp_path / 'rows')!r} + os.environ['MLX_RANK'])"
    for rank in "01":
        (tmp_path / f"rows{rank}").mkdir()
        lines = (rows / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"rows{rank}" / "train.jsonl").write_text("".join(lines[int(rank) :]))
    code = MAIN.replace("main(sys.argv[2:])", f"main([*sys.argv[2:], '--data', str({text})])")
    options = ["--model", str(PATH), "--adapter-path", str(tmp_path / "out"), "--iters", "3", "--batch-size", "4"]
    output = Launched(tmp_path, 2, "-c", code, str(tmp_path), "train", *options).output(120)
    assert "would not train the same" in output and "data.train: [" in output
    assert not list((tmp_path / "out").glob("*.safetensors"))
