"""Runs the measured parts of ``bench check`` in a separate process, and prints the results, one event per line.

``python -m mlx_lora.bench.worker '{"shares": {"kernels": 1}, "seconds": 60, "emulator": null}'``. A GPU that fails
may end a process; ``check.py`` then starts another one with the parts that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable

import mlx_lora  # noqa: F401  isort: skip  (opens a BLAS before MLX is imported)

from ..device import memory_limits
from .kernel_tests import load_emulator
from .parts import PARTS, TINY, Plan
from .report import CUT_SHORT, DONE, DRY_RUN, FAILED, Figure
from .thermal import thermal_state
from .timing import Clock, OutOfTime


def work(shares: dict[str, float], seconds: float, emulator: str | None, say: Callable[[dict], None]) -> None:
    """Run parts one after the other.

    Args:
        shares: of the time, for each part; unused time goes to the next parts. seconds: the total time.
        emulator: folder of the Metal emulator; with it all models are tiny. say: called with each event.
    """
    plan, how, all_time = Plan(), {}, Clock(seconds)
    with contextlib.ExitStack() as cleanup:
        if emulator:
            cleanup.enter_context(load_emulator(emulator).installed(instrument=False))
            plan, how = TINY, {"how": DRY_RUN}
        else:
            cleanup.enter_context(memory_limits())
        names = list(shares)
        for i, name in enumerate(names):
            clock, state = all_time.share(shares[name] / sum(shares[n] for n in names[i:])), DONE
            if clock.left() <= 0:
                return
            say({"event": "begin", "part": name, "seconds": clock.seconds, "thermal": thermal_state()})
            try:
                for found in PARTS[name](plan, clock):
                    if isinstance(found, Figure) and not math.isfinite(found.low + found.median + found.high):
                        say({"event": "note", "part": name, "text": f"{found.what}, {found.path}: is not finite"})
                    elif isinstance(found, Figure):
                        say({"event": "figure", **dataclasses.asdict(dataclasses.replace(found, **how))})
                    else:
                        say({"event": "note", "part": name, "text": found})
            except OutOfTime as error:
                say({"event": "note", "part": name, "text": str(error)})
                state = CUT_SHORT
            except Exception as error:  # no failure of one part may prevent the next ones
                text = " ".join(str(error).split())[:300]
                say({"event": "note", "part": name, "text": f"{type(error).__name__}: {text}"})
                state = FAILED
            if state == DONE and clock.left() < 0:
                state = CUT_SHORT
            say({"event": "end", "part": name, "state": state, "thermal": thermal_state()})


def main() -> None:
    """Read the arguments from the command line. All other prints go to stderr."""
    events, arguments = sys.stdout, json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        work(**arguments, say=lambda event: print(json.dumps(event), file=events, flush=True))


if __name__ == "__main__":
    main()
