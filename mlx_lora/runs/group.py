"""The processes that train together: MLX's group, with a time limit for their start."""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any

import mlx.core as mx

from ..errors import TrainingError

START = 120.0  # seconds within which every process must start
_started = False


def group() -> Any:
    """MLX's group of processes: this one alone unless it was started by ``mlx.launch``.

    The first call waits until all processes have started, at most ``START`` seconds; then it ends this process with a
    traceback, because no other Python thread can run while MLX waits. Raises: TrainingError: the processes cannot
    connect.
    """
    global _started
    if _started or "MLX_RANK" not in os.environ:
        return mx.distributed.init()
    faulthandler.dump_traceback_later(START, exit=True, file=sys.__stderr__)
    try:
        found = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of this run cannot connect to each other: {error}",
            "Check that the command starts on every machine, and the addresses in the hostfile. A port that is in use "
            "is avoided with mlx.launch --starting-port.",
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    _started = True
    return found
