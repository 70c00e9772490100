"""Ends a distributed run with a message if one of its processes has died, failed or hangs.

MLX's collectives wait forever for a process that was stopped, was suspended or lost its network, and the main thread
cannot run Python code while it waits. So a thread in each process exchanges a line per second with its neighbours
(``links.py``). This thread also answers during a long computation, such as the first compiled step.

When a process is lost, the main threads of the others have ``GRACE`` seconds to leave the collective, as MLX's ring
does when a connection closes. Then the thread itself writes the message and ends the process with exit code 1. The last
checkpoint is always complete, because its files are renamed into place.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from ..errors import LostProcessError, MLXLoRAError, TrainingError
from .group import START, group
from .links import BEAT, connect

GRACE = 2.0  # seconds
TIMEOUT = 30.0  # seconds without an answer
# Training hangs if no report comes for this many timeouts and for this many times the longest interval so far.
_TIMEOUTS, _SLOWER = 20, 10
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_watch: Peers | None = None  # of this process


def watched(reports: Iterator[Any], folder: Any = None, timeout: float = TIMEOUT) -> Iterator[Any]:
    """Yield ``reports``; in a distributed run, end if another process is lost or this one receives a signal to end.

    Args:
        folder: the ``RunFolder``, whose last checkpoint the message names.
        timeout: seconds without an answer until a process counts as lost. One whose connection is closed is lost at
            once. 0: do not watch.

    Raises: LostProcessError. If the main thread does not respond, the process exits instead.
    """
    everyone = group()
    if everyone.size() == 1 or not timeout:
        yield from reports
        return
    global _watch
    peers = _watch = Peers(everyone, folder, timeout)
    try:
        with closing(reports):
            for report in reports:
                peers.progress(type(report).__name__)
                if peers.lost is not None:
                    raise peers.failure()
                yield report
        peers.finish()
    except BaseException as error:
        if failure := peers.leave(error):
            raise failure from error
        raise
    finally:
        _watch = None


@contextmanager
def working() -> Iterator[None]:
    """A context for long work in this process only, such as answering prompts, so that it does not count as a hang."""
    peers = _watch
    if peers is not None:
        peers.note(True)
    try:
        yield
    finally:
        if peers is not None:
            peers.note(False)


class Peers:
    """The watching thread of one process. ``finish`` or ``leave`` ends it."""

    def __init__(self, everyone: Any, folder: Any, timeout: float):
        self.rank, self.size = everyone.rank(), everyone.size()
        self.folder, self.timeout = folder, timeout
        self.lost: tuple[int, str] | None = None  # the rank that ended the run, and the reason
        self.saved: int | None = None  # iteration of the last checkpoint that any process knows of
        self.done: set[int] = set()  # ranks that have completed the run
        self._leaving = False
        self._signal = self._decided = None  # times
        self._begun = self._training = False
        self._work: dict[int, list[int]] = {self.rank: [0, 0]}  # by rank: [changes so far, open contexts of `working`]
        self._last, self._longest = time.monotonic(), 0.0
        # A collective exchanges the ports; it needs a time limit in case a process is already lost.
        limit = threading.Timer(START, self._end, [f"another process did not start within {START:.0f} seconds"])
        limit.start()
        try:
            self._links = connect(everyone)
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"rank {self.rank} cannot connect to the other processes: {error}",
                "Check that all of them run, and that no firewall blocks the machines from each other. With "
                "--peer-timeout 0 the "
                "run needs no such connection, and does not notice a lost process.",
            ) from error
        finally:
            limit.cancel()
        self._news = threading.Event()  # `lost` was set, or all are done
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._handle_signals()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    # ---- called by the main thread

    def progress(self, report: str) -> None:
        """Note that the run goes on. Only training is timed: a model may be downloaded for hours.

        The first validation counts as the longest interval, so that later ones do not count as a hang.
        """
        now = time.monotonic()
        if self._begun:
            self._longest = max(self._longest, now - self._last)
        self._last, self._begun = now, self._begun or report == "Started"
        self._training = report != "Done" and (self._training or report == "Progress")

    def note(self, begins: bool) -> None:
        """Note that work without reports begins or ends. The other processes wait for it."""
        changes, busy = self._work[self.rank]
        self._work[self.rank] = [changes + 1, busy + (1 if begins else -1)]
        self._last = time.monotonic()
        self._poke()

    def finish(self) -> None:
        """Wait until the other processes have completed the run too. Raises: LostProcessError."""
        self._training = False
        self.done.add(self.rank)
        self._poke()
        self._news.wait()
        if self.lost:
            raise self.failure()
        self._stop()

    def leave(self, error: BaseException) -> LostProcessError | None:
        """Stop watching after ``error``; return the error to raise instead if another process is the cause."""
        expected = isinstance(error, (MLXLoRAError, KeyboardInterrupt, GeneratorExit))
        if not expected:  # a collective may fail shortly before or after the loss is detected
            self._news.wait(GRACE / 2)
        if self.lost is None and self.rank not in self.done:  # the others do not need a process that has finished
            text = str(getattr(error, "message", error)).strip().splitlines()
            stopped = isinstance(error, (KeyboardInterrupt, GeneratorExit))
            self.lost = self.rank, "was interrupted" if stopped else f"failed: {text[0] if text else repr(error)}"
        self._stop()
        own = self.lost is None or (self.lost[0] == self.rank and not self._signal)
        return None if expected or own else self.failure()

    def failure(self) -> LostProcessError:
        """The error for what happened to the lost rank."""
        rank, what = self.lost
        host = next((f" ({link.host})" for link in self._links if link.rank == rank), "")
        lines = [f"rank {rank}{host} {what}. All processes of the run end."]
        again = "start the command again"
        if self.folder is not None:
            known = self.saved if self.saved is not None else self.folder.saved
            lines.append(
                "No checkpoint of this run was written before."
                if known is None
                # Rank 0 may have written another one before it could report it.
                else f"The checkpoint of iteration {known}{', or a later one,' if self.rank and rank == 0 else ''} is "
                f"complete in {self.folder.path} of rank 0."
            )
            again = again if known is None else "continue from the checkpoint: the same command with --resume"
        hint = f"Look at the output of rank {rank} and at its machine, then {again}."
        return LostProcessError("\n".join(lines), hint, rank)

    def _stop(self) -> None:
        self._leaving = True
        self._poke()
        self._thread.join(5 * GRACE)
        with suppress(ValueError):
            for number, before in self._handlers.items():
                signal.signal(number, before)
            if self._handlers:
                signal.set_wakeup_fd(self._wakeup)
        for end in (*(link.socket for link in self._links), self._wake, self._woken):
            end.close()

    def _poke(self) -> None:
        with suppress(OSError):
            self._wake.send(b"\0")

    def _handle_signals(self) -> None:
        """Let the thread know of signals that end a process. Python's own handlers wait for the main thread."""
        self._handlers = {}
        with suppress(ValueError):  # only the main thread may
            self._wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in _ENDING}

    # ---- the thread

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            before, beat = time.monotonic(), min(BEAT, self.timeout / 6)
            while not self._leaving:
                self._send()
                for key, _ in selector.select(beat):
                    if key.data is None:
                        self._read_signals()
                        continue
                    for news in key.data.receive():
                        self._merge(news)
                    if key.data.closed:
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - before > beat + self.timeout / 3:  # this thread could not run, so it has not listened
                    for link in self._links:
                        link.seen = now
                before = now
                self._judge(now)
        self._send()

    def _send(self) -> None:
        if self.folder is not None and self.folder.saved is not None:
            self.saved = max(self.folder.saved, self.saved or 0)
        news = {"saved": self.saved, "done": sorted(self.done), "lost": self.lost, "work": self._work}
        for link in self._links:
            if not link.closed:
                link.send(news)

    def _merge(self, news: dict[str, Any]) -> None:
        known = len(self.done), self.lost
        self.done |= set(news["done"])
        if self.lost is None and news["lost"]:
            self.lost = tuple(news["lost"])
        if news["saved"] is not None:
            self.saved = max(news["saved"], self.saved or 0)
        for rank, work in zip(map(int, news["work"]), news["work"].values(), strict=True):
            if rank != self.rank and work > self._work.get(rank, []):
                self._work[rank] = work
                self._last = time.monotonic()
        if known != (len(self.done), self.lost):
            self._poke()  # send it on

    def _read_signals(self) -> None:
        with suppress(BlockingIOError):
            received = self._woken.recv(1 << 10)
            if self._signal is None and any(number in _ENDING for number in received):
                self._signal = time.monotonic(), next(n for n in received if n in _ENDING)

    def _judge(self, now: float) -> None:
        """Decide whether a process is lost; end this process if its main thread did not do so in time."""
        for link in self._links if self.lost is None else ():
            if link.rank in self.done:
                continue
            if link.closed:
                self.lost = link.rank, "ended unexpectedly: its connection was closed"
            elif now - link.seen > self.timeout:
                self.lost = link.rank, f"has not answered for {self.timeout:g} seconds"
        if self.lost is None and self._signal and now - self._signal[0] > GRACE / 2:
            # `mlx.launch` ends all processes when one has failed; the reason may still arrive
            self.lost = self.rank, f"was told to end ({signal.Signals(self._signal[1]).name})"
        quiet, limit = now - self._last, max(_TIMEOUTS * self.timeout, _SLOWER * self._longest)
        working = any(busy for _, busy in self._work.values())
        if self.lost is None and self._training and not working and quiet > limit:
            self.lost = self.rank, f"has waited for {quiet:.0f} seconds without completing an iteration"
        if self.lost or len(self.done) == self.size:
            self._news.set()
        if self.lost and self._decided is None:
            self._decided = now
            self._send()
        elif self.lost and now - self._decided > GRACE and not self._leaving:
            self._end(self.failure())

    def _end(self, failure: Exception | str) -> None:
        """Write the message and end this process, whose main thread waits in a collective."""
        hint = getattr(failure, "hint", "Look at the output of the other processes.")
        text = f"\nError: {getattr(failure, 'message', failure)}\nHint: {hint}\n"
        with suppress(OSError):
            if select.select([], [2], [], GRACE)[1]:  # a full pipe that nobody reads would block this process forever
                os.write(2, text.encode())
        for link in getattr(self, "_links", ()):
            if self.lost and link.rank == self.lost[0]:
                link.kill()
        os._exit(1)
