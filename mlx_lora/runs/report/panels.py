"""Which charts are on the page, and the curves in each. charts.py draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import TOKENS
from .charts import SERIES, Line, draw
from .history import CURVES, TRAIN, VALID, Curve, History

_SIZES = {"svg": (4.6, 2.3), "svg_wide": (9.6, 3.0)}  # inches
_ZERO = ("learning_rate", "tokens_per_second", "peak_memory")  # charts whose vertical axis starts at 0
# A preference loss's metric for both answers of a pair is one chart: rewards/chosen and rewards/rejected.
_SIDES = {"chosen": 2, "rejected": 5}  # colours


def panels(runs: Sequence[History]) -> list[dict[str, Any]]:
    """The charts: the loss, metrics, quantities of both answers of a pair, then the rest.

    The loss is drawn wide, and narrow for small screens.
    """
    found = []
    for number, (title, keys) in enumerate(_titles(runs).items()):
        lines = [line for i, run in enumerate(runs) for key in keys for line in _lines(run, key, i, len(runs) > 1)]
        if not lines:
            continue
        key = keys[0]
        named, unit = CURVES.get(key, (title, ""))
        unit = "" if key == "loss" and any(run.rows != TOKENS for run in runs) else unit
        legend = [{"label": line.label, "colour": line.colour, "dashed": line.dashed} for line in lines]
        legend = legend if max(len(lines), len(runs)) > 1 else []
        panel = {"title": named, "unit": unit, "wide": key == "loss", "legend": legend}
        panel["best"] = any(line.best is not None for line in lines)
        chosen_by = [run.ended_early for run in runs if run.best and _curve_of(run.best[1])[0] in keys]
        end = chosen_by[0] if len(runs) == 1 and chosen_by else None
        panel["ended"] = end is not None
        for name in ("svg", "svg_wide") if panel["wide"] else ("svg",):
            panel[name] = draw(f"{name}-{number}", named, lines, _SIZES[name], key in _ZERO, end)
        found.append(panel)
    return found


def side_of(key: str) -> str:
    """The answer of a pair that a quantity belongs to: "chosen" or "rejected"; "" for other quantities."""
    side = key.rpartition("/")[2]
    return side if "/" in key and side in _SIDES else ""


def metrics_of(runs: Sequence[History]) -> list[str]:
    """The names of the runs' metrics other than the loss."""
    return list(dict.fromkeys(key for run in runs for key in run.curves if key not in CURVES))


def _titles(runs: Sequence[History]) -> dict[str, list[str]]:
    """The quantities of each chart, by its title."""
    metrics = metrics_of(runs)
    found = {key: [key] for key in ["loss", *(key for key in metrics if not side_of(key))]}
    for key in filter(side_of, metrics):
        found.setdefault(key.rpartition("/")[0], []).append(key)
    return {**found, **{key: [key] for key in CURVES if key not in found}}


def _lines(run: History, key: str, index: int, several: bool) -> list[Line]:
    """The curves of a quantity. For both answers of a pair, several runs show only the validation, if there is one."""
    curves, side = run.curves.get(key, {}), side_of(key)
    best = run.best if run.best and _curve_of(run.best[1]) == (key, VALID) else None
    drawn = [on for on in (TRAIN, VALID) if on in curves and curves[on].last is not None]
    if side and several and VALID in drawn:
        drawn = [VALID]
    found = []
    for on in drawn:
        parts = [run.name if several else "", side, on if len(curves) > 1 or not several else ""]
        colour = index if several else _SIDES[side] if side else int(on == VALID)
        dashed = side == "rejected" if several and side else (several or bool(side)) and on == VALID and len(drawn) > 1
        label = ", ".join(part for part in parts if part)
        found.append(Line(label, curves[on], colour % len(SERIES), dashed, best[0] if best and on == VALID else None))
    return found


def _curve_of(name: str) -> tuple[str, str]:
    """The curve of a run's best value: the validation, whose loss is called ``val_loss``."""
    return ("loss" if name == "val_loss" else name), VALID


def last_of(run: History, key: str) -> float | None:
    """The last value of a quantity, from the validation if it was measured there."""
    curves = run.curves.get(key, {})
    return curves.get(VALID, curves.get(TRAIN, Curve())).last
