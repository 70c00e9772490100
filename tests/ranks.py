"""The processes of a distributed run on this machine, connected by MLX's ring.

They get the variables that ``mlx.launch`` sets. It is not used itself: its threads keep two cores busy while it runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import mlx_lora

ROOT = Path(mlx_lora.__file__).parents[1]
# For processes whose run writes no report.html: it takes seconds of each.
WITHOUT_PAGE = """
from mlx_lora.runs import recorder
recorder.Recorder._write_page = lambda self: None
"""
SECONDS = 240  # until something counts as hanging; nothing else depends on it


class Ranks:
    """``count`` processes of ``python COMMAND``. The output of rank N goes to the file ``log-N`` in ``folder``.

    Use it as a context manager: no process outlives it.
    """

    def __init__(self, folder: Path, count: int, *command: object, **environment: str):
        self.folder, self.count, self._processes = folder, count, []
        self._ports = [bound() for _ in range(count)]
        hosts = folder / "ring.json"
        hosts.write_text(json.dumps([[address] for _, address in self._ports]))
        shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        shared |= {"OPENBLAS_NUM_THREADS": "1", "MLX_HOSTFILE": str(hosts)}
        for rank in range(count):
            with open(self._log(rank), "w") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**shared, **environment, **({"MLX_RANK": str(rank)} if count > 1 else {})},
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for port, _ in self._ports:
            port.close()

    def _log(self, rank: int) -> Path:
        return self.folder / f"log-{rank}"

    @property
    def outputs(self) -> list[str]:
        """What each of them has written, by rank."""
        return [self._log(rank).read_text() for rank in range(self.count)]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    def wait_for(self, *names: str) -> None:
        """Wait until these files are in ``folder``."""
        until = time.monotonic() + SECONDS
        while not all((self.folder / name).exists() for name in names):
            running = all(process.poll() is None for process in self._processes)
            assert running and time.monotonic() < until, self.output
            time.sleep(0.02)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            self._processes[rank].send_signal(number)

    def end(self) -> list[int]:
        """Wait until all have ended; return their exit codes, by rank."""
        until = time.monotonic() + SECONDS
        for process in self._processes:
            try:
                process.wait(until - time.monotonic())
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a process still runs after {SECONDS} seconds:\n{self.output}") from None
        return [process.returncode for process in self._processes]


def bound() -> tuple[socket.socket, str]:
    """A free port and its address. No other program is given it while the socket is open; MLX may listen on it."""
    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))
    host, number = port.getsockname()
    return port, f"{host}:{number}"


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, for ``mlx.launch``."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with suppress(OSError, OverflowError):
                for number in range(first + 1, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", number)))
                return first
