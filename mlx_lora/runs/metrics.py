"""Metrics of generated answers: functions of the given and the expected answers, two lists of text.

For all of them, higher is better. White space around the answers is removed first.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from ..config import metric_name
from ..errors import ConfigError, MLXLoRAError
from .peers import working
from .reports import Answer

Metric = Callable[[list[str], list[str]], float]
_HOW = "A metric is a function of two lists of text, the given and the expected answers, and returns a number."


def exact_match(given: list[str], expected: list[str]) -> float:
    """The share of answers that are exactly the expected one."""
    return sum(a == b for a, b in zip(given, expected, strict=True)) / len(given)


def rouge_l(given: list[str], expected: list[str]) -> float:
    """The mean F-measure of ROUGE-L, by the package rouge-score without stemming, as Hugging Face's evaluate."""
    scorer = _rouge().RougeScorer(["rougeL"])
    scores = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(given, expected, strict=True)]
    return sum(scores) / len(scores)


def _rouge() -> ModuleType:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        hint = "pip install rouge-score"
        raise ConfigError("metric rouge_l: the package rouge-score is not installed", hint) from None
    return rouge_scorer


def matthews_correlation(given: list[str], expected: list[str]) -> float:
    """Matthews' correlation of labels, for two classes or more (Gorodkin 2004); 0 if one side has only one label.

    An answer that is not a label counts as another class.
    """
    total, correct = len(given), sum(a == b for a, b in zip(given, expected, strict=True))
    said, true = Counter(given), Counter(expected)
    covariance = correct * total - sum(said[label] * true[label] for label in true)
    spread = [total**2 - sum(count**2 for count in counts.values()) for counts in (said, true)]
    return covariance / math.sqrt(spread[0] * spread[1]) if all(spread) else 0.0


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "matthews_correlation": matthews_correlation,
}


def load_metrics(names: Sequence[str] | None) -> dict[str, Metric]:
    """The functions that ``names`` stand for, by their names in reports.

    Args:
        names: of ``METRICS``, or ``path/to/file.py:function``. The code of that file is run.

    Raises: ConfigError: an unknown name, a file without that function, or a package that is not installed.
    """
    found, faults = {}, {}
    for name in names or ():
        try:
            found[metric_name(name)] = _load(name)
        except ConfigError as error:
            faults[error.message] = error.hint
    if faults:
        raise ConfigError("\n".join(faults), "\n".join(dict.fromkeys(faults.values())))
    return found


def _load(name: str) -> Metric:
    if name in METRICS:
        if name == "rouge_l":
            _rouge()
        return METRICS[name]
    file, colon, function = name.rpartition(":")
    if not colon or not function:
        hint = f"Known: {', '.join(METRICS)}. A function of your own is FILE.py:FUNCTION."
        raise ConfigError(f"metric {name!r} is not known", hint)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"metric {name}: there is no file {file}", "Name a Python file, such as metric.py:function.")
    module = _module(path.resolve(), path.stat().st_mtime_ns)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"metric {name}: {file} has no function {function!r}", _HOW)
    return getattr(module, function)


@functools.lru_cache
def _module(path: Path, _changed: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mlx_lora_metric_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"metric: {path} is not a Python file", "Name a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # any error of the user's code, including sys.exit()
        raise ConfigError(f"metric: {path} fails: {type(error).__name__}: {error}", "Correct that file.") from error
    return module


def measured(metrics: dict[str, Metric], answers: Sequence[Answer]) -> dict[str, float]:
    """The value of each of ``metrics``; in a distributed run, the values from rank 0.

    Raises: ConfigError: a metric fails, or returns no number.
    """
    values = []
    for name, metric in metrics.items():
        try:
            with working():
                values.append(float(metric([a.given for a in answers], [a.expected for a in answers])))
        except (MLXLoRAError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # any error of the user's code, including sys.exit()
            raise ConfigError(f"metric {name} fails: {type(error).__name__}: {error}", _HOW) from error
    group = mx.distributed.init()
    if group.size() > 1:
        own = mx.array(values if group.rank() == 0 else [0.0] * len(values))
        values = mx.distributed.all_sum(own, group=group).tolist()
    return dict(zip(metrics, values, strict=True))
