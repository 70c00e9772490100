"""The thread that generates, and whether it is alive."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import MLXLoRAError
from .engine import Engine

_IDLE = 0.05  # seconds between looks at the queue when nobody wakes the thread
log = logging.getLogger(__name__)


class Stopped(MLXLoRAError):
    """The engine has stopped, or is about to."""


class Worker:
    """Calls ``engine.step`` in a thread of its own until ``stop``.

    After ``wake`` it looks at the queue at once. Where a step raises, every row ends with that error and the thread
    goes on; a thread that has ended for another reason shows in ``alive``.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.last_step = time.monotonic()
        self._stop, self._work = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlx-lora-engine", daemon=True)

    def start(self) -> Worker:
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy_seconds(self) -> float:
        """How long the present step has taken; 0 while there is nothing to do."""
        idle = self.engine.active == 0 and self.engine.queued == 0
        return 0.0 if idle else time.monotonic() - self.last_step

    def wake(self) -> None:
        """There is something new in the queue."""
        self._work.set()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its step. Rows that are not finished end with ``Stopped``."""
        self._stop.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._work.clear()
                self.last_step = time.monotonic()
                if not self._step():
                    self._work.wait(_IDLE)
        finally:
            self.engine.fail_all(Stopped("the server is shutting down", "Send the request again later."))
            self.engine.close()

    def _step(self) -> bool:
        try:
            return self.engine.step()
        except Exception as error:
            log.exception("a step of the engine failed")
            self.engine.fail_all(error)
            return True
