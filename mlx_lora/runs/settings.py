"""The settings of a run, checked against each other before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..config import (
    TOKENS,
    AdapterConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    as_config,
    chooses_own_rate,
    first_rate,
    preference_of,
)
from ..config.preference import PREFERENCE_OPTIONS
from ..data import Dataset, Splits
from ..data.preferences import as_dataset
from ..errors import ConfigError
from .checks import check_settings


@dataclass(frozen=True)
class Settings:
    """The arguments of ``run``, each in one form: a dict becomes a config, and a path or name a DataConfig."""

    model: Any
    data: Any  # a DataConfig or Splits afterwards
    adapter: AdapterConfig | dict | None = None
    optimizer: OptimizerConfig | dict | None = None
    train: TrainConfig | dict | None = None
    resume: bool = False
    resume_adapter_file: str | Path | None = None
    init_reference: str | None = None
    test_batches: int | None = None
    report_to: tuple[str, ...] = ()
    project_name: str | None = None
    trust_remote_code: bool = False
    force: bool = False

    def __post_init__(self):
        given = isinstance(self.optimizer, OptimizerConfig) or "learning_rate" in (self.optimizer or {})
        object.__setattr__(self, "_rate_is_given", given)
        for name, kind in (("adapter", AdapterConfig), ("optimizer", OptimizerConfig), ("train", TrainConfig)):
            object.__setattr__(self, name, as_config(kind, getattr(self, name), name))
        object.__setattr__(self, "data", as_data(self.data))
        object.__setattr__(self, "model", as_model(self.model, needs_tokenizer=isinstance(self.data, DataConfig)))
        names = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to or ()
        object.__setattr__(self, "report_to", tuple(str(name).strip() for name in names))
        for name in ("resume", "force", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}", "Write True or False.")
        check_test_batches(self.test_batches)
        if self.test_batches is not None and isinstance(self.data, Splits) and self.data.test is None:
            raise ConfigError("test_batches needs a test set, and data has none", "Load it too, or leave it out.")
        if self.train.metric and not isinstance(self.data, DataConfig):
            raise ConfigError(
                "metric needs the rows as text, and data is tokenized",
                "Give data as a DataConfig, or leave metric out.",
            )
        check_settings(self)

    @property
    def splits(self) -> tuple[str, ...]:
        """The data sets that the run reads."""
        return ("train", "valid") if self.test_batches is None else ("train", "valid", "test")

    def doubts(self) -> list[str]:
        """Warnings about settings that are valid but probably a mistake."""
        optimizer, adapter = self.optimizer, self.adapter
        own_rate = first_rate(optimizer.lr_schedule) is not None or chooses_own_rate(
            optimizer.optimizer, optimizer.optimizer_config
        )
        preferences = preference_of(self.train.loss).rows != TOKENS  # their usual learning rates are 1e-6 to 5e-5
        if self._rate_is_given or own_rate or self.resume or adapter.method == "full" or preferences:
            return adapter.doubts()
        return [
            *adapter.doubts(),
            f"learning_rate is mlx-lm's default of {optimizer.learning_rate:g}, which is too low for "
            f"{adapter.method}; give 1e-4 to 2e-4 (--learning-rate), or let mlx-lora plan --write choose",
        ]

    def record(self) -> dict[str, Any]:
        """The settings to keep with the adapter: the non-default ones of data, optimizer and training."""
        configs = [self.data] if isinstance(self.data, DataConfig) else []
        configs += [self.optimizer, self.train]
        unused = set(PREFERENCE_OPTIONS) - set(preference_of(self.train.loss).options)
        found = {name: value for config in configs for name, value in asdict(config).items() if value is not None}
        return {name: value for name, value in found.items() if name not in unused}

    def tracked(self) -> dict[str, Any]:
        """The settings to show in an experiment tracker."""
        model = {} if isinstance(self.model, tuple) else {"model": str(self.model)}
        return {**model, **asdict(self.adapter), **self.record()}


def as_data(data: Any) -> DataConfig | Splits:
    """``data`` as a DataConfig or ``Splits``. Raises: ConfigError."""
    if isinstance(data, (str, Path)):
        return DataConfig(data=str(data))
    if isinstance(data, dict):
        return as_config(DataConfig, data, "data")
    if isinstance(data, Dataset):
        data = Splits(data)
    if isinstance(data, tuple) and 1 <= len(data) <= 3:
        data = Splits(*data)
    if isinstance(data, Splits):
        return replace(data, **{name: _as_set(getattr(data, name), name) for name in ("train", "valid", "test")})
    if isinstance(data, DataConfig):
        return data
    raise ConfigError(
        f"data must be a DataConfig, Splits or a tuple of data sets, not a {type(data).__name__}",
        "Give DataConfig(data=folder), the result of load_dataset, or (tokenize(rows, tokenizer, DataConfig()), None).",
    )


def _as_set(rows: Any, name: str) -> Any:
    """A data set; a list of examples becomes one. Raises: ConfigError for rows that are not tokenized."""
    first = next(iter(rows), None) if isinstance(rows, (list, tuple)) else None
    if isinstance(rows, (str, Path)) or (first is not None and not hasattr(first, "mask")):
        kind = type(rows if first is None else first).__name__
        raise ConfigError(
            f"data: the {name} set holds a {kind}, not tokenized rows",
            "Give (tokenize(rows, tokenizer, DataConfig()), None), or DataConfig(data=folder).",
        )
    return as_dataset(rows) if isinstance(rows, (list, tuple)) else rows


def as_model(model: Any, needs_tokenizer: bool) -> Any:
    """A path or name, or a pair (model, tokenizer); the tokenizer is None if none is needed. Raises: ConfigError."""
    pair = "Give the pair that load returns: model=mlx_lora.load(name)."
    if isinstance(model, list):
        model = tuple(model)
    if isinstance(model, nn.Module) or (isinstance(model, tuple) and len(model) == 1):
        model = (model[0] if isinstance(model, tuple) else model, None)
    if isinstance(model, tuple):
        if len(model) != 2 or not isinstance(model[0], nn.Module):
            kinds = ", ".join(type(part).__name__ for part in model)
            raise ConfigError(f"model must be a pair (model, tokenizer), not ({kinds})", pair)
        if model[1] is None and needs_tokenizer:
            raise ConfigError("model is a loaded model without its tokenizer, which reading the data needs", pair)
        return model
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model must be a folder, a repository or a pair (model, tokenizer), not {model!r}",
            'Give model="Qwen/Qwen3-0.6B", a folder, or the pair that load returns.',
        )
    return model


def check_test_batches(value: int | None) -> None:
    """Refuse a number of test batches that is neither -1 (all) nor above 0."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and value != -1 and (not whole or value < 1):
        raise ConfigError(
            f"test_batches must be -1 (all) or at least 1, not {value!r}", "Leave it out for the default."
        )
