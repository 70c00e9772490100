"""The state of a run, as a value and as one file. A run resumed from it equals the run that was not interrupted."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FormatError, TrainingError

_KEY, _VERSION = "mlx_lora_training_state", 1
_GROUPS = ("parameters", "optimizer", "pending")


@dataclass
class Tally:
    """What a run has counted so far. The window starts at the last periodic `TrainReport`."""

    iteration: int = 0  # batches consumed
    trained_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    grad_norm: float | None = None
    window_loss: float = 0.0  # sum over tokens
    window_tokens: int = 0
    window_iterations: int = 0
    window_seconds: float = 0.0


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to continue exactly where it was.

    The order of the data and the random numbers of an iteration follow from the seed and the iteration's number, so
    neither is stored. Between two optimizer steps (`grad_accumulation_steps` > 1) `pending` holds the sums so far.
    The state at the end of a run is the one *before* the last, partial window is applied. Its parameters may then be
    one step behind the model's, and a resumed run with more `iters` fills the window, as a longer run would have.
    """

    parameters: dict[str, mx.array]  # the trained parameters by path, in the model's dtype
    optimizer: dict[str, mx.array]  # flattened state, the float32 master weights included
    pending: dict[str, mx.array] = field(default_factory=dict)  # sums of gradients, loss and token count
    tally: Tally = field(default_factory=Tally)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # what must be equal in the resumed run

    @property
    def iteration(self) -> int:
        return self.tally.iteration

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file. It appears complete or not at all, even after a power failure."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{group}/{name}": array for group in _GROUPS for name, array in getattr(self, group).items()}
        about = {"version": _VERSION, "tally": asdict(self.tally), "fingerprint": self.fingerprint}
        # MLX requires this suffix; the leading dot hides the file while it is written.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
        try:
            mx.save_safetensors(str(temporary), arrays, metadata={_KEY: json.dumps(about)})
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            _sync(path.parent)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TrainingState:
        """Read what `save` wrote. The arrays are read into memory, so the file may be replaced afterwards."""
        try:
            arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
            mx.eval(arrays)
        except (OSError, RuntimeError, ValueError) as error:
            raise FormatError(f"{path} cannot be read: {error}", "Resume from another checkpoint.") from error
        if _KEY not in metadata:
            raise FormatError(f"{path} is not a training state.", "Name the training state that a run saved.")
        about = json.loads(metadata[_KEY])
        if about.get("version") != _VERSION:
            raise FormatError(
                f"{path} has version {about.get('version')} of the training state, not {_VERSION}.",
                "Resume with the mlx-lora that wrote it, or start from its adapter (--resume-adapter-file).",
            )
        groups: dict[str, dict[str, mx.array]] = {group: {} for group in _GROUPS}
        for name, array in arrays.items():
            group, _, name = name.partition("/")
            groups[group][name] = array
        return cls(**groups, tally=Tally(**about["tally"]), fingerprint=about["fingerprint"])


def _sync(path: Path) -> None:
    """Flush the file or folder from the system's buffers to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(
    config: Any, loss: str, optimizer: str, rows: int, world: int, parameters: dict[str, mx.array]
) -> dict[str, Any]:
    """The settings that must be equal for a run to continue from another's state. JSON values only."""
    return {
        "loss": loss,
        "batch_size": config.batch_size,
        "grad_accumulation_steps": config.grad_accumulation_steps,
        "seed": config.seed,
        "optimizer": optimizer,
        "rows of training data": rows,
        "processes": world,
        "parameters": {path: f"{p.dtype} {list(p.shape)}" for path, p in parameters.items()},
    }


def check_fingerprint(saved: dict[str, Any], here: dict[str, Any], most: int = 10) -> None:
    """Raise a `TrainingError` that lists how `here` differs from the run that `saved` the state."""
    before, now = _flat(saved), _flat(here)
    differences = [
        f"{name}: {before.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} here"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differences:
        rest = [f"and {len(differences) - most} more"] if len(differences) > most else []
        raise TrainingError(
            "\n".join(["The checkpoint belongs to another run:", *differences[:most], *rest]),
            "Resume with the settings of that run, or start a new one. Only iters may be larger.",
        )


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    parameters = about.get("parameters", {})
    return {**{k: v for k, v in about.items() if k != "parameters"}, **parameters}
