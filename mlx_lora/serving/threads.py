"""Threads for MLX that never end by themselves.

MLX keeps compiled functions per thread, with references to Python objects. It drops them when the thread has ended, and
takes the GIL for it. Where Python is shutting down meanwhile, the whole process aborts ("terminate called without an
active exception"). So a thread whose work is done waits here for other work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

_waiting: list[SimpleQueue] = []  # one of each thread that has nothing to do
log = logging.getLogger(__name__)


def run_in_thread(work: Callable[[], None]) -> None:
    """Call ``work`` in a thread that waits for work, or in a new one. Does not wait for its end."""
    try:
        queue = _waiting.pop()
    except IndexError:
        queue = SimpleQueue()
        threading.Thread(target=_work, args=[queue], name="mlx-lora-engine", daemon=True).start()
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
