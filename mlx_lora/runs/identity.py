"""The identity of a checkpoint's run, and whether the run may continue with the current arguments."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.fingerprint import digest
from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig, as_config
from ..config.train import no_effect
from ..data import Splits
from ..errors import ConfigError, DataError, MLXLoRAWarning, ModelError
from ..training import TrainingState
from ..training.best import measured_by, out_of_patience
from ..training.checkpoints import OTHER_DATA, another_run, difference
from .settings import Settings

# The config of a resumed run may differ in FREE at will, and in FORCED with ``force``. Of the data's settings,
# SHAPING are compared by name; the others show in the tokens.
FREE = (
    *("iters", "epochs", "val_batches", "steps_per_report", "steps_per_eval", "save_every"),
    *("grad_checkpoint", "cache_prefix", "clear_cache_threshold", "max_skipped_steps", "keep"),
    *("patience", "best_by", "metric", "metric_rows", "metric_max_tokens", "report_prompts", "peer_timeout"),
)
FORCED = (
    *("learning_rate", "lr_schedule", "warmup", "optimizer_config", "max_grad_norm"),
    *("loraplus_lr_ratio", "loraplus_lr_embedding", "loraplus_weight_decay"),
)
_INSTEAD = {
    "scale": ("alpha", "rslora"),
    "alpha": ("scale",),
    "data": ("hf_dataset",),
    "hf_dataset": ("data",),
    "iters": ("epochs",),
    "epochs": ("iters",),
}
SHAPING = ("mask_prompt", "mask_turns", "max_seq_length")
_OTHER_WEIGHTS = "base model: other weights, or weights that are quantized in another way"
_FORCE = "Leave these options out to keep them, or add --force (in Python force=True) to change them."
_SPLITS = {"train": "training", "valid": "validation"}
_CONFIGS = {"data": DataConfig, "adapter": AdapterConfig, "optimizer": OptimizerConfig, "train": TrainConfig}


def identify(settings: Settings, model: nn.Module, sets: Splits) -> dict[str, Any]:
    """A run's identity as JSON values: its settings, and hashes of the data and of the base ``model``."""
    arguments = getattr(model, "args", None)  # mlx-lm's parsed config, independent of the formatting of config.json
    config = asdict(arguments) if is_dataclass(arguments) else {}
    facts = {
        "settings": settings_of(settings),
        "base": {"weights": digest(model), **flat(config)},
        "data": {split: _data_facts(getattr(sets, split)) for split in _SPLITS},
    }
    return json.loads(json.dumps(facts, default=str))


def settings_of(settings: Settings) -> dict[str, Any]:
    """The settings from which the run can be started again."""
    found = {name: asdict(getattr(settings, name)) for name in _CONFIGS if is_dataclass(getattr(settings, name))}
    if not isinstance(settings.data, DataConfig):
        found.pop("data", None)
    # AdapterConfig fills in a scale if alpha is given.
    found["adapter"].pop("scale" if settings.adapter.alpha is not None else "alpha")
    names = {name: value for name in ("model", "init_reference") if (value := getattr(settings, name)) is not None}
    return {**found, **{name: str(value) for name, value in names.items() if not isinstance(value, tuple)}}


