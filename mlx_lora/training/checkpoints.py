"""The state of a run, as a value and as one file. A run resumed from it equals an uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..base.writing import sync, writing
from ..data.packing import capacity
from ..errors import FormatError, TrainingError

_KEY, _VERSION = "mlx_lora_training_state", 1
_GROUPS = ("parameters", "optimizer", "pending", "reference")
_DATA = "training data"
_PACK = "tokens in a packed sequence"
_ORDER = "order of the batches"
OTHER_DATA = "{} data: other rows or another order, or the rows are tokenized or masked differently"


@dataclass
class Tally:
    """Counts and totals of a run so far. The window starts at the last periodic `TrainReport`."""

    iteration: int = 0  # batches consumed
    trained_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    grad_norm: float | None = None
    window_loss: float = 0.0  # sum over tokens
    window_tokens: int = 0
    window_count: int = 0  # of the units that the loss is a mean over
    window_measured: dict[str, tuple[float, float]] = field(default_factory=dict)  # sums and counts; never changed
    window_iterations: int = 0
    window_seconds: float = 0.0
    best_by: str = ""  # the value that chooses the best validation, see best.py
    best_value: float | None = None
    best_iteration: int = 0
    not_better: int = 0  # validations since the best one
    unmeasured: bool = False  # a metric failed in the validation at this iteration
    first_loss: float | None = None  # validation loss before the first step
    lowest_loss: float | None = None  # of the validations after it


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to continue exactly.

    The order of the data and the random numbers of an iteration follow from the seed and the iteration's number, so
    neither is stored. Between two optimizer steps (`grad_accumulation_steps` > 1) `pending` holds the sums so far.
    The state at the end of a run is the one *before* the last, partial window is applied. Its parameters may then be
    one step behind the model's. A resumed run with more `iters` completes the window, as a longer run would.
    """

    parameters: dict[str, mx.array]  # the trained parameters by path, in the model's dtype
    optimizer: dict[str, mx.array]  # flattened state, the float32 master weights included
    pending: dict[str, mx.array] = field(default_factory=dict)  # sums of gradients, loss and token count
    tally: Tally = field(default_factory=Tally)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # settings that must be equal in the resumed run
    run: dict[str, Any] = field(default_factory=dict)  # JSON values that the caller of `train` keeps with the state
    reference: dict[str, mx.array] = field(default_factory=dict)  # by set: [N, 2] of `referenced`, at the run's start

    @property
    def iteration(self) -> int:
        return self.tally.iteration

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for group in _GROUPS for array in getattr(self, group).values())

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file. It appears complete or not at all, even after a power failure.

        Raises: FormatError: it cannot be written; an existing file at `path` is unchanged.
        """
        path = Path(path)
        # MLX requires this suffix; the leading dot hides the file while it is written.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
        with writing(path, needed=self.nbytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.write(temporary)
                sync(temporary)
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # some file systems cannot sync a folder
                sync(path.parent)

    def write(self, path: Path) -> None:
        """Write the file directly, into a folder that the caller replaces atomically."""
        arrays = {f"{group}/{name}": array for group in _GROUPS for name, array in getattr(self, group).items()}
        about = {
            "version": _VERSION,
            "tally": asdict(self.tally),
            "fingerprint": self.fingerprint,
            "run": self.run,
        }
        mx.save_safetensors(str(path), arrays, metadata={_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TrainingState:
        """Read what `save` wrote. The arrays are read into memory, so the file may be replaced afterwards."""
        arrays, about = _open(path)
        try:
            mx.eval(arrays)
        except RuntimeError as error:
            raise _unreadable(path, error) from error
        groups: dict[str, dict[str, mx.array]] = {group: {} for group in _GROUPS}
        for name, array in arrays.items():
            group, _, name = name.partition("/")
            groups[group][name] = array
        tally = {"window_count": about["tally"]["window_tokens"], **about["tally"]}  # older files have no such count
        return cls(**groups, tally=Tally(**tally), fingerprint=about["fingerprint"], run=about.get("run") or {})


def read_run(path: str | os.PathLike) -> dict[str, Any]:
    """The `run` of the state in a file, without its arrays. Empty in a file of an older version."""
    return _open(path)[1].get("run") or {}


def read_processes(path: str | os.PathLike) -> int | None:
    """The number of processes of the run whose state is in a file; None in a file of an older version."""
    return _open(path)[1]["fingerprint"].get("processes")


def _open(path: str | os.PathLike) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays in a file, which are not read yet, and the facts about them."""
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if _KEY not in metadata:
        raise FormatError(f"{path} is not a training state.", "Name the training state that a run saved.")
    about = json.loads(metadata[_KEY])
    if about.get("version") != _VERSION:
        raise FormatError(
            f"{path} has version {about.get('version')} of the training state, not {_VERSION}.",
            "Resume with the mlx-lora that wrote it, or start from its adapter (--resume-adapter-file).",
        )
    return arrays, about


def _unreadable(path: str | os.PathLike, error: Exception) -> FormatError:
    return FormatError(f"{path} cannot be read: {error}", "Resume from another checkpoint.")


def fingerprint(
    config: Any, loss: str, optimizer: str, train_set: Any, world: int, parameters: dict[str, mx.array]
) -> dict[str, Any]:
    """The settings that must be equal for a run to continue from another's state. JSON values only."""
    return {
        "loss": loss,
        **(config.preference_options() if hasattr(config, "preference_options") else {}),
        "batch_size": config.batch_size,
        "grad_accumulation_steps": config.grad_accumulation_steps,
        "seed": config.seed,
        _ORDER: "rows of similar length in fixed groups",
        _PACK: capacity(train_set) if config.pack else 0,
        "optimizer": optimizer,
        "rows of training data": len(train_set),
        _DATA: getattr(train_set, "digest", None),  # a list of examples has none
        "processes": world,
        "parameters": {path: f"{p.dtype} {list(p.shape)}" for path, p in parameters.items()},
    }


def check_fingerprint(saved: dict[str, Any], here: dict[str, Any], most: int = 10) -> None:
    """Raise a `TrainingError` that lists how `here` differs from `saved`, the run of the state."""
    before, now = _flat(saved), _flat(here)
    before.setdefault(_DATA, now[_DATA])  # older versions did not record these
    before.setdefault(_PACK, 0)
    before.setdefault(_ORDER, "of an older version")
    differences = [
        OTHER_DATA.format("training") if name == _DATA else difference(name, before.get(name), now.get(name))
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise another_run(differences, most)


def difference(name: str, before: Any, now: Any) -> str:
    """A line that compares a setting of the resumed run with its value here."""
    before, now = ("absent" if value is None else value for value in (before, now))
    return f"{name}: {before} in the checkpoint, {now} here"


def another_run(differences: list[str], most: int = 20, hint: str | None = None) -> TrainingError:
    """The error for resuming a run that differs in this way."""
    rest = [f"and {len(differences) - most} more"] if len(differences) > most else []
    return TrainingError(
        "\n".join(["The checkpoint belongs to another run:", *differences[:most], *rest]),
        hint or "Resume with the model, data and settings of that run, or start a new one.",
    )


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    parameters = about.get("parameters", {})
    return {**{k: v for k, v in about.items() if k != "parameters"}, **parameters}
