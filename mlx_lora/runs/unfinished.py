"""Write what a process that was killed near a checkpoint did not write: lines of the log and the run's page."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import MLXLoRAWarning
from ..training import Checkpoint, Done, NewBest, TrainingState
from .log import LOG, PAGE, RunLog, logged_until
from .prefix import FILE, drop_states


def checkpoint_lines(past: list[dict[str, Any]], state: TrainingState, file: Path) -> Iterator[Any]:
    """The reports about ``state``'s checkpoint that are missing in ``past``, the lines of its run's log.

    Args:
        file: the weights of that checkpoint.
    """
    tally = state.tally
    if not _logged(past, "Checkpoint", state.iteration):
        yield Checkpoint(state.iteration, file)
    if tally.best_iteration == state.iteration and not _logged(past, "NewBest", state.iteration):
        yield NewBest(state.iteration, tally.best_by.partition(" ")[0], tally.best_value)


def finish(folder: Path, state: TrainingState, file: Path) -> list[str]:
    """Write the missing files of ``state``'s complete run into ``folder``, and delete its kept states of frozen layers.

    Answers to held-out prompts are not made, because they need the model.

    Returns: descriptions of what was done; empty if nothing was missing or the run is not complete.
    """
    reason, tally, done = _ended(state), state.tally, []
    if reason is None:
        return []
    if (folder / FILE).exists():
        drop_states(folder)
        done.append(f"{FILE} was deleted")
    past = logged_until(folder, state.iteration)
    if not past:
        return done
    if not _logged(past, "Done", state.iteration):
        log = RunLog(folder)
        log.replace(past)  # without half a line
        times = [record.get("time") or 0.0 for record in past]
        begun = max((time for time, record in zip(times, past, strict=True) if record["kind"] == "Run"), default=0.0)
        peak = max(record.get("peak_memory") or 0.0 for record in past)
        end = Done(
            *(tally.iteration, tally.trained_tokens, max(times) - begun, False, peak, tally.skipped_steps, reason)
        )
        for report in (*checkpoint_lines(past, state, file), end):
            log.add(type(report).__name__, asdict(report))
        done.append(f"the last lines of {LOG} were written")
    page = folder / PAGE
    if not page.exists() or os.stat(page).st_mtime_ns < os.stat(folder / LOG).st_mtime_ns:
        from .report import write_report

        try:
            write_report([folder], page)
            done.append(f"{PAGE} was written")
        except Exception as problem:  # the run is complete without it
            text = f"{PAGE} was not written: {problem}. Make it again with mlx-lora report {folder}"
            warnings.warn(text, MLXLoRAWarning, stacklevel=2)
    return done


def _logged(past: list[dict[str, Any]], kind: str, iteration: int) -> bool:
    """Whether there is a line of this kind for this iteration; a ``Done`` with "stopped" does not count."""
    return any(
        record["kind"] == kind and record.get("iteration") == iteration and not record.get("stopped") for record in past
    )


def _ended(state: TrainingState) -> str | None:
    """Why the run ended, see ``Done``; None if it is not complete."""
    tally, run = state.tally, state.run
    patience = run.get("settings", {}).get("train", {}).get("patience") or 0
    if tally.unmeasured:
        return None
    if tally.iteration == run.get("iters"):
        return "complete"
    return "patience" if 0 < patience <= tally.not_better else None
