"""The folder of a run: its checkpoints, and the earlier runs that were moved aside. The only writer of these files.

adapters.safetensors, adapter_config.json   the adapter of the last checkpoint, in mlx-lm's format
0000100_adapters.safetensors                the weights of each checkpoint, by iteration
training_state.safetensors                  the state that ``resume`` continues from
earlier-1/                                  the files of a run that was in this folder before
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapter import Adapter
from ..base.saving import check_writable
from ..errors import ConfigError, FormatError
from ..formats import FORMATS, mlx_lm, save_adapter
from ..formats.files import write_folder, write_safetensors
from ..training import TrainingState

STATE = "training_state.safetensors"


def is_main_process() -> bool:
    """True in the one process that writes and reports; the only one unless started by ``mlx.launch``."""
    return mx.distributed.init().rank() == 0


class RunFolder:
    """A folder that a run reads and writes.

    Args:
        settings: recorded in ``adapter_config.json`` under ``training``.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any] | None = None):
        self.path, self.settings = Path(path), settings or {}

    def check(self, resume: bool) -> None:
        """Raise a ConfigError where a run cannot be written here, or where there is none to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: is a file", "Choose another folder for the adapter.")
        if resume and not (self.path / STATE).exists():
            raise ConfigError(f"{self.path}: holds no {STATE} to resume", "Name the run's folder, or start a new run.")
        check_writable(self.path, ConfigError)
        # Formats share file names: a checkpoint written over another format's adapter would damage it.
        others = [name for name, form in FORMATS.items() if form is not mlx_lm and form.detect(self.path)]
        if others:
            raise ConfigError(
                f"{self.path}: holds an adapter of format {others[0]}", "Choose another folder for the adapter."
            )

    def load_state(self) -> TrainingState:
        """The training state of the last checkpoint."""
        return TrainingState.load(self.path / STATE)

    def save(self, adapter: Adapter, state: TrainingState) -> Path:
        """Write a checkpoint and return its numbered file. Each file appears complete or not at all."""
        adapter = replace(adapter, metadata={"mlx-lm": {"training": self.settings}})
        numbered = f"{state.iteration:07d}_{mlx_lm.WEIGHTS}"
        if is_main_process():
            weights = mlx_lm.stored_weights(adapter)
            write_folder(self.path, lambda folder: write_safetensors(folder / numbered, weights))
            save_adapter(adapter, self.path, overwrite=True)
            try:
                state.save(self.path / STATE)
            except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where the disk is full
                raise FormatError(f"{self.path / STATE}: cannot be written ({error})", "Free some space.") from None
        return self.path / numbered

    def move_earlier_run(self) -> Path | None:
        """Move the files of an earlier run to ``earlier-N`` and return that folder; None where there are none."""
        names = [mlx_lm.CONFIG, mlx_lm.WEIGHTS, STATE]
        files = [self.path / name for name in names if (self.path / name).exists()]
        files += sorted(self.path.glob(f"[0-9]*_{mlx_lm.WEIGHTS}"))
        if not files or not is_main_process():
            return None
        number = 1
        while (self.path / f"earlier-{number}").exists():
            number += 1
        target = self.path / f"earlier-{number}"
        target.mkdir()
        for file in files:
            file.rename(target / file.name)
        return target
