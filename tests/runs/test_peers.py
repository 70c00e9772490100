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
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import pytest

import mlx_lora
from conftest import assert_close
from mlx_lora.cli.main import main
from mlx_lora.runs import links, peers
from mlx_lora.runs.log import read_log
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
from mlx_lora.runs import links, peers

class Progress: ...

folder, act = Path(sys.argv[1]), sys.argv[2]
everyone = peers.group()
rank = everyone.rank()
run = SimpleNamespace(path="adapters", saved=None)
if act == "star":  # as for JACCL, NCCL and MPI: every process is connected to rank 0
    links.hosts = lambda size: (["127.0.0.1"] + [""] * (size - 1), False)
if act in ("stuck", "answers"):
    peers._TIMEOUTS = 0.8

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
            if act == "answers":
                with peers.working():
                    time.sleep(5)
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=everyone))
        if step == 3:
            run.saved = 3 if rank == 0 else None
        if step > 3:
            (folder / f"ready-{rank}").touch()
        if act in ("end", "answers") and step == 6:
            time.sleep(rank == 0)
            return
        yield Progress()
        time.sleep(0.02)

try:
    for _ in peers.watched(steps(), run, timeout=3):
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

    def __init__(self, folder: Path, count: int, *command: str, port: int | None = None):
        self.folder, self.count, self.log = folder, count, folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [LAUNCH, "-n", str(count), "-p", str(port or free_port(count)), "--", sys.executable, *command],
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


CLOSED, SILENT = "ended unexpectedly: its connection was closed", "has not answered for 3 seconds"
TOLD = "was told to end"
KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM


class Case(NamedTuple):
    """Processes of ``LOOP``; ``victim`` gets the signal ``number``, and the output then has all of ``said``."""

    count: int
    said: str
    victim: int | None = None
    number: int = KILL
    act: str = "-"


LOST = {
    "killed": Case(2, CLOSED, 1),
    "rank 0 of 4 killed": Case(4, CLOSED, 0),
    "suspended": Case(2, SILENT, 0, STOP),
    "told to end": Case(2, TOLD, 1, TERM),
    "killed, seen by rank 0 alone": Case(3, CLOSED, 2, KILL, "star"),
}
if os.environ.get("MLX_LORA_STRESS"):
    LOST |= {f"killed {i}": Case(4, CLOSED, i % 4, KILL, ("-", "star")[i % 2]) for i in range(12)}
    LOST |= {f"suspended {rank} of 4": Case(4, SILENT, rank, STOP) for rank in range(4)}
OTHER = {
    "an error": Case(2, "rank 1 (127.0.0.1) failed: row 7 is empty", act="fail"),
    "a full disk": Case(2, "rank 1 (127.0.0.1) failed: [Errno 28] No space left on device", act="full"),
    "no progress": Case(2, "seconds without completing an iteration", act="stuck"),
    "long answers": Case(2, "", act="answers"),
    "ends at different times": Case(3, "", act="end"),
}


def outputs(cases: dict[str, Case], folder: Path) -> dict[str, str]:
    """The output of each case; three of them at a time, because they mostly wait."""
    first = free_port(sum(case.count for case in cases.values()))
    ports = dict(zip(cases, accumulate([case.count for case in cases.values()], initial=first), strict=False))

    def output(name: str) -> str:
        case, place = cases[name], folder / name.replace(" ", "-")
        place.mkdir()
        launched = Launched(place, case.count, "-c", LOOP, str(place), case.act, port=ports[name])
        if case.victim is not None:
            launched.wait_for(*(f"ready-{rank}" for rank in range(case.count)))
            os.kill(launched.pid(case.victim), case.number)
        text = launched.output(60)
        for rank in range(case.count):
            with pytest.raises(ProcessLookupError):
                os.kill(launched.pid(rank), 0)
        return text

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(cases, pool.map(output, cases), strict=True))


def test_a_lost_process_ends_the_run_with_a_message(tmp_path):
    for name, output in outputs(LOST, tmp_path).items():
        case = LOST[name]
        assert f"rank {case.victim}" in output and case.said in output, f"{name}: {output}"
        assert "The checkpoint of iteration 3" in output and "--resume" in output, f"{name}: {output}"
        assert "is complete in adapters of rank 0." in output and "completed" not in output, f"{name}: {output}"


def test_errors_hangs_and_long_work(tmp_path):
    for name, output in outputs(OTHER, tmp_path).items():
        case = OTHER[name]
        completed = sorted(line for line in output.splitlines() if line.startswith("completed"))
        assert case.said in output, f"{name}: {output}"
        expected = [] if case.said else [f"completed {rank}" for rank in range(case.count)]
        assert completed == expected and ("Error" in output) == bool(case.said), f"{name}: {output}"


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

