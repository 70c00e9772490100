"""Adapters on disk. A format is a file in this folder (or a room) and a row of ``FORMATS``.

A row is a module with

    ``detect(path)``                    whether the file or folder ``path`` is of this format
    ``read(path, options)``             the adapter (``options``: ``ReadOptions``)
    ``READS``                           the options that ``read`` takes besides the base
    ``FILES``                           names or patterns of the adapter's files in a folder

and, for a format that can be written,

    ``write(adapter, path, options)``   writes into an empty folder, or a file (``options``: ``WriteOptions``)
    ``WRITES``                          the options that ``write`` takes besides the base
    ``SUFFIXES``                        only for a format of one file: the suffixes that it may have
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..adapter import Adapter, raise_faults, split_layer
from ..base.locking import locked
from ..base.names import BaseModel
from ..base.writing import writing
from ..errors import AdapterError, ConfigError, FormatError
from . import deepspeed, gguf, lightning, litgpt, loralib, mlx_lm, nemo, peft, torchtune
from .checkpoints import choose
from .files import write_file, write_folder
from .options import ReadOptions, WriteOptions, refuse_unused
from .unsupported import unsupported_kind

FORMATS = {
    "mlx-lm": mlx_lm,
    "peft": peft,
    "loralib": loralib,
    "torchtune": torchtune,
    "nemo": nemo,
    "lightning": lightning,
    "litgpt": litgpt,
    "deepspeed": deepspeed,
    "gguf": gguf,
}


def detect_format(path: str | Path) -> str:
    """The name of the format of the adapter at ``path``, a folder or a file, by its files.

    Raises: FormatError: there is no adapter, one of an unsupported format, or several of different formats.
    """
    path, known = Path(path), f"Supported formats: {', '.join(FORMATS)}."
    if not path.exists():
        raise FormatError(f"{path}: does not exist", "Name the folder or file of the adapter.")
    found = [name for name, form in FORMATS.items() if form.detect(path)]
    if len(found) > 1:
        raise FormatError(f"{path}: has adapters of the formats {' and '.join(found)}", "Name one: --from, or format=.")
    if found:
        return found[0]
    if kind := unsupported_kind(path):
        raise FormatError(f"{path}: is {kind}, which is not converted", known)
    if path.is_file():
        raise FormatError(f"{path}: is a file of an unsupported format", known)
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FormatError(f"{path}: has no adapter of a supported format; it has {inside}", known)


def load_adapter(
    path: str | Path,
    format: str | None = None,
    base: str | Path | BaseModel | None = None,
    *,
    alpha: float | None = None,
    adapter: str | None = None,
    legacy_scale: str | None = None,
    enabled: Sequence[bool] | None = None,
    checkpoint: str | int | None = None,
) -> Adapter:
    """Read the adapter at ``path``, a folder or a file.

    Args:
        format: one of ``FORMATS``; by default it is detected from the files.
        base: the model that the adapter is for: a folder, its ``config.json`` or a repository. It gives mlx-lm's names
            of the modules, and the sizes that some formats do not store.
        alpha: the adapter's alpha (scale * rank), for formats that do not store it.
        adapter: the name of the adapter, if a PEFT folder has several.
        legacy_scale: ``scale`` or ``alpha``: the meaning of scale in an old mlx-lm folder, see ``formats/mlx_lm.py``.
        enabled: loralib's ``enable_lora`` of merged layers.
        checkpoint: which checkpoint of a run's folder: ``last``, ``best`` or an iteration. The default is the best one,
            if any.

    Raises:
        FormatError: the files are damaged, not of this format, or lack information. AdapterError: the arrays are
        damaged or incomplete. ConfigError: an option that this format does not use, or no such checkpoint.
    """
    path = choose(path, checkpoint)
    name, form = _format(path, format)
    options = ReadOptions(_base(base), alpha, adapter, legacy_scale, tuple(enabled) if enabled else None)
    refuse_unused(options, form.READS, name)
    adapter = form.read(Path(path), options).check()
    _check_sizes(adapter, options.known_base)
    return adapter


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    format: str = "mlx-lm",
    overwrite: bool = False,
    base: str | Path | BaseModel | None = None,
    *,
    moe: str | None = None,
    profile: str | None = None,
    alpha: float | None = None,
    allow_lossy: bool = False,
    lost: list[str] | None = None,
) -> Path:
    """Write ``adapter`` to ``path``, a folder or, for formats of one file, a file. Each file is written atomically.

    Args:
        format: one of ``FORMATS``.
        overwrite: replace an adapter of that format that is already there.
        base: the model that the adapter is for; see ``load_adapter``.
        moe: PEFT's layout of experts, ``per_expert`` or ``target_parameters``.
        profile: ``serving``: a PEFT folder for servers (one rank, integer alpha, keys for each expert).
        alpha: the alpha to write; the adapter's scale is folded into its arrays accordingly.
        allow_lossy: leave out what the format cannot hold, and list it in ``lost``.

    Raises: FormatError: there already is an adapter, the format cannot hold this one, or it cannot be written.
        ConfigError: an option that this format does not use; a run or another command is writing in the folder.
    """
    form, path = check_destination(path, format, overwrite), Path(path)
    adapter.check()
    options = WriteOptions(_base(base), moe, profile, allow_lossy, alpha, lost if lost is not None else [])
    refuse_unused(options, form.WRITES, format)
    _check_sizes(adapter, options.known_base)
    if hasattr(form, "SUFFIXES"):
        write_file(path, lambda temporary: form.write(adapter, temporary, options), needed=adapter.nbytes)
        return path
    with writing(path), locked(path):
        write_folder(path, lambda temporary: form.write(adapter, temporary, options), needed=adapter.nbytes)
    return path


def check_destination(path: str | Path, format: str, overwrite: bool = False) -> ModuleType:
    """The row of ``format``, if an adapter of it can be written to ``path``; nothing is written.

    Raises: ConfigError: an unknown format. FormatError: it can only be read, or ``path`` exists or cannot hold it.
    """
    form, path = _row(format), Path(path)
    if not hasattr(form, "write"):
        writable = [name for name, other in FORMATS.items() if hasattr(other, "write")]
        raise FormatError(f"{format} can be read, but not written", f"Formats to write: {', '.join(writable)}.")
    if suffixes := getattr(form, "SUFFIXES", None):
        if path.is_dir() or path.suffix.lower() not in suffixes:
            raise FormatError(f"{path}: {format} is one file", f"Name a file that ends in {' or '.join(suffixes)}.")
        if path.exists() and not overwrite:
            raise FormatError(f"{path}: already exists", "Choose another name, or add --force.")
        return form
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path}: is a file", "Name a folder.")
    # The configs of all formats have one name: two formats in a folder would make both unreadable.
    others = [n for n, other in FORMATS.items() if other is not form and path.exists() and other.detect(path)]
    if others:
        raise FormatError(f"{path}: already holds an adapter of format {others[0]}", "Choose another folder.")
    present = [file.name for pattern in form.FILES for file in path.glob(pattern)]
    if present and not overwrite:
        raise FormatError(f"{path}: already holds {' and '.join(present)}", "Choose another folder, or add --force.")
    return form


def _check_sizes(adapter: Adapter, base: BaseModel | None) -> None:
    """Refuse a base with weights of other sizes than the adapter (checked if its folder has float weights)."""
    faults = []
    for path in adapter.modules if base is not None and base.folder is not None else ():
        a, b = (adapter.weights.get(f"{path}.{leaf}") for leaf in ("lora_a", "lora_b"))
        name = base.weight_name(path) if a is not None and b is not None and a.ndim == b.ndim == 2 else None
        shape = base.shape(name) if name else None
        # As a set: embeddings and GPT-2's layers are stored the other way round.
        if shape is not None and sorted(shape) != sorted((a.shape[0], b.shape[1])):
            sizes, own = f"lora_a {list(a.shape)} and lora_b {list(b.shape)}", " x ".join(map(str, shape[::-1]))
            faults.append(f"{path}: {sizes} do not fit this layer of {base.name} ({own})")
    if not faults:
        return
    trained = f" It was trained on {adapter.base}." if adapter.base and adapter.base != base.name else ""
    raise_faults(faults, f"Name the model that the adapter was trained on.{trained}", AdapterError)


def _row(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}", f"Supported formats: {', '.join(FORMATS)}.")
    return FORMATS[format]


def _format(path: str | Path, format: str | None) -> tuple[str, ModuleType]:
    """The name and the row of the given format, else of the detected one."""
    name, path = format or detect_format(path), Path(path)
    form = _row(name)
    if format and not path.exists():
        raise FormatError(f"{path}: does not exist", "Name the folder or file of the adapter.")
    if format and path.is_dir() and form.FILES and not any(any(path.rglob(pattern)) for pattern in form.FILES):
        raise FormatError(f"{path}: has no file of {name} ({', '.join(form.FILES)})", "Leave --from (format=) out.")
    return name, form


def _base(base: str | Path | BaseModel | None) -> BaseModel | None:
    return base if base is None or isinstance(base, BaseModel) else BaseModel(base)


def describe(path: str | Path, format: str | None = None, base: str | Path | None = None) -> dict[str, Any]:
    """Describe an adapter from its files alone: format, method, rank, scale, modules, sizes, base, problems.

    ``problems`` lists the faults of the adapter, and facts that its files do not store. Raises: FormatError: the files
    cannot be read.
    """
    name, form = _format(path, format)
    options = ReadOptions(base=_base(base), lenient=True)
    adapter = form.read(Path(path), options)
    config, problems = adapter.config, adapter.problems()
    facts = {"format": name, "method": config.method, "base": adapter.base or "unknown"}
    if config.method in ("lora", "dora") and adapter.modules and not problems:
        facts["rank"] = sorted({adapter.rank_of(p) for p in adapter.modules})
        if "scale" not in adapter.metadata.get("unknown", ()):
            alphas = {round(config.scale_of(p) * adapter.rank_of(p), 6) for p in adapter.modules}
            facts |= {"scale": sorted({config.scale_of(p) for p in adapter.modules}), "alpha": sorted(alphas)}
        facts["dropout"] = config.dropout
    elif config.method == "vera" and not problems:
        facts |= {"rank": [config.rank], "projection_prng_key": config.projection_prng_key}
        facts["projections"] = "stored" if "vera_a" in adapter.weights else "drawn from the key"
    if adapter.full_parameters and config.method != "full":
        facts["full parameters"] = sorted(adapter.full_parameters)
    if adapter.tokens:
        facts["trained tokens"] = sum(len(ids) for ids, _ in adapter.tokens.values())
    layers = sorted({i for i, _ in map(split_layer, adapter.modules) if i is not None})
    return {
        **facts,
        "modules": len(adapter.modules),
        "targets": sorted({split_layer(p)[1] for p in adapter.modules}),
        "layers": f"{layers[0]} to {layers[-1]} ({len(layers)})" if layers else "none",
        "parameters": adapter.num_parameters,
        "bytes": adapter.nbytes,
        "dtype": sorted({str(w.dtype).rpartition(".")[2] for w in adapter.weights.values()}),
        "problems": problems + options.unknown,
    }