def continued(given: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Settings`` for a resumed run: ``given``, with missing ones taken from ``recorded``.

    A dict of settings is filled up from the record; an argument that is None is taken from there.
    """
    found = dict(given)
    for name, past in recorded.items():
        value = given.get(name)
        if name in _CONFIGS and (value is None or isinstance(value, dict)):
            replaced = {other for option in value or {} for other in _INSTEAD.get(option, ())}
            kept = {option: setting for option, setting in past.items() if option not in replaced}
            kept = _acting(kept, value or {}) if name == "train" else kept
            found[name] = as_config(_CONFIGS[name], {**kept, **(value or {})}, name)
        elif value is None:
            found[name] = past
    return found


def _acting(recorded: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The ``recorded`` training options without those that have no effect with the ``given`` ones, with a warning."""
    unused = no_effect({**recorded, **given}, given)
    if unused:
        text = f"{', '.join(unused)}: not taken from the record, because of {', '.join(given)}"
        warnings.warn(f"The run continues with another setting: {text}", MLXLoRAWarning, stacklevel=2)
    return {name: value for name, value in recorded.items() if name not in unused}


def check(saved: dict[str, Any], here: dict[str, Any], force: bool, folder: Any) -> None:
    """Compare the identity of the run in ``folder`` with the identity of the run that would continue it.

    Raises: TrainingError: it is another run; lists every difference. Allowed changes give warnings.
    """
    if not saved.get("settings"):
        text = (
            f"{folder}: its checkpoint was written by an older version. Whether it belongs to this model, these data "
        )
        warnings.warn(text + "and these settings cannot be checked.", MLXLoRAWarning, stacklevel=2)
        return
    changed = _differences(saved["settings"], here["settings"])
    faults = [difference(name, *values) for name, values in changed.items() if name not in (*FREE, *FORCED)]
    for split, word in _SPLITS.items():
        (rows, tokens), (rows_here, tokens_here) = saved["data"][split], here["data"][split]
        if rows != rows_here:
            faults.append(difference(f"rows of {word} data", rows, rows_here))
        elif tokens != tokens_here:
            faults.append(OTHER_DATA.format(word))
    both = saved["base"].keys() & here["base"].keys()  # mlx-lm adds fields from version to version
    for name in sorted(key for key in both if saved["base"][key] != here["base"][key]):
        line = difference(f"base model: {name}", saved["base"][name], here["base"][name])
        faults.append(_OTHER_WEIGHTS if name == "weights" else line)
    forced = [difference(name, *values) for name, values in changed.items() if name in FORCED]
    if faults or (forced and not force):
        raise another_run(faults + forced, hint=None if faults else _FORCE)
    for text in (*forced, *_stretched(saved, here)):
        warnings.warn(f"The run continues with another setting: {text}", MLXLoRAWarning, stacklevel=2)


def check_processes(before: int | None, now: int) -> None:
    """Refuse to resume with another number of processes, before a process waits for another. Raises: TrainingError."""
    if before not in (None, now):
        how = f"with mlx.launch -n {before}" if before > 1 else "without mlx.launch"
        hint = f"Resume it {how}; with another number of processes, only a new run can be started."
        raise another_run([difference("processes", before, now)], hint=hint)


def check_incomplete(state: TrainingState, config: TrainConfig, iters: int | None, folder: Path) -> None:
    """Refuse to resume a run that is complete or was ended by its patience.

    Args:
        iters: the number of iterations of the run that would continue it; None if it is not known yet.

    Raises: ConfigError.
    """
    tally = state.tally
    if tally.best_by == measured_by(config) and out_of_patience(tally, config):
        best = "had a finite value"
        if tally.best_value is not None:
            best = f"was better than that of iteration {tally.best_iteration} ({config.best_by} {tally.best_value:.4g})"
        raise ConfigError(
            f"the run in {folder} ended early at iteration {state.iteration}: none of {tally.not_better} "
            f"validations in a row {best}; patience is {config.patience}",
            "Raise --patience, or set it to 0, to go on.",
        )
    if iters is not None and (state.iteration > iters or (state.iteration == iters and not tally.unmeasured)):
        length = f"iters is {iters}" if config.epochs is None else f"{config.epochs:g} epochs are {iters}"
        raise ConfigError(
            f"the run in {folder} has done {state.iteration} iterations; {length}",
            f"Raise --{'iters' if config.epochs is None else 'epochs'} to go on.",
        )


@contextmanager
def explained(folder: str | Path, recorded: dict[str, Any], given: dict[str, Any]) -> Iterator[None]:
    """Add to an error about an input that its path comes from the run's record and does not exist here."""
    try:
        yield
    except (ModelError, DataError, ConfigError) as error:
        named = {
            name: value
            for name, value in _recorded_paths(recorded, given)
            if re.search(rf"(?<![\w/.-]){re.escape(value)}(?![\w-])", error.message)
            and not Path(value.rpartition(":")[0] if name == "metric" else value).expanduser().exists()
        }
        if not named:
            raise
        said = [f"{name} {value!r} comes from the record of the run in {folder}" for name, value in named.items()]
        flags = " and ".join("--" + name.replace("_", "-") for name in named)
        hint = f"If the path was relative to another folder, give its path from here with {flags}."
        raise type(error)("\n".join([error.message, *said]), f"{hint} {error.hint}") from error


def _recorded_paths(recorded: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(option, value) of the inputs that a resumed run takes from its record, which may be relative paths."""
    for name in ("model", "init_reference"):
        if given[name] is None and name in recorded:
            yield name, recorded[name]
    for section, name in (("data", "data"), ("train", "metric")):
        whole, found = given[section], recorded.get(section, {}).get(name)
        if found and (whole is None or (isinstance(whole, dict) and name not in whole)):
            values = [found] if isinstance(found, str) else [metric for metric in found if ":" in metric]
            yield from ((name, value) for value in values)


def _data_facts(rows: Any) -> tuple[int, str | None]:
    """(number of rows, hash of their tokens and masks); a data set of the caller's own class has no hash."""
    return (0, None) if rows is None else (len(rows), getattr(rows, "digest", None))


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value in the checkpoint, value here) of the settings that differ."""
    found = {}
    for section in _CONFIGS:
        before, now = _comparable(section, saved), _comparable(section, here)
        names = SHAPING if section == "data" else dict.fromkeys((*before, *now))
        if before and now:
            found |= {n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)}
    return found


def _comparable(section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section, the scale and alpha of an adapter as one scale."""
    found = dict(settings.get(section) or {})
    if section == "train" and found:  # an older version has fewer options
        found = {**asdict(TrainConfig()), **found}
    if section == "adapter" and found.get("method") != "full":
        scale = AdapterConfig(**found).scale_of("")
        found = {**{n: v for n, v in found.items() if n not in ("alpha", "rslora")}, "scale": scale}
    return found


def _stretched(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A warning if a new number of iterations changes the length of the schedule."""
    before, now = (run.get("iters") or run["settings"]["train"]["iters"] for run in (saved, here))
    schedule = here["settings"]["optimizer"]["lr_schedule"]
    mapping = schedule if isinstance(schedule, dict) else {"name": schedule}
    if before == now or mapping.get("name") in (None, "constant") or mapping.get("arguments") is not None:
        return []
    return [f"{mapping['name']} now spans {now} iterations instead of {before}, so that the learning rate changes"]


def flat(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return found
