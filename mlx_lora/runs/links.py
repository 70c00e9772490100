"""TCP connections between the processes of a distributed run, besides MLX's own. ``peers.py`` uses them.

Each process is connected to its neighbours. They send each other a line of JSON, at least every ``BEAT`` seconds,
with everything that the sender knows, and pass on what is new to them. So news reaches all processes, even if only
neighbours can reach each other, as in a ring of Thunderbolt cables.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

BEAT = 1.0  # seconds between two lines
CONNECT = 60.0  # seconds to wait for a neighbour to connect
_HOST = 64  # bytes of a host's name that are exchanged
# Environment variables with the address of rank 0, as ``mlx.launch`` sets them for each backend but the ring.
_COORDINATORS = ("JACCL_COORDINATOR", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")


@dataclass
class Link:
    """The connection to the process ``rank`` on ``host``."""

    rank: int
    host: str
    pid: int
    local: bool  # whether that process runs on this machine
    socket: socket.socket
    seen: float = field(default_factory=time.monotonic)  # when it last sent something
    closed: bool = False
    _buffer: bytes = b""

    def send(self, news: dict[str, Any]) -> None:
        with suppress(OSError):  # a full buffer: that process has not read for long. A lost one is noticed by `receive`
            self.socket.send(json.dumps(news).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the received text. Sets ``seen``, and ``closed`` if the connection has ended."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.closed = not data
        self.seen = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End that process if it is on this machine. A suspended one keeps its memory; ``mlx.launch`` waits for it."""
        if self.local and not self.closed:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def hosts(size: int) -> tuple[list[str] | None, bool]:
    """(an address for each rank, whether only neighbours in a ring reach each other), from ``mlx.launch``'s variables.

    The addresses are None if the environment does not contain them.
    """
    if file := os.environ.get("MLX_HOSTFILE"):
        with suppress(OSError, ValueError, LookupError, AttributeError), open(file) as nodes:
            found = [addresses[0].rpartition(":")[0] for addresses in json.load(nodes)]
            if len(found) == size:
                return found, True
    first = next((os.environ[name] for name in _COORDINATORS if name in os.environ), None)
    return ([first.partition(":")[0]] + [""] * (size - 1) if first else None), False


def connect(group: Any) -> list[Link]:
    """Connect this process to its neighbours: in a ring to the next and the previous one, else rank 0 to all.

    Every process must call this at the same time: an MLX collective exchanges the ports.

    Raises: OSError: a neighbour cannot be reached.
    """
    rank, size = group.rank(), group.size()
    addresses, ring = hosts(size)
    pairs = {frozenset((a, (a + 1) % size if ring else 0)): a for a in range(0 if ring else 1, size)}  # with the caller
    calling = [other for pair, caller in pairs.items() if caller == rank for other in pair - {rank}]
    neighbours = sum(rank in pair for pair in pairs)
    with socket.create_server(("", 0), backlog=size) as server:
        server.settimeout(CONNECT)
        machine = _machine()
        facts = [server.getsockname()[1], os.getpid(), machine, secrets.randbits(31)]
        told = _gather(facts, socket.gethostname(), group)
        token = told[0][0][3]  # rank 0's; a program that connects by accident does not know it
        links: list[Link] = []

        def add(other: int, connection: socket.socket) -> None:
            (_, pid, there, _), host = told[other]
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links.append(
                Link(other, addresses[other] if addresses and ring else host, pid, there == machine, connection)
            )

        try:
            for other in calling:
                address = addresses[other] if addresses else told[other][1]
                connection = socket.create_connection((address, told[other][0][0]), CONNECT)
                connection.sendall(f"{token:010d}{rank:06d}".encode())
                add(other, connection)
            while len(links) < neighbours:
                connection, _ = server.accept()
                connection.settimeout(CONNECT)
                said = connection.recv(16, socket.MSG_WAITALL)
                if said[:10] == f"{token:010d}".encode():
                    add(int(said[10:]), connection)
                else:
                    connection.close()
        except OSError:
            for link in links:
                link.socket.close()
            raise
    return links


def _machine() -> int:
    """A number that is the same for processes on the same machine."""
    import uuid

    return uuid.getnode() % (1 << 31)


def _gather(numbers: list[int], name: str, group: Any) -> list[tuple[list[int], str]]:
    """The ``numbers`` and ``name`` of every rank."""
    text = name.encode()[:_HOST].ljust(_HOST)
    every = mx.distributed.all_gather(mx.array([numbers + list(text)], mx.int32), group=group).tolist()
    return [(row[: len(numbers)], bytes(row[len(numbers) :]).decode(errors="replace").strip()) for row in every]
