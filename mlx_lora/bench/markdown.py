"""The report of ``bench check`` as Markdown, to paste into an issue or a README; and reports gathered by chip."""

from __future__ import annotations

from collections.abc import Iterable

from .report import DONE, Figure, Report

# Which parts of ``bench kernels`` run which kernel.
USED_BY = {
    "lora_shrink": ("q, k, v", "o", "gate, up", "down", "q, DoRA", "q, 4 adapters", "q, NF4"),
    "lora_qmv": ("q, k, v", "o", "gate, up", "down", "q, DoRA", "q, 4 adapters", "q, NF4"),
    "lora_swiglu": ("MLP",),
    "dora_norm": ("norms, DoRA",),
    "nf4_dequantize": ("dequantize, NF4",),
}

_PATHS = """In the tables, *base* has no adapter; *kernels* is mlx-lora's adapter with its kernels, *plain* the same
with plain operations, *mlx-lm* an adapter of mlx-lm's layers, and *fused* an adapter merged into weights of 8 bits."""


def markdown(report: Report) -> str:
    """Everything in ``report``, as tables."""
    blocks = [
        f"# mlx-lora on {report.machine.chip}" + (" (dry run)" if report.emulated else ""),
        _dry_run(report),
        _table(("", ""), _machine(report)),
        "\n".join(f"- {text}" for text in report.advice),
        _tests(report),
        _failures(report),
        _verdict(report),
    ]
    blocks += [] if report.emulated or not report.figures else ["## Summary", gathered([report])]
    blocks += [_PATHS] if report.figures else []
    for part in dict.fromkeys(f.part for f in report.figures):
        blocks.append(f"## {part.capitalize()}\n\n" + figures_table([f for f in report.figures if f.part == part]))
    blocks.append("## Parts of the run\n\n" + _parts(report))
    return "\n\n".join(block for block in blocks if block) + "\n"


def figures_table(figures: Iterable[Figure]) -> str:
    """A row for each figure: what was measured, its spread, the estimate, and how far off that was."""
    head = ("model", "what", "path", "value", "middle half of the samples", "how", "estimated", "estimate is off by")
    rows = []
    for f in figures:
        unit = "x" if f.unit == "x" else f" {f.unit}"
        estimate = "" if f.estimate is None else number(f.estimate) + unit
        off = "" if f.off is None else f"{100 * f.off:+.0f} %"
        spread = f"{number(f.low)} to {number(f.high)} ({f.samples})"
        rows.append((f.model, f.what, f.path, number(f.median) + unit, spread, f.how, estimate, off))
    return _table(head, rows)


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdicts(report: Report) -> dict[str, str]:
    """For each kernel, why ``auto`` should not take it on this GPU; "" if all tests pass and it is never slower.

    A kernel must be at least as fast as plain operations in every part that runs it, at every size measured.
    """
    found = {}
    for kernel, parts in USED_BY.items():
        pairs = [
            (f, plain)
            for f in report.figures
            if f.part == "kernels" and f.path == "kernels" and f.what in parts
            if (plain := report.find("kernels", f.model, f.what, "plain", "us"))
        ]
        slow = [f"{f.what} of {f.model}" for f, plain in pairs if f.median > plain.median]
        if report.emulated:
            found[kernel] = "a dry run measures nothing"
        elif report.tests.failures:
            found[kernel] = f"{len(report.tests.failures)} kernel tests fail"
        elif not report.tests.passed or report.tests.ran < report.tests.selected:
            found[kernel] = f"{report.tests.ran} of {report.tests.selected} kernel tests have run"
        elif {f.what for f, _ in pairs} < set(parts) or _state(report, "kernels") != DONE:
            found[kernel] = "some of its parts are not measured"
        else:
            found[kernel] = f"slower than plain operations: {', '.join(slow)}" if slow else ""
    return found


# The tables of ``gathered``: part -> its paths.
_GATHERED = {
    "decoding": ("base", "kernels", "plain", "mlx-lm", "fused"),
    "training": ("LoRA", "LoRA, mlx-lm", "DoRA", "DoRA, mlx-lm", "LoRA on NF4"),
    "prompts": ("base", "kernels", "mlx-lm"),
    "swaps": ("mlx-lora",),
}


def gathered(reports: Iterable[Report]) -> str:
    """The figures that matter most as measured, by chip; from the newest report of each chip; dry runs do not count."""
    newest = {r.machine.chip: r for r in sorted(reports, key=lambda r: r.started) if not r.emulated}
    blocks = []
    for part, paths in _GATHERED.items():
        rows = []
        for chip, report in sorted(newest.items()):
            figures = [f for f in report.figures if f.part == part and f.path in paths]
            for model, what, unit in dict.fromkeys((f.model, f.what, f.unit) for f in figures):
                found = [report.find(part, model, what, path, unit) for path in paths]
                cells = (f"{number(f.median)} {unit}" if f else "" for f in found)
                rows.append((chip, f"{report.tests.passed} of {report.tests.selected}", model, what, *cells))
        if rows:
            head = ("chip", "kernel tests passed", "model, 4 bits", "measured", *paths)
            blocks.append(f"{part.capitalize()}:\n\n{_table(head, rows)}")
    return "\n\n".join(blocks) or "No report yet."


def _dry_run(report: Report) -> str:
    if not report.emulated:
        return ""
    return "**A dry run: the kernels were emulated, the models tiny. No time here says anything about a GPU.**"


def _machine(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    working_set = f", of which the GPU may keep {machine.working_set} GB" if machine.working_set else ""
    spent = f"{report.seconds:.0f} s of {60 * report.minutes:.0f} s"
    return [
        ("chip", f"{machine.chip}, {machine.backend}, {machine.cores} CPU cores"),
        ("memory", f"{machine.memory} GB{working_set}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("run", f"{report.started}, {report.ended} after {spent}"),
    ]


def _tests(report: Report) -> str:
    tests = report.tests
    if not tests.selected:
        return "**Kernel tests**: none have run."
    line = f"**Kernel tests** on {tests.backend}: {tests.ran} of {tests.selected} have run in {tests.seconds:.0f} s: "
    skipped = sum(tests.skipped.values())
    line += f"{tests.passed} passed, {len(tests.failures)} failed, {skipped} skipped."
    if tests.ran < tests.selected:
        line += " With more --minutes all of them run."
    return "\n".join([line, *(f"- {count} skipped: {reason}" for reason, count in tests.skipped.items())])


def _failures(report: Report) -> str:
    rows = [(f"`{f.test}`", f.seed, f.message, f"`{f.command}`") for f in report.tests.failures]
    return _table(("failed test", "seed", "message", "run it alone"), rows) if rows else ""


def _verdict(report: Report) -> str:
    if not any(f.part == "kernels" for f in report.figures):
        return ""
    rows = [(f"`{kernel}`", f"no: {why}" if why else "yes") for kernel, why in verdicts(report).items()]
    return _table(("kernel", "should `auto` take it on this GPU?"), rows)


def _parts(report: Report) -> str:
    rows = []
    for part in report.parts:
        thermal = " -> ".join(dict.fromkeys(part.thermal))
        rows.append((part.name, part.state, f"{part.seconds:.0f} s", thermal, "; ".join(part.notes)))
    return _table(("part", "", "time", "thermal state before and after", "notes"), rows)


def _state(report: Report, name: str) -> str:
    return next((part.state for part in report.parts if part.name == name), "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
