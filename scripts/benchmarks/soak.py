"""Many clients at once, good ones and bad ones, against one server: none is lost, and nothing is left behind.

    ./scripts/bench soak [--requests 1000] [--at-a-time 1000] [--adapters 4] [--tokens 16] [--pause 1.0]

A client asks for the base or one of the adapters, whole or as a stream; reads or writes a byte at a time; goes away
in the headers, in the body, in the queue or after the first token; sends nonsense, or far too much. Each that stays
must get its complete and right answer (after 429 it comes back when Retry-After says) or the error that it deserves.
Afterwards memory, open files, threads, tasks and rows must be what they were before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPT = "A red umbrella was found on a bench."


@dataclass
class Clients:
    """What all clients share.

    Args:
        expected: the right answer of each model.
        pause: seconds between two bytes of a slow client, which sends or reads eight of them.
    """

    port: int
    expected: dict[str, str]
    tokens: int
    pause: float
    body_limit: int
    done: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, count: int, at_a_time: int, seed: int = 0) -> None:
        chosen = random.Random(seed)
        models, gate = list(self.expected), asyncio.Semaphore(at_a_time)

        async def one(number: int) -> None:
            async with gate:
                kind, model = KINDS[number % len(KINDS)], chosen.choice(models)
                try:
                    await asyncio.wait_for(kind(self, model), 300)
                except Exception as error:
                    self.faults.append(f"{kind.__name__}, {model}: {type(error).__name__}: {error}")
                self.done[kind.__name__] += 1

        await asyncio.gather(*(one(number) for number in range(count)))

    def request(self, model: str, **changes: Any) -> bytes:
        asked = {"model": model, "prompt": PROMPT, "max_tokens": self.tokens, "temperature": 0, **changes}
        return json.dumps(asked).encode()

    async def send(self, body: bytes, slowly: bool = False, cut: int | None = None) -> Any:
        """A connection on which ``body`` was sent, or the first ``cut`` bytes of it with its headers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        data = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        for position in range(8 if slowly else 0):
            writer.write(data[position : position + 1])
            await asyncio.sleep(self.pause)
        writer.write(data[8 if slowly else 0 : cut])
        await writer.drain()
        return reader, writer

    async def ask(self, body: bytes, slow_in: bool = False, slow_out: bool = False) -> tuple[int, bytes]:
        """(status, body) of the answer; after 429 or 503 asked again when the server says so."""
        while True:
            reader, writer = await self.send(body, slow_in)
            found = b""
            for _ in range(8 if slow_out else 0):
                found += await reader.read(1)
                await asyncio.sleep(self.pause)
            found += await reader.read()
            writer.close()
            head, _, rest = found.partition(b"\r\n\r\n")
            status, lines = int(head.split()[1]), head.lower().split(b"\r\n")
            if status not in (429, 503):
                return status, _unchunked(rest) if b"transfer-encoding: chunked" in lines else rest
            self.done[f"answered with {status}"] += 1
            (after,) = [int(line.partition(b":")[2]) for line in lines if line.startswith(b"retry-after:")]
            await asyncio.sleep(after * random.uniform(0.5, 1.5))

    async def leave(self, connection: Any) -> None:
        _, writer = connection
        writer.transport.abort()
        await asyncio.sleep(0)

    def check(self, model: str, status: int, text: str) -> None:
        if status != 200 or text != self.expected[model]:
            raise AssertionError(f"status {status}, {text[:300]!r} instead of {self.expected[model]!r}")


def _unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found, data = found + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return found


async def whole(clients: Clients, model: str, **slow: bool) -> None:
    status, answer = await clients.ask(clients.request(model), **slow)
    clients.check(model, status, json.loads(answer)["choices"][0]["text"] if status == 200 else answer.decode())


