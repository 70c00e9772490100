"""One writer in a folder at a time: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, MLXLoRAError, MLXLoRAWarning
from .writing import writing

LOCK = ".mlx-lora.lock"


@contextmanager
def locked(folder: Path, error: type[MLXLoRAError] = ConfigError) -> Iterator[None]:
    """Create ``folder`` and hold its lock: no other process or thread that uses ``locked`` can write there.

    At the end the lock's file is removed, and the folder too if nothing was written into it. On a file system without
    locks, the work continues with a warning.

    Raises: ``error``: another one is writing there.
    """
    from filelock import FileLock, Timeout

    made = not folder.exists()
    with writing(folder, error):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(str(path), timeout=0, thread_local=False)
    try:
        lock.acquire()
        while not path.exists():  # its last holder removed the file between our opening and locking it
            lock.release()
            lock.acquire()
    except Timeout:
        raise error(
            f"{folder}: another run or command is writing there",
            "Wait until it ends, stop it, or choose another folder.",
        ) from None
    except (OSError, NotImplementedError) as problem:
        warnings.warn(
            f"{folder}: its file system has no locks ({problem}). Start no second run in this folder.",
            MLXLoRAWarning,
            stacklevel=3,
        )
    try:
        yield
    finally:
        with suppress(OSError):  # the drive may be gone
            if lock.is_locked:
                path.unlink(missing_ok=True)
            if made and not os.listdir(folder):
                folder.rmdir()
        with suppress(OSError):
            lock.release()


def check_unlocked(folder: Path, error: type[MLXLoRAError] = ConfigError) -> None:
    """Refuse a folder in which a run or another command is writing. Raises: ``error``."""
    if (folder / LOCK).exists():
        with locked(folder, error):
            pass


def is_locked(folder: Path) -> bool:
    """Whether a run or command is writing in ``folder``. Changes nothing there."""
    try:
        import fcntl  # not on Windows

        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
