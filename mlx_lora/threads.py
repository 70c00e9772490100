"""Threads for MLX that never end by themselves.

MLX keeps compiled functions per thread, with references to Python objects. It drops them when the thread has ended, and
takes the GIL for it. Where Python is shutting down meanwhile, the whole process aborts ("terminate called without an
active exception"), also where the thread was joined before. So a thread whose work is done waits here for other work.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

_waiting: list[SimpleQueue] = []  # one of each thread that has nothing to do
log = logging.getLogger(__name__)


def run_in_thread(work: Callable[[], None]) -> None:
    """Call ``work`` in a thread that waits for work, or in a new one. Does not wait for its end."""
    try:
        queue = _waiting.pop()
    except IndexError:
        queue = SimpleQueue()
        threading.Thread(target=_work, args=[queue], name="mlx-lora", daemon=True).start()
    queue.put(work)


def _work(queue: SimpleQueue) -> None:
    while True:
        work = queue.get()
        try:
            work()
        except BaseException:  # also SystemExit, which would end the thread
            log.exception("the work of a thread failed")
        del work  # and what it holds
        _waiting.append(queue)


class Caller:
    """Calls functions one after another in a thread of its own, and so with a random state of its own.

    A context manager. Its end waits for the call that runs, also where the caller was interrupted (Ctrl-C): a thread
    that runs MLX while Python shuts down would abort the process.
    """

    def __enter__(self) -> Caller:
        self._calls: SimpleQueue = SimpleQueue()
        self._ended = threading.Event()
        atexit.register(self._end)  # a second interrupt ends the wait of __exit__
        run_in_thread(self._run)
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def __call__(self, function: Callable, *args: Any) -> Any:
        """What ``function`` returns. Raises: what it raises."""
        result: Future = Future()
        self._calls.put((result, function, args))
        return result.result()

    def _end(self) -> None:
        self._calls.put(None)
        self._ended.wait()

    def _run(self) -> None:
        try:
            while call := self._calls.get():
                _answer(*call)
                del call
        finally:
            mx.random.seed(time.time_ns())  # a trace leaves tracers in the random state; the thread is used again
            atexit.unregister(self._end)
            self._ended.set()


def _answer(result: Future, function: Callable, args: tuple) -> None:
    try:
        result.set_result(function(*args))
    except BaseException as error:
        result.set_exception(error)
