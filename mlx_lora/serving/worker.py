"""The generating thread and its health."""

from __future__ import annotations

import atexit
import logging
import threading
import time

from ..errors import MLXLoRAError
from ..threads import run_in_thread
from .engine import Engine

_IDLE = 0.05  # seconds between checks of the queue without a ``wake``
log = logging.getLogger(__name__)


class Stopped(MLXLoRAError):
    """The engine has stopped or is stopping."""


class Worker:
    """Calls ``engine.step`` in its own thread until ``stop``.

    ``wake`` makes it check the queue at once. If a step raises, every row ends with that error and the thread
    continues. ``alive`` is False if the thread has stopped for any reason. Python stops a running worker at exit.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.last_step = time.monotonic()
        self._stop, self._work = threading.Event(), threading.Event()
        self._ended = threading.Event()
        self.alive = False

    def start(self) -> Worker:
        self.alive = True
        atexit.register(self.stop)
        run_in_thread(self._run)
        return self

    @property
    def busy_seconds(self) -> float:
        """How long the current step has taken so far; 0 while the worker is idle."""
        idle = self.engine.active == 0 and self.engine.queued == 0
        return 0.0 if idle else time.monotonic() - self.last_step

    def wake(self) -> None:
        """Tell the worker that the queue has a new request."""
        self._work.set()

    def stop(self, timeout: float = 10.0) -> None:
        """Stop after the current step, and wait for it. Unfinished rows end with ``Stopped``.

        Args:
            timeout: seconds to wait.
        """
        self._stop.set()
        self._work.set()
        if self.alive:
            self._ended.wait(timeout)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._work.clear()
                self.last_step = time.monotonic()
                if not self._step():
                    self._work.wait(_IDLE)
        finally:
            try:
                self.engine.fail_all(Stopped("the server is shutting down", "Send the request again later."))
                self.engine.close()
            finally:
                atexit.unregister(self.stop)
                self.alive = False
                self._ended.set()

    def _step(self) -> bool:
        try:
            return self.engine.step()
        except Exception as error:
            log.exception("a step of the engine failed")
            self.engine.fail_all(error)
            return True
