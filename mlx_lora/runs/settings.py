"""The settings of a run, checked against each other before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config import AdapterConfig, DataConfig, OptimizerConfig, TrainConfig
from ..data import Splits
from ..errors import ConfigError
from .checks import check_settings


@dataclass(frozen=True)
class Settings:
    """The arguments of ``run``."""

    model: Any
    data: Any  # a DataConfig or Splits; a tuple of data sets becomes Splits
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: bool = False
    resume_adapter_file: str | Path | None = None
    init_reference: str | None = None
    test_batches: int | None = None
    report_to: tuple[str, ...] = ()
    project_name: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if isinstance(self.data, tuple):
            object.__setattr__(self, "data", Splits(*self.data))
        if not isinstance(self.data, (DataConfig, Splits)):
            raise ConfigError(
                f"data must be a DataConfig, Splits or a tuple of data sets, not a {type(self.data).__name__}",
                "Give DataConfig(data=folder), or the result of load_dataset.",
            )
        check_test_batches(self.test_batches)
        if self.test_batches is not None and isinstance(self.data, Splits) and self.data.test is None:
            raise ConfigError("test_batches needs a test set, and data has none", "Load it too, or leave it out.")
        check_settings(self)

    @property
    def splits(self) -> tuple[str, ...]:
        """The data sets that the run reads."""
        return ("train", "valid") if self.test_batches is None else ("train", "valid", "test")

    def record(self) -> dict[str, Any]:
        """The settings to keep with the adapter: those of data, optimizer and training that are set."""
        configs = [self.data] if isinstance(self.data, DataConfig) else []
        configs += [self.optimizer, self.train]
        return {name: value for config in configs for name, value in asdict(config).items() if value is not None}

    def tracked(self) -> dict[str, Any]:
        """The settings to show in an experiment tracker."""
        model = {} if isinstance(self.model, tuple) else {"model": str(self.model)}
        return {**model, **asdict(self.adapter), **self.record()}


def check_test_batches(value: int | None) -> None:
    """Refuse a number of test batches that is neither -1 (all) nor above 0."""
    if value is not None and value != -1 and value < 1:
        raise ConfigError(
            f"test_batches must be -1 (all) or at least 1, not {value!r}", "Leave it out for the default."
        )
