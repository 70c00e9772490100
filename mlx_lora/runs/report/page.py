"""What is on the page: figures, charts, tables and answers of a run, or of several runs side by side.

All text is escaped by the template engine; only the charts are markup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .answers import correct, prompts, why_none
from .charts import SERIES, Line, draw
from .history import CURVES, TRAIN, VALID, Curve, History, clean, mapping

ROWS = 200  # of the table of numbers
_SIZES = {"svg": (4.6, 2.3), "svg_wide": (9.6, 3.0)}  # inches
_ZERO = ("learning_rate", "tokens_per_second", "peak_memory")  # charts whose vertical axis begins at 0
_UNSET = (None, [], {}, "", ())


def run_page(run: History) -> str:
    """The page of one run, as HTML."""
    settings = {name: shown(value) for name, value in run.settings.items() if value not in _UNSET}
    return _render(
        title=run.name,
        subtitle=_subtitle(run),
        status=_status(run),
        figures=_figures(run),
        charts=_charts([run]),
        prompts=prompts(run),
        correct=correct(run),
        why_none=why_none(run),
        warnings=_warnings(run),
        settings=_grouped(settings),
        facts=_facts(run),
        numbers=_numbers(run),
        notes=_notes([run]),
    )


def comparison_page(runs: list[History]) -> str:
    """The page of several runs side by side, as HTML."""
    colour = {run.name: f"--series-{i % len(SERIES)}" for i, run in enumerate(runs)}
    return _render(
        title=f"{len(runs)} runs compared",
        subtitle=", ".join(run.name for run in runs),
        runs=[{"name": run.name, "colour": colour[run.name], "status": _status(run)} for run in runs],
        compared=_compared(runs),
        differing=_differing(runs),
        charts=_charts(runs),
        notes=_notes(runs),
    )


def _render(**context: Any) -> str:
    names = ("subtitle", "status", "figures", "prompts", "correct", "why_none", "settings", "facts", "numbers")
    empty = dict.fromkeys((*names, "runs", "compared", "differing", "warnings", "notes"))
    return _template().render({**empty, **context, "css": (Path(__file__).parent / "page.css").read_text("utf-8")})


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=clean
    )
    return environment.from_string((Path(__file__).parent / "page.html").read_text("utf-8"))


def _subtitle(run: History) -> str:
    described, settings = run.last_of("Run"), run.settings
    base = settings.get("model") or mapping(described.get("base")).get("model_type")
    rank = f"rank {settings['adapter.rank']}" if settings.get("adapter.rank") else ""
    method = settings.get("adapter.method")
    began = next((r["time"] for r in run.records if isinstance(r.get("time"), (int, float))), None)
    date = time.strftime("%d %B %Y, %H:%M", time.localtime(began)).lstrip("0") if began else ""
    rank = "" if method == "full" else rank
    return " · ".join(str(part) for part in (base, method, rank, date) if part)


def _status(run: History) -> str:
    total = run.last_of("Started").get("iters")
    if run.finished:
        return f"Finished {run.iteration:,} iterations in {duration(run.seconds)}"
    of = f" of {total:,}" if isinstance(total, int) else ""
    return f"Not finished: {run.iteration:,}{of} iterations, {duration(run.seconds)}"


def _figures(run: History) -> list[tuple[str, str, str]]:
    """(what, value, more) of the figures at the top."""
    loss, found = run.curves.get("loss", {}), []
    if run.best:
        at, name, value = run.best
        what = "validation loss" if name == "val_loss" else name
        found.append((f"Best {what}", shown(value), f"at iteration {at:,}"))
    for on in (VALID, TRAIN):
        if on in loss and loss[on].last is not None:
            first = next(value for value in loss[on].values if value is not None)
            found.append((f"Last {on} loss", shown(loss[on].last), f"first {shown(first)}"))
    if tested := run.last_of("TestReport"):
        found.append(("Test loss", shown(tested.get("loss")), f"perplexity {shown(tested.get('perplexity'))}"))
    if reports := run.all_of("TrainReport"):
        found.append(("Tokens learned", compact(reports[-1].get("trained_tokens")), ""))
    if speed := _median(run, "tokens_per_second"):
        found.append(("Tokens per second", compact(speed), "median"))
    if memory := max(_values(run, "peak_memory"), default=None):
        found.append(("Peak memory", f"{memory:.2f} GB", ""))
    return found


def _values(run: History, key: str) -> list[float]:
    return [value for value in run.curves.get(key, {}).get(TRAIN, Curve()).values if value is not None]


def _median(run: History, key: str) -> float | None:
    values = sorted(_values(run, key))
    return values[len(values) // 2] if values else None


def _charts(runs: list[History]) -> list[dict[str, str]]:
    """A chart for each quantity that any of the runs has, the loss first: wide, and narrow for small screens."""
    names = dict.fromkeys([*CURVES, *(key for run in runs for key in run.curves)])
    found = []
    for number, key in enumerate(names):
        lines = [line for i, run in enumerate(runs) for line in _lines(run, key, i, len(runs) > 1)]
        if not lines:
            continue
        title, unit = CURVES.get(key, (key, ""))
        legend = [{"label": line.label, "colour": line.colour, "dashed": line.dashed} for line in lines]
        chart = {"title": title, "unit": unit, "wide": key == "loss", "legend": legend if len(lines) > 1 else []}
        chart["best"] = any(line.best is not None for line in lines)
        for name in ("svg", "svg_wide") if chart["wide"] else ("svg",):
            chart[name] = draw(f"{name}-{number}", title, lines, _SIZES[name], key in _ZERO)
        found.append(chart)
    return found


def _lines(run: History, key: str, index: int, several: bool) -> list[Line]:
    curves = run.curves.get(key, {})
    best = run.best if run.best and _curve_of(run.best[1]) == (key, VALID) else None
    found = []
    for on in (TRAIN, VALID):
        if on in curves and curves[on].last is not None:
            label = f"{run.name}, {on}" if several and len(curves) > 1 else run.name if several else on
            colour = index if several else int(on == VALID)
            mark = best[0] if best and on == VALID else None
            found.append(Line(label, curves[on], colour, dashed=several and on == VALID and len(curves) > 1, best=mark))
    return found


def _curve_of(name: str) -> tuple[str, str]:
    """The curve that a run's best value is on: of the validation, whose loss is called ``val_loss``."""
    return ("loss" if name == "val_loss" else name), VALID


