"""The adapter that a run trains: a new one, one that starts from a file, or that of the resumed run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..adapter import FINGERPRINT, SHARED, raise_faults
from ..config import AdapterConfig
from ..errors import AdapterError, MLXLoRAError
from ..formats import load_adapter
from ..formats.checkpoints import LAST
from ..formats.files import read_json, read_safetensors
from ..init import FROM_DATA, SUBTRACTED
from ..model.attach import attach, extract, mount, unmount


def attach_for_run(
    model: nn.Module,
    config: AdapterConfig,
    seed: int,
    *,
    folder: Path | None = None,
    file: str | Path | None = None,
    batches: Iterable | None = None,
    reference: nn.Module | None = None,
) -> None:
    """Put the adapter to train on ``model``.

    Args:
        seed: of the initialisation.
        folder: folder of the resumed run. An initialisation that chooses ranks or freezes a pair of matrices (such as
            PiSSA and EVA) is read from there; otherwise the adapter is made again from the seed.
        file: an ``adapters.safetensors`` to take the initial weights from.
        batches, reference: see ``model.attach.attach``.
    """
    mx.random.seed(seed)
    subtracted = config.init.startswith(SUBTRACTED)
    if folder is not None and (subtracted or config.init in FROM_DATA):
        return mount(model, load_adapter(folder, "mlx-lm", checkpoint=LAST), difference=subtracted)
    attach(model, config, batches, reference)
    if file is not None:
        try:
            _take_weights(model, Path(file))
        except MLXLoRAError:
            unmount(model)
            raise


def _take_weights(model: nn.Module, file: Path) -> None:
    """Replace the weights of the new adapter on ``model`` by those in ``file``, which must have the same names."""
    new, found = extract(model), read_safetensors(file)
    wanted = {name: array for name, array in new.weights.items() if name not in SHARED}
    faults = [f"{name}: in the file, not in this run" for name in found if name not in (*wanted, *SHARED)]
    faults += [f"{name}: in this run, not in the file" for name in wanted if name not in found]
    faults += [
        f"{name}: {list(found[name].shape)} in the file, {list(array.shape)} in this run"
        for name, array in wanted.items()
        if name in found and found[name].shape != array.shape
    ]
    hint = "Use the rank, keys and layers that the file was made with."
    raise_faults([f"{file}: {fault}" for fault in faults], hint, AdapterError)
    trained_on = _config_beside(file)
    metadata = {**new.metadata, FINGERPRINT: trained_on.get(FINGERPRINT)}
    mount(model, replace(new, weights=found, base=trained_on.get("model") or new.base, metadata=metadata))


def _config_beside(file: Path) -> dict[str, Any]:
    """The adapter config in the same folder as ``file``; empty if there is none."""
    try:
        found = read_json(file.with_name("adapter_config.json"))
    except MLXLoRAError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def weights_of(model: nn.Module, file: Path) -> Iterator[None]:
    """Load the weights of another checkpoint of the same run into ``model``; restore its own on exit.

    Raises: ValueError: the file is not there, or is of another adapter.
    """
    present = dict(tree_flatten(model.trainable_parameters()))
    found = mx.load(str(file)) if file.is_file() else {}
    names = {id(array): name for name, array in extract(model).weights.items()}
    # With an initialisation that is subtracted (such as pissa), the file's second half holds the frozen pair.
    past = {path: found.get(names.get(id(array), path)) for path, array in present.items()}
    cut = {path: tuple(slice(size) for size in array.shape) for path, array in present.items()}
    past = {path: array[cut[path]] for path, array in past.items() if array is not None}
    if {path: array.shape for path, array in past.items()} != {path: array.shape for path, array in present.items()}:
        raise ValueError(f"{file} does not hold the weights of this run")
    model.update(tree_unflatten([(path, array.astype(present[path].dtype)) for path, array in past.items()]))
    try:
        yield
    finally:
        model.update(tree_unflatten(list(present.items())))