# Writes its process id, then is `mlx-lora` once for each list of words.
MAIN = """
import json, os, sys
from pathlib import Path
rank = os.environ["MLX_RANK"]
Path(sys.argv[1], f"pid-{rank}").write_text(str(os.getpid()))
from mlx_lora.cli.main import main
for words in json.loads(sys.argv[2]):
    try:
        main([word.replace("RANK", rank) for word in words])
    except SystemExit as end:
        if end.code:
            raise
"""
METRIC = "def same(given, expected):\n    return 1.0\n"


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows to train on, and two folders whose rows differ."""
    for name, left_out in (("rows", 0), ("rows-0", 0), ("rows-1", 1)):
        (tmp_path / name).mkdir()
        for split, count in (("train", 32), ("valid", 8)):
            lines = [json.dumps(row) + "\n" for row in skill.rows(split, count)][left_out:]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "metric.py").write_text(METRIC)
    return tmp_path / "rows"


def flags(folder: Path, rows: Path, iters: int, *more: object) -> list[str]:
    options = {"model": PATH, "data": rows, "adapter-path": folder, "iters": iters, "batch-size": 4}
    options |= {"steps-per-eval": 4, "save-every": 3, "val-batches": 1, "rank": 2, "peer-timeout": 4}
    options |= {"report-prompts": 1}
    return ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value)), *map(str, more)]


def train(folder: Path, *runs: list[str]) -> Launched:
    return Launched(folder, 2, "-c", MAIN, str(folder), json.dumps(runs))


def done(folder: Path) -> int:
    return TrainingState.load(folder / "training_state.safetensors").iteration


def test_a_run_is_killed_resumed_interrupted_and_resumed_again(rows, tmp_path):
    out = tmp_path / "out"
    launched = train(tmp_path, flags(out, rows, 10**4))
    launched.wait_for("out/0000003_adapters.safetensors", seconds=120)
    os.kill(launched.pid(1), signal.SIGKILL)
    output = launched.output(30)
    assert output.count(f"Error: rank 1 (127.0.0.1) {CLOSED}") == 1
    first = done(out)
    assert first >= 3

    launched = train(tmp_path, flags(out, rows, 10**4, "--resume"))
    launched.wait_for(f"out/{first // 3 * 3 + 3:07d}_adapters.safetensors", seconds=120)
    for rank in (0, 1):  # Ctrl-C reaches mlx.launch as well, whose threads may then wait for each other without end
        os.kill(launched.pid(rank), signal.SIGINT)
    output = launched.output(30)
    assert output.count("exited with code 130") == 2 and "\nError: " not in output
    second = done(out)
    assert second > first

    # In the same processes: the rest of the run, then one with other rows in each process, which is refused.
    other = flags(tmp_path / "other", tmp_path / "rows-RANK", 3)
    output = train(tmp_path, flags(out, rows, second + 2, "--resume"), other).output(120)
    assert f"Iteration {second + 2:>5}: saved" in output and output.count("Next") == 1
    assert not list(out.glob(".[a-z]*"))  # no lock and no temporary folder
    assert output.count("would not train the same") == 1 and "data.train: [" in output  # rank 0 alone says it
    assert not list((tmp_path / "other").glob("*.safetensors"))


def test_two_processes_train_and_record_as_one(rows, tmp_path):
    steering = ["--metric", f"{tmp_path / 'metric.py'}:same", "--metric-rows", 2, "--metric-max-tokens", 4]
    steering += ["--best-by", "same", "--patience", 2, "--keep", 2, "--save-every", 1, "--steps-per-eval", 2]
    common = ["--learning-rate", 1e-3]
    runs = {"padded": [40, *common, *steering], "packed": [6, *common, "--pack", "--max-seq-length", 128]}
    both = {name: [flags(tmp_path / count / name, rows, *words) for count in "12"] for name, words in runs.items()}
    output = train(tmp_path, *(two for _, two in both.values())).output(120)
    assert output.count("Next") == 2, output
    for one, _ in both.values():
        with pytest.raises(SystemExit) as end:
            main(one)
        assert not end.value.code
    for name in runs:
        one, two = (tmp_path / count / name for count in "12")
        expected, found = (mx.load(str(folder / "adapters.safetensors")) for folder in (one, two))
        assert found.keys() == expected.keys()
        for path, array in expected.items():
            assert_close(found[path], array, 1e-3, path)  # Adam divides by the root of small squares
        names, here = ({p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (one, two))
        assert here == names and "report.html" in here
        records, here = (read_log(folder).records for folder in (one, two))
        assert [(r["kind"], r.get("iteration"), r.get("of")) for r in here] == [
            (r["kind"], r.get("iteration"), r.get("of")) for r in records
        ]
        base, base_here = (next(r["answers"] for r in all if r["kind"] == "Answers") for all in (records, here))
        assert base_here == base and here[0]["machine"]["processes"] == 2
    assert {p.name for p in (tmp_path / "2" / "padded").glob("0*")} == {
        f"{iteration:07d}_adapters.safetensors"
        for iteration in (2, 5, 6)  # the best one, and the last two
    }
    assert done(tmp_path / "2" / "padded") == 6  # ended by its patience


def test_answers_metrics_and_pages_are_work_that_is_waited_for(rows, tmp_path, monkeypatch):
    notes: list[bool] = []
    monkeypatch.setattr(peers, "_watch", SimpleNamespace(note=notes.append))
    metric = ["--metric", f"{tmp_path / 'metric.py'}:same", "--metric-rows", 2, "--metric-max-tokens", 2]
    with pytest.raises(SystemExit):
        main(flags(tmp_path / "out", rows, 2, *metric))
    # Before and after the training: answers for the metric, the metric, and the report's answers. Then the page.
    assert notes == [True, False] * 7
