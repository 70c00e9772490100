"""``report.html``: what a run did on one page, or several runs side by side, made from their logs.

The page is one file that needs no network and no scripts. history.py reads the log, panels.py chooses the charts and
charts.py draws them, page.py and comparison.py make the content, answers.py compares answers, and page.html and
page.css are the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...base.writing import write_text
from ...errors import ConfigError
from ...formats.checkpoints import iteration, numbered
from ..log import LOG, PAGE
from .comparison import comparison_page
from .history import History, read_history
from .page import run_page

GENERATOR = '<meta name="generator" content="mlx-lora">'  # in every page; another page is not replaced


def read_histories(folders: Sequence[str | Path]) -> list[History]:
    """Read the runs in ``folders``. Raises: ConfigError that names every folder without a run."""
    paths, found, faults = [Path(folder) for folder in folders], [], []
    if not paths:
        raise ConfigError("a report needs the folder of a run", "Name one, such as adapters.")
    names = _names(paths)
    for path, name in zip(paths, names, strict=True):
        try:
            found.append(read_history(path, name))
        except OSError as problem:
            faults.append(f"{path}: {_without_log(path) or problem.strerror}")
        else:
            if not found[-1].all_of("Run") and not found[-1].curves:
                faults.append(f"{path / LOG}: holds no line of a run")
    real = [path.resolve() for path in paths]
    faults += [f"{path}: is named twice" for i, path in enumerate(paths) if real[i] in real[:i]]
    if faults:
        hint = "Name folders that mlx-lora train has written, such as its --adapter-path, each once."
        raise ConfigError("\n".join(faults), hint)
    return found


def _without_log(path: Path) -> str:
    """The reason why there is no log at ``path``; empty if there is one."""
    if (path / LOG).exists():
        return ""
    if not path.is_dir():
        return "is not a folder" if path.exists() else "does not exist"
    saved = [iteration(file) for file in numbered(path)]
    if not saved:
        return f"holds no {LOG}"
    at = f"iteration {saved[0]}" if len(saved) == 1 else f"iterations {min(saved)} to {max(saved)}"
    return (
        f"holds checkpoints of {at}, but no {LOG}, which a report is made from. The log was deleted or not copied, or "
        "an older version has trained. mlx-lora train --resume logs from the last checkpoint on, and mlx-lora test "
        "measures a checkpoint"
    )


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[History]:
    """Write the page of one run, or the comparison of several, to the file ``output``; return the runs.

    The file is replaced at once: a reader sees the old page or the new one. Only another report is replaced.

    Raises: ConfigError that names every folder without a run, or if ``output`` does not end in .html or is another
        file; FormatError if the file cannot be written.
    """
    output = Path(output)
    _check_output(output)
    found = read_histories(folders)
    text = run_page(found[0]) if len(found) == 1 else comparison_page(found)
    write_text(output, text)
    return found


def _check_output(output: Path) -> None:
    """Refuse to replace anything but a report. Raises: ConfigError."""
    if output.is_dir() or output.suffix.lower() not in (".html", ".htm"):
        what = "is a folder" if output.is_dir() else "does not end in .html"
        raise ConfigError(f"{output}: {what}", "Name a file that ends in .html.")
    own = output.name == PAGE and (output.parent / LOG).exists()  # also one from before pages had the tag
    if output.exists() and not own and GENERATOR not in output.read_text("utf-8", errors="replace")[:1000]:
        raise ConfigError(f"{output}: exists and is not a report", "Name another file (--output).")


def summary(history: History) -> dict[str, Any]:
    """The figures of a run for a program."""
    loss = history.curves.get("loss", {})
    best = history.best or (None, None, None)
    return {
        "folder": str(history.folder),
        "iteration": history.iteration,
        "finished": history.finished,
        "best_iteration": best[0],
        "best_name": best[1],
        "best_value": best[2],
        **{f"last_{on}_loss": curve.last for on, curve in loss.items()},
        "test_loss": history.last_of("TestReport").get("loss"),
        "seconds": history.seconds,
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
