"""Training curves for experiment trackers: Weights & Biases and SwanLab. Their packages are optional."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def trackers(names: Iterable[str], project: str | None, settings: dict[str, Any]) -> list[Callable[[Any], None]]:
    """Functions that log a report, one for each service named. Each service starts an experiment.

    Raises: ConfigError: a package is not installed.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            hint = f"pip install 'mlx-lora[{name}]'"
            raise ConfigError(f"report_to {name}: the package is not installed", hint) from None
    for module in modules:
        module.init(project=project or Path.cwd().name, config=json.loads(json.dumps(settings, default=str)))
    return [lambda report, log=module.log: _log(log, report) for module in modules]


def _log(log: Callable[..., Any], report: Any) -> None:
    values = asdict(report)
    log({name: value for name, value in values.items() if name != "iteration"}, step=values["iteration"])
