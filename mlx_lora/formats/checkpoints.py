"""The checkpoints in a run's folder (last, best and numbered), and the choice of the one to read.

The last checkpoint is the adapter in the folder itself. The checkpoint of the best validation is in ``best``, a normal
adapter folder. A numbered file holds the weights of an iteration; its config is the folder's. mlx-lm's own runs have
the last and the numbered ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from . import mlx_lm
from .files import file_digest, read_json

LAST, BEST = "last", "best"
STATE = "training_state.safetensors"
ENTRY = "checkpoint"  # of adapter_config.json: the iteration, a hash of the weights and, in ``best``, the value


def checkpoints(folder: str | Path) -> dict[str, Path]:
    """The checkpoints in a run's folder: ``last``, ``best`` and iterations as text. Empty for anything else."""
    folder = Path(folder)
    found: dict[str, Path] = {}
    if mlx_lm.detect(folder / BEST) and (folder / BEST / mlx_lm.CONFIG).is_file():
        found[BEST] = folder / BEST
    found |= {str(iteration(file)): file for file in numbered(folder)}
    if not found and not (folder / STATE).exists():
        return {}
    last = folder / mlx_lm.WEIGHTS
    return {LAST: last, **found} if last.is_file() else found


def numbered(folder: Path) -> list[Path]:
    """The files of numbered checkpoints, in their order."""
    return sorted(folder.glob(f"[0-9]*_{mlx_lm.WEIGHTS}"), key=iteration)


def iteration(file: Path) -> int:
    """The iteration in a numbered file's name; -1 if there is none."""
    number = file.name.partition("_")[0]
    return int(number) if number.isdecimal() else -1


def choose(path: str | Path, checkpoint: str | int | None = None) -> Path:
    """The adapter's folder or file to read for ``path``.

    Args:
        checkpoint: ``last``, ``best`` or an iteration of the run whose folder ``path`` is. The default is the best one,
            if any, or the adapter in the folder if it is not the one that the run saved.

    Raises: ConfigError: ``path`` is not the folder of a run, or it does not have this checkpoint. FormatError: ``path``
        does not exist.
    """
    found = checkpoints(path)
    if checkpoint is None:
        return found[BEST] if BEST in found and is_own(path) else Path(path)
    if not Path(path).exists():
        raise FormatError(f"{path}: does not exist", "Name the folder of the run.")
    name = str(checkpoint).strip()
    name = str(int(name)) if name.isdecimal() else name
    if not found:
        raise ConfigError(
            f"checkpoint {name}: {path} is not the folder of a run, which has several checkpoints",
            "Name the folder of a run, or leave --checkpoint (checkpoint=) out.",
        )
    if name not in found:
        raise ConfigError(f"{path}: has no checkpoint {name!r}", f"It has: {', '.join(found)}.")
    return found[name]


def is_own(folder: str | Path) -> bool:
    """Whether the adapter in a run's folder is the one that the run saved, not a copied or merged one."""
    weights = Path(folder) / mlx_lm.WEIGHTS
    return not weights.is_file() or facts(folder).get("weights") == file_digest(weights)


def facts(folder: str | Path) -> dict[str, Any]:
    """The run's record about the checkpoint in ``folder``; empty if there is none."""
    try:
        found = read_json(Path(folder) / mlx_lm.CONFIG).get(ENTRY)
    except FormatError:
        return {}
    return found if isinstance(found, dict) else {}


def said_of(path: str | Path, checkpoint: str | int | None, chosen: Path) -> str:
    """A line about the chosen checkpoint; empty if the user chose it or there was only one."""
    if checkpoint is not None or BEST not in checkpoints(path):
        return ""
    if chosen == Path(path):
        return (
            f"{Path(path) / BEST} is not used: the adapter in {path} is not the one that the run saved. "
            "--checkpoint best uses it"
        )
    best, last = facts(chosen), facts(path).get("iteration")
    if best.get("iteration") == last is not None:
        return ""
    value = "".join(f", {name} {best[name]:.4g}" for name in best if name not in ("iteration", "weights"))
    return (
        f"Using the best checkpoint in {path}: iteration {best.get('iteration')}{value}. --checkpoint last is "
        f"iteration {last}"
    )
