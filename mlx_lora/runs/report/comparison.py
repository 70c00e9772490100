"""The page of several runs side by side: results, settings that differ, curves, and answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from .answers import beside, correct_beside
from .charts import SERIES
from .history import TRAIN, VALID, Curve, History, mapping
from .page import UNSET, largest, median, notes, render, status
from .panels import last_of, metrics_of, panels, side_of
from .text import duration, shown

_NOT_RANKED = ("kl", "nll_loss")  # neither direction is better, or the loss shows it already


def comparison_page(runs: list[History]) -> str:
    """The page of several runs side by side, as HTML."""
    colour = {run.name: f"--series-{i % len(SERIES)}" for i, run in enumerate(runs)}
    answers = beside(runs)
    return render(
        title=f"{len(runs)} runs compared",
        subtitle=", ".join(run.name for run in runs),
        runs=[{"name": run.name, "colour": colour[run.name], "status": status(run, short=True)} for run in runs],
        compared=_compared(runs),
        differing=_differing(runs),
        charts=panels(runs),
        prompts=answers if any(run.answers for run in runs) else None,
        correct=correct_beside(runs) if answers else [],
        why_none="the runs were not asked the same prompts",
        label=runs[0].expected,
        notes=notes(runs),
    )


def _compared(runs: Sequence[History]) -> list[tuple[str, list[str], int | None]]:
    """(what, its value in each run, index of the best one) for the table."""
    losses = [run.curves.get("loss", {}) for run in runs]
    chosen = [run.best if run.best and run.best[1] == "val_loss" else None for run in runs]
    rows = {"Best validation loss": [best and best[2] for best in chosen]}
    by_metric = dict.fromkeys(run.best[1] for run in runs if run.best and run.best[1] != "val_loss")
    rows |= {f"Best {n}": [r.best[2] if r.best and r.best[1] == n else None for r in runs] for n in by_metric}
    rows["at iteration"] = [run.best[0] if run.best else None for run in runs]
    rows |= {f"Last {on} loss": [curves.get(on, Curve()).last for curves in losses] for on in (VALID, TRAIN)}
    tested = [run.last_of("TestReport") for run in runs]
    rows["Test loss"] = [test.get("loss") for test in tested]
    rows |= {f"Last {key}": [last_of(run, key) for run in runs] for key in metrics_of(runs)}
    tested = [{"exact_match": test.get("exact_match"), **mapping(test.get("metrics"))} for test in tested]
    names = dict.fromkeys(name for test in tested for name in test if not side_of(name))
    rows |= {f"Test {name}": [test.get(name) for test in tested] for name in names}
    rows["Tokens learned"] = [run.last_of("TrainReport").get("trained_tokens") for run in runs]
    rows["Tokens per second"] = [median(run, "tokens_per_second") for run in runs]
    rows["Peak memory, GB"] = [largest(run, "peak_memory") for run in runs]
    table = []
    for what, values in rows.items():
        known = [value for value in values if isinstance(value, (int, float))]
        if known:
            table.append((what, [shown(value) for value in values], _best_of(what, values, known, runs)))
    table.append(("Time", [duration(run.seconds) for run in runs], None))
    return table


def _best_of(what: str, values: list, known: list[float], runs: Sequence[History]) -> int | None:
    """The index of the lowest loss or the highest metric; None if the values cannot be compared or are equal."""
    name = what.partition(" ")[2]
    loss = what.endswith(" loss") and name != "nll_loss"
    if len(set(known)) < 2 or (loss and len({run.settings.get("train.loss") for run in runs}) > 1):
        return None
    if loss:
        return values.index(min(known))
    ranked = what.startswith(("Best ", "Last ", "Test ")) and not side_of(name) and name not in _NOT_RANKED
    return values.index(max(known)) if ranked else None


def _differing(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, with the value of each. An older log may hold no settings."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    known = [run.settings for run in runs if run.settings]
    return [
        (name, [shown(run.settings.get(name)) for run in runs])
        for name in names
        if len({shown(None if value in UNSET else value) for value in (own.get(name) for own in known)}) > 1
    ]
