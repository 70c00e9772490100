"""The folder of a run: its checkpoints, and earlier runs that were moved. Only this module writes these files.

adapters.safetensors, adapter_config.json   the adapter of the last checkpoint, in mlx-lm's format
best/                                       that of the best validation, in the same format
0000100_adapters.safetensors                the weights of each checkpoint, by iteration
training_state.safetensors                  the state that ``resume`` continues from
log.jsonl, report.html                      what happened, see log.py and report/
earlier-1/                                  the files of a run that was in this folder before
.mlx-lora.lock                              while a run or command writes here, see base/locking.py
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..base.locking import check_unlocked, locked
from ..base.saving import check_writable
from ..errors import ConfigError
from ..formats import FORMATS, mlx_lm
from ..formats.checkpoints import BEST, ENTRY, STATE, facts, iteration, numbered
from ..formats.files import TEMPORARY, file_digest, read_json, write_folder, write_json
from ..formats.options import WriteOptions
from ..training import TrainingState
from ..training.checkpoints import Tally, read_run
from .group import group
from .log import LOG, PAGE

_ADAPTER = "adapter file"  # entry of a state's ``run``: a hash of the adapter that was written with it


def is_main_process() -> bool:
    """True in the one process that writes and reports; the only one unless started by ``mlx.launch``."""
    return group().rank() == 0


class RunFolder:
    """A folder that a run reads and writes.

    settings: recorded in ``adapter_config.json`` under ``training``. identity: kept with the training state, see
    ``identity.py``.
    """

    def __init__(self, path: str | Path):
        if not isinstance(path, (str, Path)) or not str(path).strip():
            raise ConfigError(f"the folder of a run must be a path, not {path!r}", 'Give a path, such as "adapters".')
        self.path = Path(path)
        self.settings: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self.best = 0  # iteration of the best validation, in the last checkpoint
        self.before_checkpoint: Callable[[], None] = lambda: None  # called when an earlier run's files are moved
        self.earlier = False  # whether an earlier run is in the folder
        self._saved: int | None = None  # iteration of the last checkpoint
        self._device: int | None = None  # number of the file system

    def check(self, resume: bool) -> None:
        """Raise a ConfigError if a run cannot be written here, or if there is none to resume."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: is a file", "Choose another folder for the adapter.")
        if resume and not (self.path / STATE).exists():
            copy = "" if is_main_process() else " On this machine: copy the folder from rank 0, which writes it."
            hint = f"Name the run's folder, or start a new run.{copy}"
            raise ConfigError(f"{self.path}: holds no {STATE} to resume", hint)
        check_writable(self.path, ConfigError)
        if is_main_process():
            check_unlocked(self.path)
        # Formats share file names: a checkpoint written over another format's adapter would damage it.
        others = [name for name, form in FORMATS.items() if form is not mlx_lm and form.detect(self.path)]
        if others:
            raise ConfigError(
                f"{self.path}: holds an adapter of format {others[0]}", "Choose another folder for the adapter."
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A context in which no other run or command writes here. Raises: ConfigError: one does."""
        if not is_main_process():
            yield
            return
        with locked(self.path):
            self._device = os.stat(self.path).st_dev
            self.earlier = bool(self.files())
            for left in self.path.glob(f"{TEMPORARY}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield

    def recorded(self) -> dict[str, Any]:
        """The settings that the run in this folder was started with; empty if they were not recorded."""
        return read_run(self.path / STATE).get("settings", {})

    def load_state(self) -> TrainingState:
        """The training state of the last checkpoint. Raises: ConfigError: the adapter next to it is another one."""
        state = TrainingState.load(self.path / STATE)
        self._check_adapter(state)
        self._saved = state.iteration
        return state

    def _check_adapter(self, state: TrainingState) -> None:
        """Refuse a state whose adapter was replaced, by ``merge --force`` or by hand: resuming would overwrite it.

        A process that was killed while it saved may have left the adapter of the next checkpoint.
        """
        file, own = self.path / mlx_lm.WEIGHTS, state.run.get(_ADAPTER)
        if own is None or not file.exists() or (found := file_digest(file)) == own:
            return
        if found in [file_digest(path) for path in numbered(self.path) if iteration(path) > state.iteration]:
            return
        kept = self.numbered(state.iteration)
        back = f"copy {kept.name} over it" if kept.exists() else "move it to another folder"
        raise ConfigError(
            f"{file}: is not the adapter that the run saved at iteration {state.iteration}, and resuming would "
            "replace it",
            f"To continue the run, {back}. To train on from this adapter, start a new run with resume_adapter_file.",
        )

    def restore_best(self, state: TrainingState) -> None:
        """Restore ``best`` to the time of ``state``, because a killed process may have left a later one."""
        best, file = self.path / BEST, self.numbered(state.tally.best_iteration)
        if not is_main_process():
            return
        if not state.tally.best_iteration and facts(best):
            shutil.rmtree(best)
        if state.tally.best_iteration and file.exists():
            config = {**read_json(self.path / mlx_lm.CONFIG), "training": self.settings}
            write_folder(self.path, lambda folder: _write_best(folder, config, file, state.tally))

    def save(self, adapter: Adapter, state: TrainingState, move_earlier: bool = False) -> Path | None:
        """Write a checkpoint: all of its files, or none on failure.

        Args:
            move_earlier: see ``move_earlier_run``; done when the new files are complete.

        Returns: the folder that the earlier run is in now, or None. Raises: FormatError.
        """
        if not is_main_process():
            return None
        adapter = replace(adapter.check(), metadata={**adapter.metadata, "mlx-lm": {"training": self.settings}})
        best = state.tally.best_iteration == state.iteration
        moved: list[Path | None] = [None]

        def write(folder: Path) -> None:
            mlx_lm.write(adapter, folder, WriteOptions())
            weights = folder / mlx_lm.WEIGHTS
            shutil.copyfile(weights, folder / self.numbered(state.iteration).name)
            config, digest = read_json(folder / mlx_lm.CONFIG), file_digest(weights)
            if best:
                _write_best(folder, config, weights, state.tally)
            entry = {"iteration": state.iteration, "weights": digest}
            write_json(folder / mlx_lm.CONFIG, {**config, ENTRY: entry})
            run = {**self.identity, _ADAPTER: digest}
            replace(state, run=run).write(folder / STATE)

        def before() -> None:
            if self._device not in (None, os.stat(self.path).st_dev):  # only the drive's empty mount point is left
                raise OSError(errno.ENODEV, "the drive was removed")
            moved[0] = self.move_earlier_run() if move_earlier and self.earlier else None
            self.before_checkpoint()

        # The state is renamed last, so that after an interruption it is complete and not newer than the adapter.
        needed = (3 if best else 2) * adapter.nbytes + state.nbytes
        write_folder(self.path, write, before=before, needed=needed, kept=self._kept())
        self._saved = state.iteration
        self.best = state.tally.best_iteration
        self._remove_old(state)
        return moved[0]

    @property
    def saved(self) -> int | None:
        """The iteration of the last checkpoint that was written or loaded."""
        return self._saved

    def numbered(self, iteration: int) -> Path:
        """The file with the weights of this iteration's checkpoint."""
        return self.path / f"{iteration:07d}_{mlx_lm.WEIGHTS}"

    def _remove_old(self, state: TrainingState) -> None:
        """Remove the numbered files that ``keep`` does not keep; never the best one, which resuming may need."""
        if keep := self.settings.get("keep"):
            files = [file for file in numbered(self.path) if iteration(file) <= state.iteration]
            for file in files[:-keep]:
                if iteration(file) != state.tally.best_iteration:
                    file.unlink(missing_ok=True)

    def _kept(self) -> str:
        if self._saved is None:
            return "No checkpoint of this run was written before."
        return f"The checkpoint of iteration {self._saved} is kept: resume continues from it."

    def files(self) -> list[Path]:
        """The files of the run in this folder."""
        names = [mlx_lm.CONFIG, mlx_lm.WEIGHTS, STATE, LOG, PAGE]
        names += [BEST] if facts(self.path / BEST) else []
        return [*numbered(self.path), *(self.path / name for name in names if (self.path / name).exists())]

    def move_earlier_run(self) -> Path | None:
        """Move the files of an earlier run to ``earlier-N`` and return that folder; None if there are none."""
        files = self.files()
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


def _write_best(folder: Path, config: dict[str, Any], weights: Path, tally: Tally) -> None:
    """Write ``best`` in ``folder``: an adapter folder with this config and a copy of the file ``weights``."""
    best = folder / BEST
    best.mkdir()
    shutil.copyfile(weights, best / mlx_lm.WEIGHTS)
    value = {} if tally.best_value is None else {tally.best_by.partition(" ")[0]: tally.best_value}
    entry = {"iteration": tally.best_iteration, "weights": file_digest(weights), **value}
    write_json(best / mlx_lm.CONFIG, {**config, ENTRY: entry})