def _compared(runs: list[History]) -> list[tuple[str, list[str], int | None]]:
    """(what, its value in each run, index of the lowest loss) for the table of a comparison."""
    losses = [run.curves.get("loss", {}) for run in runs]
    best = [run.best[2] if run.best and run.best[1] == "val_loss" else None for run in runs]
    rows = {
        "Best validation loss": best,
        "at iteration": [run.best[0] if run.best else None for run in runs],
        **{f"Last {on} loss": [curves.get(on, Curve()).last for curves in losses] for on in (VALID, TRAIN)},
        "Test loss": [run.last_of("TestReport").get("loss") for run in runs],
        "Tokens learned": [run.last_of("TrainReport").get("trained_tokens") for run in runs],
        "Tokens per second": [_median(run, "tokens_per_second") for run in runs],
        "Peak memory, GB": [max(_values(run, "peak_memory"), default=None) for run in runs],
    }
    metrics = dict.fromkeys(key for run in runs for key in run.curves if key not in CURVES)
    rows |= {f"Last {key}": [_last_metric(run, key) for run in runs] for key in metrics}
    table = []
    for what, values in rows.items():
        known = [value for value in values if isinstance(value, (int, float))]
        lowest = values.index(min(known)) if "loss" in what and len(known) > 1 and len(set(known)) > 1 else None
        if known:
            table.append((what, [shown(value) for value in values], lowest))
    table.append(("Time", [duration(run.seconds) for run in runs], None))
    return table


