"""Measuring a model on a test set: loss, perplexity, and greedy answers compared with the expected ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.batching import why_not_batched
from ..base.forward_paths import THROUGH_CACHE, as_generated
from ..config import TOKENS, DataConfig, TrainConfig, as_config, preference_of
from ..data import Question, load_dataset, questions
from ..errors import ConfigError
from ..formats.checkpoints import STATE, choose
from ..formats.files import file_digest
from ..model.attach import disable_adapter
from ..model.loading import load
from ..training import evaluate, referenced
from ..training.checkpoints import read_run
from ..training.losses import loss_named
from .adapters import weights_of
from .checks import check_data, masks_without_effect
from .metrics import load_metrics
from .metrics import measured as measure_answers
from .peers import watched, working
from .reports import Answer, DataLoaded, Loading, TestReport, Warned
from .settings import as_data, as_model, check_test_batches


def measure(
    model: str | Path | tuple[nn.Module, Any],
    data: str | Path | DataConfig,
    adapter_path: str | Path | None = None,
    *,
    checkpoint: str | int | None = None,
    batch_size: int = 4,
    test_batches: int = -1,
    loss: str = "cross_entropy",
    options: dict[str, float] | None = None,
    exact_match: int = 0,
    max_tokens: int = 128,
    metric: str | Sequence[str] | None = None,
    metric_rows: int = -1,
    trust_remote_code: bool = False,
) -> Iterator[Loading | DataLoaded | Warned | Answer | TestReport]:
    """Measure a model on the test set of ``data``; ``TestReport`` is yielded last.

    Args:
        model: a folder or repository, or a pair (model, tokenizer).
        data: a DataConfig, or its ``data``.
        adapter_path: an adapter of any format to load with the model; not with a pair.
        checkpoint: if ``adapter_path`` is the folder of a run: ``last``, ``best`` or an iteration. The default is the
            best one, if any.
        test_batches: batches to measure at most; -1 for the whole set.
        loss: a name in ``LOSSES``. The reference of a preference loss is the adapter that the run of ``adapter_path``
            started from (``resume_adapter_file``), or the model without its adapter.
        options: of the loss, such as {"beta": 0.1}.
        exact_match: rows to answer greedily, spread over the set. An ``Answer`` is yielded for each, and the report
            gives the share that equals the row's last answer exactly.
        max_tokens: longest answer.
        metric: also answer ``metric_rows`` rows (-1: all), and score the answers with these metrics, see
            ``metrics.py``.

    Raises: ConfigError, at once; DataError, ModelError, AdapterError, FormatError while running.
    """
    check_test_batches(test_batches)
    if exact_match < 0 or max_tokens < 1:
        raise ConfigError(
            f"exact_match ({exact_match}) must be 0 or more, and max_tokens ({max_tokens}) at least 1",
            "Give the number of rows to answer, such as 100; leave max_tokens out for 128.",
        )
    metrics = load_metrics(TrainConfig(metric=metric, metric_rows=metric_rows).metric if metric else None)
    if adapter_path is not None and isinstance(model, tuple):
        raise ConfigError("adapter_path cannot be used with a loaded model", "Load the model with its adapter.")
    if checkpoint is not None:
        if adapter_path is None:
            raise ConfigError("checkpoint has no effect without adapter_path", "Name the folder of the run.")
        adapter_path = choose(adapter_path, checkpoint)
    loss_named(loss)
    options = as_config(TrainConfig, {**(options or {}), "loss": loss, "batch_size": batch_size}, "options")
    data = as_data(data)
    if faults := masks_without_effect(data, loss):
        raise ConfigError("\n".join(faults), "\n".join(faults.values()))
    model = as_model(model, needs_tokenizer=isinstance(data, DataConfig) or exact_match > 0 or bool(metrics))
    measured = (batch_size, test_batches, loss, options.preference_options())
    asked = (exact_match, metric_rows if metrics else 0, max_tokens)
    return watched(_measure(model, data, adapter_path, measured, asked, metrics, trust_remote_code))


def _measure(model, data, adapter_path, measured, asked, metrics, trust_remote_code):
    exact_match, metric_rows, max_tokens = asked
    check_data(data, ("test",))
    model, tokenizer = yield from load_model(model, adapter_path, trust_remote_code)
    batch_size, _, loss, _ = measured
    kind = preference_of(loss).rows
    sets = yield from load_sets(data, tokenizer, ("test",), loss)
    asked = {count: questions(data, tokenizer, "test", count, kind) for count in (exact_match, metric_rows) if count}
    test = sets.test
    with as_generated(model, test[0].tokens if len(test) else ()) as cached:
        if cached:
            yield Warned(THROUGH_CACHE)
        if kind != TOKENS:
            test = yield from _with_reference(model, test, loss, batch_size, adapter_path)
        result = asdict(evaluate(model, test, *measured))
    given = {}
    for count, rows in asked.items():
        given[count] = []
        for answer in answers(model, tokenizer, rows, max_tokens):
            given[count].append(answer)
            yield answer
    counted, values = given.get(exact_match, []), measure_answers(metrics, given[metric_rows]) if metrics else {}
    share = sum(answer.correct for answer in counted) / len(counted) if counted else None
    values = {**result.pop("metrics"), **values}
    yield TestReport(**result, exact_match=share, answered=len(counted), metrics=values)


def _with_reference(model: nn.Module, rows: Any, loss: str, batch_size: int, adapter_path: str | Path | None):
    """``rows`` with their reference: the adapter that the run of ``adapter_path`` started from, else the base.

    Yields a warning if that adapter is missing or unknown.
    """
    asked = adapter_path is not None and preference_of(loss).reference
    start = _start_of(adapter_path) if asked else {}
    if start is None:
        yield Warned(
            f"the reference here is the base model: {adapter_path} does not say whether its training began from "
            "another adapter (--resume-adapter-file), which would have been the reference"
        )
    elif start:
        file, digest = Path(start["file"]), start["weights"]
        if file.is_file() and file_digest(file) == digest:
            with weights_of(model, file):
                return referenced(model, rows, loss, batch_size)
        yield Warned(
            f"the reference here is the base model; that of the run was the adapter it started from, {file}, which is "
            "missing or has changed"
        )
    with disable_adapter(model):
        return referenced(model, rows, loss, batch_size)


def _start_of(adapter_path: str | Path) -> dict[str, str] | None:
    """The record that a checkpoint's run made of the adapter it started from.

    Returns: an empty dict if it started from none; None if older versions did not record it.
    """
    path = Path(adapter_path)
    for state in (path / STATE, path.parent / STATE):
        if state.is_file():
            return read_run(state).get("start")
    return None


def answers(
    model: nn.Module, tokenizer: Any, asked: Sequence[Question], max_tokens: int, batch_size: int = 16
) -> Iterator[Answer]:
    """Answer ``asked`` (see ``data.questions``) greedily, in batches if the model allows it."""
    from mlx_lm import batch_generate

    batch_size = 1 if why_not_batched(model) else batch_size
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        with working():
            texts = batch_generate(model, tokenizer, [q.tokens for q in batch], max_tokens=max_tokens).texts
        for question, text in zip(batch, texts, strict=True):
            yield Answer(question.text, question.answer.strip(), text.strip())


def load_model(model: Any, adapter_path: str | Path | None = None, trust_remote_code: bool = False):
    """Yield a report of loading; return (model, tokenizer). A given pair is returned unchanged."""
    if isinstance(model, tuple):
        return model
    yield Loading("model", str(model))
    return load(model, adapter_path, trust_remote_code=trust_remote_code)


def load_sets(data: Any, tokenizer: Any, splits: tuple[str, ...], loss: str = "cross_entropy"):
    """Yield a report of reading; return the ``Splits``. Loaded sets are returned unchanged.

    Args:
        data: a DataConfig or ``Splits``.
        loss: decides which kind of rows is read.
    """
    if isinstance(data, DataConfig):
        yield Loading("data", "hf_dataset" if data.hf_dataset else data.data)
        data = load_dataset(data, tokenizer, splits, preference_of(loss).rows)
    found = {split: getattr(data, split) for split in splits}
    rows = {split: len(found[split]) for split in splits if found[split] is not None}
    summary = getattr(data.train, "summary", None)
    yield DataLoaded(
        rows, summary.learned_tokens if summary else 0, tuple(data.all_warnings()), tuple(data.all_notes())
    )
    return data
