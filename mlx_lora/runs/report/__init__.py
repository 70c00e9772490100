"""``report.html``: what a run did on one page, or several runs side by side, made from their logs.

The page is one file that needs no network and no scripts. history.py reads the log, panels.py chooses the charts and
charts.py draws them, page.py and comparison.py say what is on the page, answers.py compares answers, page.html and
page.css are the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...base.writing import write_text
from ...errors import ConfigError
from ..log import LOG
from .comparison import comparison_page
from .history import History, read_history
from .page import run_page


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
            reason = f"holds no {LOG}" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
            faults.append(f"{path}: {reason if not (path / LOG).exists() else problem.strerror}")
        else:
            if not found[-1].all_of("Run") and not found[-1].curves:
                faults.append(f"{path / LOG}: holds no line of a run")
    real = [path.resolve() for path in paths]
    faults += [f"{path}: is named twice" for i, path in enumerate(paths) if real[i] in real[:i]]
    if faults:
        hint = "Name folders that mlx-lora train has written, such as its --adapter-path, each once."
        raise ConfigError("\n".join(faults), hint)
    return found


def write_report(folders: Sequence[str | Path], output: str | Path) -> list[History]:
    """Write the page of one run, or the comparison of several, to the file ``output``; return the runs.

    The file is replaced at once: a reader sees the old page or the new one.

    Raises: ConfigError that names every folder without a run; FormatError where the file cannot be written.
    """
    found, output = read_histories(folders), Path(output)
    text = run_page(found[0]) if len(found) == 1 else comparison_page(found)
    write_text(output, text)
    return found


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
    """The last parts of each path, as many as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
