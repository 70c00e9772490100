"""``run``: a complete fine-tune, from a model's name to an adapter in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..base.forward_paths import THROUGH_CACHE, as_generated
from ..config import METRIC_ROWS, AdapterConfig, DataConfig, OptimizerConfig, TrainConfig, preference_of
from ..config.train import RHYTHM
from ..data import Dataset, Question, Splits, in_iterations, questions, train_batches
from ..errors import ConfigError, MLXLoRAError
from ..formats.checkpoints import STATE
from ..formats.files import file_digest
from ..init import FROM_DATA
from ..model.attach import disable_adapter, extract, parameter_counts, unmount
from ..training import Checkpoint, Done, Report, TrainingState, build_optimizer, evaluate
from ..training import train as train_model
from ..training.best import check_patience, made_worse
from ..training.checkpoints import Tally, read_processes
from ..training.trainer import check_validated
from .adapters import attach_for_run
from .agreement import check_agreement
from .checks import check_data, check_modules, check_packing
from .evaluation import answers, load_model, load_sets
from .folder import RunFolder, is_main_process
from .group import group
from .identity import check, check_incomplete, check_processes, continued, explained, identify
from .metrics import load_metrics, measured
from .peers import watched
from .planned import check_weights, keep_speed, plan_run
from .preferences import keeping_references, with_references
from .prefix import drop_states, keep_prefix
from .recorder import Recorder
from .reports import DataLoaded, EarlierRunMoved, Loading, Planned, PrefixCache, Started, TestReport, Warned
from .settings import Settings
from .unfinished import finish

RunReport = Report | Warned | Loading | DataLoaded | PrefixCache | Planned | Started | EarlierRunMoved | TestReport


def run(
    folder: str | Path,
    *,
    model: str | Path | nn.Module | tuple[nn.Module, Any] | None = None,
    data: str | Path | DataConfig | Splits | Dataset | tuple | None = None,
    adapter: AdapterConfig | dict | None = None,
    optimizer: OptimizerConfig | dict | None = None,
    train: TrainConfig | dict | None = None,
    resume: bool = False,
    force: bool = False,
    resume_adapter_file: str | Path | None = None,
    init_reference: str | None = None,
    test_batches: int | None = None,
    report_to: str | Sequence[str] = (),
    project_name: str | None = None,
    trust_remote_code: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RunReport]:
    """Fine-tune a model and keep the adapter in ``folder``. The work happens while the reports are iterated over.

    The folder receives the adapter in mlx-lm's format, a numbered copy of its weights for each checkpoint, the training
    state and, if there is a validation set, the adapter of the best validation in ``best``. The files of an earlier
    run in it are moved to ``earlier-N`` before the first checkpoint.

    Args:
        model: a folder or repository, or a pair (model, tokenizer) from ``load`` without an adapter; the model then
            has the trained adapter on it afterwards. With loaded data sets, the model alone is enough.
        data: a DataConfig or its ``data``, ``Splits`` from ``load_dataset``, a data set, or a tuple of data sets:
            training, validation (may be None), test.
        adapter, optimizer, train: the settings, or a dict of them; their defaults if left out.
        resume: continue the run in ``folder`` exactly where it stopped. Arguments above that are left out are taken
            from that run, and so are the fields that a dict leaves out. Fields in ``identity.FREE``, such as
            ``iters``, may differ; those in ``identity.FORCED``, such as ``learning_rate``, with ``force``.
        force: train even if, by the plan, the run does not fit into memory; with ``resume`` also continue with other
            settings of the optimizer, and warn of each.
        resume_adapter_file: start from the weights in this ``adapters.safetensors``.
        init_reference: the model before it was quantized, for ``init`` "loftq".
        test_batches: measure on the test set afterwards, this many batches at most; -1 for the whole set.
        report_to: also log to these experiment trackers, see ``REPORTERS``, under ``project_name`` (default: the name
            of the current folder). TensorBoard has no projects: its files are in ``folder``.
        stop: called after each iteration; when it returns True, the run saves and ends.

    Yields: ``Warned`` about settings that are probably a mistake; ``Loading``, ``DataLoaded`` and ``Started``, before
        which ``PrefixCache`` gives the size of the states that ``cache_prefix`` keeps; the reports of ``train``, with
        ``EarlierRunMoved`` before the first checkpoint if there was an earlier run; ``TestReport`` after ``Done`` if
        ``test_batches`` is given and the run was not stopped.

    Raises: ConfigError on the call if settings contradict each other or the folder cannot be used, for example because
        another run writes in it. While running: ModelError, DataError, AdapterError, FormatError, and TrainingError,
        also if the folder's run is another one than the run to resume.
    """
    if resume and resume_adapter_file:
        raise ConfigError("resume and resume_adapter_file contradict each other", "Choose one.")
    if not callable(stop):
        raise ConfigError(
            f"stop must be a function that returns whether to stop, not {stop!r}", "Give one, such as event.is_set."
        )
    kept = RunFolder(folder)
    kept.check(resume)
    given = dict(model=model, data=data, adapter=adapter, optimizer=optimizer, train=train)
    given["init_reference"] = init_reference
    if resume:
        check_processes(read_processes(kept.path / STATE), group().size())
    recorded = kept.recorded() if resume else {}
    with explained(folder, recorded, given):
        settings = Settings(
            **continued(given, recorded),
            resume=resume,
            resume_adapter_file=resume_adapter_file,
            test_batches=test_batches,
            report_to=report_to,
            project_name=project_name,
            trust_remote_code=trust_remote_code,
            force=force,
        )
    kept.settings = settings.record()
    return watched(_run(kept, settings, stop, recorded, given), kept, settings.train.peer_timeout)


def _run(
    folder: RunFolder, settings: Settings, stop: Callable[[], bool], recorded: dict[str, Any], given: dict[str, Any]
) -> Iterator[RunReport]:
    recorder = Recorder(folder, settings)
    with folder.lock(), explained(folder.path, recorded, given):
        yield from recorder.record(_fine_tune(folder, settings, stop, recorder))


def _fine_tune(
    folder: RunFolder, settings: Settings, stop: Callable[[], bool], recorder: Recorder
) -> Iterator[RunReport]:
    state = _state(folder, settings)
    for text in settings.doubts():
        yield Warned(text)
    check_data(settings.data, settings.splits)
    check_modules(settings.model, settings.adapter)
    check_packing(settings)
    recorder.start_trackers()
    check_weights(settings)
    model, tokenizer = yield from load_model(settings.model, trust_remote_code=settings.trust_remote_code)
    sets = yield from load_sets(settings.data, tokenizer, settings.splits, settings.train.loss)
    config = in_iterations(settings.train, sets.train)
    check_validated(config, None if config.val_batches == 0 else sets.valid)
    check_patience(config, config.iters)
    asked = _questions(settings, tokenizer)
    rhythm = {name: getattr(config, name) for name in RHYTHM}
    settings = replace(settings, train=replace(settings.train, **rhythm))  # a resumed run keeps it
    folder.settings |= {"iters": config.iters, **rhythm}
    folder.identity = {**identify(settings, model, sets), "iters": config.iters}
    if state is None:
        folder.identity["start"] = {}  # from no adapter; without this key, it is unknown
    if settings.resume_adapter_file:
        file = Path(settings.resume_adapter_file).resolve()
        folder.identity["start"] = {"file": str(file), "weights": file_digest(file)}
    if state is not None:
        folder.identity |= {name: state.run[name] for name in ("start",) if name in state.run}
        check(state.run, folder.identity, settings.force, folder.path)
        _check_incomplete(folder, state, settings.train, config.iters)
    planned = yield from plan_run(replace(settings, train=config), model, sets)
    yield from _attach(model, sets, folder, settings)
    with ExitStack() as contexts:
        try:
            check_agreement(folder.identity, model, state)
            row = sets.train[0].tokens if len(sets.train) else ()
            if contexts.enter_context(as_generated(model, row, config.grad_checkpoint)):
                yield Warned(THROUGH_CACHE)
            prefix = yield from keep_prefix(model, sets, folder.path, folder.identity, config)
            with disable_adapter(model):
                yield from recorder.prepare(model, tokenizer, sets, state)
        except (MLXLoRAError, GeneratorExit):  # nothing was trained: restore a model that the caller loaded
            unmount(model)
            raise
        yield _started(model, state, config)
        sets = yield from with_references(model, sets, config, state)
        hooks = {"metrics": _metrics(model, tokenizer, asked, config), "prefix": prefix}
        done = yield from _train(model, sets, folder, replace(settings, train=config), state, stop, hooks)
        keep_speed(planned, done, state)
        if not done.stopped:
            drop_states(folder.path)
        if settings.test_batches is not None and not done.stopped:
            yield from _test(model, sets, folder.best, done.iteration, config, settings.test_batches)


def _test(
    model: nn.Module, sets: Splits, best: int, last: int, config: TrainConfig, batches: int
) -> Iterator[RunReport]:
    """Measure the adapter of the ``last`` iteration on the test set, with a warning if an earlier one was the best."""
    if 0 < best < last:
        yield Warned(
            f"the test set is measured with the last adapter (iteration {last}); mlx-lora test measures the best one "
            f"(iteration {best})"
        )
    of_loss = config.loss, config.preference_options()
    yield TestReport(**asdict(evaluate(model, sets.test, config.batch_size, batches, *of_loss)))


def _state(folder: RunFolder, settings: Settings) -> TrainingState | None:
    """The state to resume from. Read before a model is loaded, because the run may already be complete."""
    if not settings.resume:
        return None
    state = folder.load_state()
    epochs = state.run.get("settings", {}).get("train", {}).get("epochs")
    known = state.run.get("iters") if settings.train.epochs == epochs else None  # else it follows from the data
    _check_incomplete(folder, state, settings.train, settings.train.iters or known)
    return state


def _check_incomplete(folder: RunFolder, state: TrainingState, config: TrainConfig, iters: int | None) -> None:
    """Call ``check_incomplete``; if a complete run was killed, first write the files that its folder lacks."""
    try:
        check_incomplete(state, config, iters, folder.path)
    except ConfigError as error:
        done = finish(folder.path, state, folder.numbered(state.iteration)) if is_main_process() else []
        if not done:
            raise
        said = f"Its last process was killed before it had written all files; now {', and '.join(done)}"
        raise ConfigError(f"{error.message}\n{said}", error.hint) from error


def _questions(settings: Settings, tokenizer: Any) -> list[Question]:
    """The validation rows for metrics; none without a metric."""
    config = settings.train
    if not config.metric:
        return []
    rows = config.metric_rows or METRIC_ROWS
    return questions(settings.data, tokenizer, "valid", rows, preference_of(config.loss).rows)


def _metrics(
    model: nn.Module, tokenizer: Any, asked: list[Question], config: TrainConfig
) -> Callable[[], dict[str, float]] | None:
    """A function that answers the questions ``asked`` and scores the answers; None without a metric."""
    functions = load_metrics(config.metric)
    if not functions:
        return None
    return lambda: measured(functions, list(answers(model, tokenizer, asked, config.metric_max_tokens)))


def _attach(model: nn.Module, sets: Splits, folder: RunFolder, settings: Settings) -> Iterator[Loading]:
    config, batches, reference = settings.adapter, None, None
    if config.init in FROM_DATA and not settings.resume:
        yield Loading("init", config.init)
        batches = train_batches(sets.train, settings.train.batch_size, seed=settings.train.seed)
    if settings.init_reference is not None:
        reference, _ = yield from load_model(settings.init_reference, None, settings.trust_remote_code)
    attach_for_run(
        model,
        config,
        settings.train.seed,
        folder=folder.path if settings.resume else None,
        file=settings.resume_adapter_file,
        batches=batches,
        reference=reference,
    )


def _started(model: nn.Module, state: TrainingState | None, config: TrainConfig) -> Started:
    trainable, parameters = parameter_counts(model)
    rhythm = (getattr(config, name) for name in RHYTHM)
    modules = len({name.rpartition(".")[0] for name, _ in tree_flatten(model.trainable_parameters())})
    return Started(state.iteration if state else 0, config.iters, trainable, parameters, modules, *rhythm)


def _train(model, sets, folder: RunFolder, settings: Settings, state, stop, hooks):
    """Yield the reports of the training; return the last one, ``Done``."""
    moved, first, tally = None, not settings.resume, Tally()
    if state is not None:
        folder.restore_best(state)

    def save(state: TrainingState) -> Path:
        nonlocal moved, first, tally
        tally = state.tally
        moved = folder.save(extract(model), keeping_references(state, sets), move_earlier=first) or moved
        first = False
        return folder.numbered(state.iteration)

    steps = -(-settings.train.iters // settings.train.grad_accumulation_steps)
    try:
        optimizer = build_optimizer(settings.optimizer, steps, model)
        hooks = {**hooks, "checkpoint": save, "resume": state, "stop": stop}
        reports = train_model(model, optimizer, sets.train, sets.valid, settings.train, **hooks)
    except MLXLoRAError:  # nothing was trained: restore a model that the caller loaded
        unmount(model)
        raise
    with closing(reports):
        for report in reports:
            if isinstance(report, Checkpoint) and moved is not None:
                yield EarlierRunMoved(moved)
                moved = None
            if isinstance(report, Done) and not report.stopped and (text := made_worse(tally)):
                yield Warned(text)
            yield report
    return report