async def streamed(clients: Clients, model: str, **slow: bool) -> None:
    status, answer = await clients.ask(clients.request(model, stream=True), **slow)
    events = [line[6:] for line in answer.decode().split("\n") if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise AssertionError(f"status {status}: the stream ends with {events[-1:]}")
    clients.check(model, status, "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]))


async def slow_writer(clients: Clients, model: str) -> None:
    await whole(clients, model, slow_in=True)


async def slow_reader(clients: Clients, model: str) -> None:
    await streamed(clients, model, slow_out=True)


async def leaves_in_headers(clients: Clients, model: str) -> None:
    await clients.leave(await clients.send(clients.request(model), cut=30))


async def leaves_in_body(clients: Clients, model: str) -> None:
    await clients.leave(await clients.send(clients.request(model), cut=-10))


async def leaves_in_queue(clients: Clients, model: str) -> None:
    await clients.leave(await clients.send(clients.request(model)))


async def leaves_after_the_first_token(clients: Clients, model: str) -> None:
    connection = await clients.send(clients.request(model, stream=True, max_tokens=1000))
    await connection[0].read(600)  # the headers and the first event, or an error
    await clients.leave(connection)


async def _refused(clients: Clients, body: bytes, status: int) -> None:
    found, answer = await clients.ask(body)
    if found != status:
        raise AssertionError(f"status {found} instead of {status}: {answer[:300]!r}")


async def nonsense(clients: Clients, model: str) -> None:
    await _refused(clients, clients.request(model, n=-1), 400)


async def unknown_model(clients: Clients, model: str) -> None:
    await _refused(clients, clients.request(f"{model}?"), 404)


async def too_much(clients: Clients, model: str) -> None:
    await _refused(clients, clients.request(model, prompt="x" * clients.body_limit), 413)


KINDS: list[Callable] = [
    *(whole, streamed, whole, streamed, slow_writer, slow_reader, nonsense, unknown_model, too_much),
    *(leaves_in_headers, leaves_in_body, leaves_in_queue, leaves_after_the_first_token),
]


def left_behind(engine: Any, loop: asyncio.AbstractEventLoop) -> dict[str, int]:
    """What would grow if something were not given back."""
    import mlx.core as mx

    files = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("AnyIO worker")]
    return {
        "rows": engine.active + engine.queued,
        "adapters in use": sum(each.rows for each in engine.bank.listed()),
        "open files": len(os.listdir(files)),
        "threads": len(threads),  # without a pool of at most 40 that ends when it is idle
        "tasks": len(asyncio.all_tasks(loop)),
        "bytes of MLX": mx.get_active_memory(),
    }


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of than before; of MLX's memory, by more than a megabyte."""
    spare = {"bytes of MLX": 1_000_000}
    more = [name for name in before if after[name] > before[name] + spare.get(name, 0)]
    return [f"{name}: {before[name]:,}, then {after[name]:,}" for name in more]


def settled(measure: Callable[[], dict[str, int]], before: dict[str, int], seconds: float = 60) -> dict[str, int]:
    """What ``measure`` says once nothing is more than ``before``, or at the end of the time."""
    end, found = time.monotonic() + seconds, measure()
    while grown(before, found) and time.monotonic() < end:
        time.sleep(0.1)
        found = measure()
    return found


def soak(url: str, engine: Any, loop: Any, expected: dict[str, str], count: int, at_a_time: int, **options: Any) -> Any:
    """(clients, what was there before, what is there afterwards). The clients' ``faults`` say what went wrong."""
    port = int(url.rpartition(":")[2])
    quiet = left_behind(engine, loop)
    asyncio.run(Clients(port, expected, **options).run(2 * len(KINDS), at_a_time))  # what is made once is made now
    measure = lambda: left_behind(engine, loop)  # noqa: E731
    before = settled(measure, {**quiet, "bytes of MLX": 2**62})
    clients = Clients(port, expected, **options)
    asyncio.run(clients.run(count, at_a_time))
    return clients, before, settled(measure, before)


def resident() -> float:
    """Megabytes of this process in memory; 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-a-time", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two bytes of a slow client")
    given = parser.parse_args()
    sys.path[:0] = [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[2] / "tests/serving")]
    from serving_helpers import greedy_answers, make_adapters, running

    names = tuple(f"adapter{number}" for number in range(given.adapters))
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder), names)
        with running(Path(folder), body_limit=100_000, prompt_cache_size=0) as (url, server):
            expected = greedy_answers(server.engine, ("tiny", *names), PROMPT, given.tokens)
            begun, tic = resident(), time.perf_counter()
            options = dict(tokens=given.tokens, pause=given.pause, body_limit=100_000)
            clients, before, after = soak(
                *(url, server.engine, server.runner.loop, expected, given.requests, given.at_a_time), **options
            )
    print(f"{given.requests} requests, {given.at_a_time} at a time, in {time.perf_counter() - tic:.1f} s")
    for name, number in sorted(clients.done.items()):
        print(f"  {name.replace('_', ' ')}: {number}")
    print(f"resident memory: {begun:.0f} MB before, {resident():.0f} MB after")
    for name in before:
        print(f"  {name}: {before[name]:,} before, {after[name]:,} after")
    faults = [*clients.faults, *grown(before, after)]
    for fault in faults:
        print(f"FAULT {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
