"""The content of one run's page: figures, charts, tables and answers. comparison.py does this for several runs.

The template engine escapes all text; only the charts are markup.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .answers import correct, prompts, why_none
from .history import CURVES, TRAIN, VALID, Curve, History, clean, mapping, number
from .panels import panels, side_of
from .text import compact, duration, shown, size

ROWS = 200  # of the table of numbers
UNSET = (None, [], {}, "", ())


def run_page(run: History) -> str:
    """The page of one run, as HTML."""
    settings = {name: shown(value) for name, value in run.settings.items() if value not in UNSET}
    return render(
        title=run.name,
        subtitle=_subtitle(run),
        status=status(run),
        figures=_figures(run),
        charts=panels([run]),
        prompts=prompts(run),
        correct=correct(run),
        why_none=why_none(run),
        label=run.expected,
        warnings=_warnings(run),
        settings=_grouped(settings),
        facts=_facts(run),
        numbers=_numbers(run),
        notes=notes([run]),
    )


def render(**context: Any) -> str:
    """The page as HTML, made from the given parts."""
    names = ("subtitle", "status", "figures", "prompts", "correct", "why_none", "settings", "facts", "numbers", "label")
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


def status(run: History, short: bool = False) -> str:
    """The run's iterations and time, and, unless ``short``, the reason for an early end."""
    total = run.last_of("Started").get("iters")
    if run.ended_early is not None and short:
        return f"Ended early after {run.iteration:,} iterations in {duration(run.seconds)}"
    if run.ended_early is not None:
        given = f"{run.settings['train.patience']} validations" if run.settings.get("train.patience") else "validations"
        why = f"{given} in a row brought no improvement"
        return f"Ended early after {run.iteration:,} of {shown(total)} iterations in {duration(run.seconds)}: {why}"
    if run.finished:
        return f"Finished {run.iteration:,} iterations in {duration(run.seconds)}"
    of = f" of {total:,}" if isinstance(total, int) else ""
    return f"Not finished: {run.iteration:,}{of} iterations, {duration(run.seconds)}"


def _figures(run: History) -> list[tuple[str, str, str]]:
    """The figures at the top: (label, value, note)."""
    loss, found = run.curves.get("loss", {}), []
    if run.best:
        at, name, value = run.best
        what = ("Best validation loss", "") if name == "val_loss" else ("Best validation", f"{name}, ")
        found.append((what[0], shown(value), f"{what[1]}at iteration {at:,}"))
    for on in (VALID, TRAIN):
        if on in loss and loss[on].last is not None:
            first = next(value for value in loss[on].values if value is not None)
            found.append((f"Last {on} loss", shown(loss[on].last), f"first {shown(first)}"))
    if tested := run.last_of("TestReport"):
        perplexity = tested.get("perplexity")
        found.append(("Test loss", shown(tested.get("loss")), perplexity and f"perplexity {shown(perplexity)}"))
        metrics = {"exact_match": tested.get("exact_match"), **mapping(tested.get("metrics"))}
        kept = {name: value for name, value in metrics.items() if value is not None and not side_of(name)}
        found += [("Test", shown(value), name) for name, value in kept.items()]
    if reports := run.all_of("TrainReport"):
        found.append(("Tokens learned", compact(reports[-1].get("trained_tokens")), ""))
    if speed := median(run, "tokens_per_second"):
        found.append(("Tokens per second", compact(speed), "median"))
    if memory := largest(run, "peak_memory"):
        planned = number(run.last_of("Planned").get("peak"))
        found.append(("Peak memory", size(memory * 1e9), planned and f"planned {size(planned)}"))
    return found


def _values(run: History, key: str) -> list[float]:
    return [value for value in run.curves.get(key, {}).get(TRAIN, Curve()).values if value is not None]


def largest(run: History, key: str) -> float | None:
    """The largest value of a quantity in training."""
    return max(_values(run, key), default=None)


def median(run: History, key: str) -> float | None:
    """The median of a quantity in training."""
    values = sorted(_values(run, key))
    return values[len(values) // 2] if values else None


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
    found += [("Plan", _plan(run)), ("Kept output of frozen layers", _prefix(run))]
    found.append(("Model", [(name, shown(value)) for name, value in model.items() if value is not None]))
    machine = {**mapping(described.get("machine")), **mapping(described.get("versions"))}
    found.append(("Machine", [(n.replace("_", " "), shown(v)) for n, v in machine.items() if v is not None]))
    return [(title, rows) for title, rows in found if rows]


def _plan(run: History) -> list[tuple[str, str]]:
    """Planned and measured values."""
    planned = run.last_of("Planned")
    peak, seconds, padding = (number(planned.get(key)) for key in ("peak", "seconds", "padding"))
    measured, rows = largest(run, "peak_memory"), {}
    if planned and peak is None:
        rows["no plan"] = str(planned.get("reason") or "")
    elif planned:
        rows["peak memory, planned"] = size(peak)
        rows["peak memory, measured"] = measured and size(measured * 1e9)
        rows["memory that MLX can use"] = size(number(planned.get("limit")) or 0)
        rows["time, planned"] = "not known" if seconds is None else duration(seconds)
        rows["time, measured"] = run.finished and duration(run.seconds)
        rows["epochs"] = shown(planned.get("epochs")) if number(planned.get("epochs")) is not None else ""
        rows["padding"] = "" if padding is None else f"{100 * padding:.1f} %"
    return [(name, value) for name, value in rows.items() if value]


def _prefix(run: History) -> list[tuple[str, str]]:
    kept = run.last_of("PrefixCache")
    if not kept:
        return []
    layers = f"{shown(kept.get('layers'))} of {shown(kept.get('of'))}"
    return [("layers", layers), ("size", size(number(kept.get("bytes")) or 0)), ("kept in", str(kept.get("place")))]


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


def notes(runs: Iterable[History]) -> list[str]:
    """Notes about missing parts of the page."""
    return [
        f"{run.name}: {run.unreadable} line{'s' * (run.unreadable > 1)} of the log could not be read."
        for run in runs
        if run.unreadable
    ]