def _last_metric(run: History, key: str) -> float | None:
    curves = run.curves.get(key, {})
    return curves.get(VALID, curves.get(TRAIN, Curve())).last


def _differing(runs: list[History]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, with the value of each. An older log may hold no settings."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    known = [run.settings for run in runs if run.settings]
    return [
        (name, [shown(run.settings.get(name)) for run in runs])
        for name in names
        if len({shown(None if value in _UNSET else value) for value in (own.get(name) for own in known)}) > 1
    ]


def _grouped(settings: dict[str, str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings by the config they belong to."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in settings.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group if rest else "run", []).append((rest or group, value))
    return [(group.capitalize(), rows) for group, rows in groups.items()]


def _facts(run: History) -> list[tuple[str, list[tuple[str, str]]]]:
    """The data summary, the model and the machine."""
    described, started = run.last_of("Run"), run.last_of("Started")
    keys = ("rows", "kept", "truncated", "dropped", "tokens", "learned_tokens", "longest")
    words = {"train": "Training data", "valid": "Validation data", "test": "Test data"}
    found = [
        (words.get(split, split), [(key.replace("_", " "), shown(facts[key])) for key in keys if key in facts])
        for split, facts in mapping(described.get("data")).items()
        if isinstance(facts, dict)
    ]
    model = {"type": mapping(described.get("base")).get("model_type"), "parameters": started.get("parameters")}
    model |= {"trainable": started.get("trainable"), "trained modules": started.get("modules")}
    found.append(("Model", [(name, shown(value)) for name, value in model.items() if value is not None]))
    machine = {**mapping(described.get("machine")), **mapping(described.get("versions"))}
    found.append(("Machine", [(n.replace("_", " "), shown(v)) for n, v in machine.items() if v is not None]))
    return [(title, rows) for title, rows in found if rows]


def _warnings(run: History) -> list[str]:
    found = [str(record.get("text")) for record in run.all_of("Warned")]
    found += [str(text) for record in run.all_of("DataLoaded") for text in record.get("warnings") or ()]
    if skipped := len(run.all_of("SkippedStep")):
        found.append(f"{skipped} optimizer steps were skipped, because their gradients were not finite.")
    return list(dict.fromkeys(found))


def _numbers(run: History) -> dict[str, Any]:
    """The curves as a table: a row for each iteration that has a report, evenly thinned."""
    columns = [(key, on) for key, curves in run.curves.items() for on in curves]
    values = {pair: dict(zip(c.iterations, c.values, strict=True)) for pair in columns for c in [_at(run, pair)]}
    every = sorted({iteration for column in values.values() for iteration in column})
    step = -(-len(every) // ROWS) or 1
    head = [f"{CURVES[key][0] if key in CURVES else key}, {on}" for key, on in columns]
    head = [text.removesuffix(f", {TRAIN}") if columns[i][0] != "loss" else text for i, text in enumerate(head)]
    kept = every[::step]
    rows = [(f"{at:,}", [shown(values[pair].get(at)) if at in values[pair] else "" for pair in columns]) for at in kept]
    return {"head": head, "rows": rows, "step": step}


def _at(run: History, pair: tuple[str, str]) -> Curve:
    return run.curves[pair[0]][pair[1]]


def _notes(runs: Iterable[History]) -> list[str]:
    return [
        f"{run.name}: {run.unreadable} line{'s' * (run.unreadable > 1)} of the log could not be read."
        for run in runs
        if run.unreadable
    ]


def shown(value: Any) -> str:
    """A value for a reader: at most four significant digits of a fraction, thousands separated."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value and not 1e-3 <= abs(value) < 1e5:
            mantissa, power = f"{value:.2e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    return str(value)


def compact(value: Any) -> str:
    """A large number in three digits: 1.23 M."""
    if not isinstance(value, (int, float)):
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if size == 1e4 else size):.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time in words: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
