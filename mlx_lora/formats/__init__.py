"""Adapters on disk. A format is a file here and a row of ``FORMATS``.

A row has ``detect(path)``, ``read(path, options)``, the options it takes (``READS``, ``WRITES``), and where it can be
written ``files(path)`` and ``write(adapter, path, options)``; ``SUFFIXES`` where it is a file and not a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapter import Adapter, split_layer
from ..base.names import BaseModel
from ..errors import ConfigError, FormatError
from . import deepspeed, gguf, lightning, litgpt, loralib, mlx_lm, nemo, peft, torchtune
from .files import write_file, write_folder
from .options import Reading, Writing, refuse_unused
from .unsupported import recognise

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
    """The name of the format of the adapter at ``path``, a folder or a file, by its files."""
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path}: does not exist", "Name the folder or file that holds the adapter.")
    found = [name for name, form in FORMATS.items() if form.detect(path)]
    if not found:
        if foreign := recognise(path):
            raise FormatError(f"{path}: is {foreign}; it is not converted", f"Known formats: {', '.join(FORMATS)}.")
        held = "is a file of no format" if path.is_file() else "holds no adapter"
        inside = ""
        if path.is_dir():
            inside = f" (it holds {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'})"
        raise FormatError(f"{path}: {held} that mlx-lora knows{inside}", f"Known formats: {', '.join(FORMATS)}.")
    if len(found) > 1:
        raise FormatError(f"{path}: holds adapters of {' and '.join(found)}", "Say which with --from, or format=.")
    return found[0]


def load_adapter(
    path: str | Path,
    format: str | None = None,
    base: str | Path | BaseModel | None = None,
    *,
    alpha: float | None = None,
    adapter: str | None = None,
    legacy_scale: str | None = None,
    enabled: tuple[bool, ...] | None = None,
) -> Adapter:
    """Read the adapter at ``path``, a folder or a file.

    Args:
        format: one of ``FORMATS``; detected from the files by default.
        base: the model that the adapter is for, a folder, its ``config.json`` or a repository: it tells mlx-lm's names
            of modules, and the sizes that some formats do not store.
        alpha: the adapter's alpha (scale * rank), for formats that do not store it.
        adapter: name of the adapter, where a PEFT folder holds several.
        legacy_scale: ``scale`` or ``alpha``; see mlx-lm's history in ``formats/mlx_lm.py``.
        enabled: loralib's ``enable_lora`` of merged layers.

    Raises:
        FormatError: the files are not what they claim to be, or do not tell enough. AdapterError: the arrays are
        damaged or incomplete. ConfigError: an option that this format has no use for.
    """
    form = FORMATS[_known(format or detect_format(path))]
    options = Reading(_base(base), alpha, adapter, legacy_scale, tuple(enabled) if enabled else None)
    refuse_unused(options, form.READS, format or detect_format(path))
    return form.read(Path(path), options).check()


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
    """Write ``adapter`` to ``path``, a folder or, for formats of one file, a file; each appears whole or not at all.

    Args:
        format: one of ``FORMATS``.
        overwrite: replace an adapter of that format that is already there.
        base: the model that the adapter is for; see ``load_adapter``.
        moe: PEFT's layout of experts, ``per_expert`` or ``target_parameters``.
        profile: ``serving``: PEFT's folder as servers want it (one rank, integer alpha, keys for each expert).
        alpha: the alpha to write into a format that stores none; the adapter's scale is folded to it.
        allow_lossy: leave out what the format cannot hold. ``lost`` then names it.

    Raises:
        FormatError: an adapter is there already, or the format cannot express this one.
    """
    form, path = FORMATS[_known(format)], Path(path)
    if not hasattr(form, "write"):
        written = [name for name, other in FORMATS.items() if hasattr(other, "write")]
        raise FormatError(f"{format} is read, not written", f"Formats to write: {', '.join(written)}.")
    adapter.check()
    options = Writing(_base(base), moe, profile, allow_lossy, alpha, lost if lost is not None else [])
    refuse_unused(options, form.WRITES, format)
    suffixes = getattr(form, "SUFFIXES", None)
    if suffixes:
        if path.is_dir() or path.suffix not in suffixes:
            raise FormatError(f"{path}: {format} is one file", f"Name a file that ends in {' or '.join(suffixes)}.")
        if path.exists() and not overwrite:
            raise FormatError(f"{path}: is there already", "Choose another name, or add --force.")
        write_file(path, lambda temporary: form.write(adapter, temporary, options))
        return path
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path}: is a file", "Name a folder.")
    # The formats' configs share a name: writing one beside another's weights would leave both unreadable.
    others = [n for n, other in FORMATS.items() if other is not form and path.exists() and other.detect(path)]
    if others:
        raise FormatError(f"{path}: holds an adapter of format {others[0]}", "Choose another folder.")
    there = [file.name for file in form.files(path) if file.exists()]
    if there and not overwrite:
        raise FormatError(f"{path}: already holds {' and '.join(there)}", "Choose another folder, or add --force.")
    write_folder(path, lambda temporary: form.write(adapter, temporary, options))
    return path


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known", f"Known formats: {', '.join(FORMATS)}.")
    return format


def _base(base: str | Path | BaseModel | None) -> BaseModel | None:
    return base if base is None or isinstance(base, BaseModel) else BaseModel(base)


def describe(path: str | Path, format: str | None = None, base: str | Path | None = None) -> dict[str, Any]:
    """What an adapter is, from its files alone: format, method, rank, scale, modules, sizes, base, problems.

    Faults of the adapter itself, and facts that its files do not tell, are listed under ``problems``; files that
    cannot be read raise ``FormatError``.
    """
    name = _known(format or detect_format(path))
    options = Reading(base=_base(base), lenient=True)
    adapter = FORMATS[name].read(Path(path), options)
    config, problems = adapter.config, adapter.problems()
    facts = {"format": name, "method": config.method, "base": adapter.base or "not told"}
    if config.method in ("lora", "dora") and adapter.modules and not problems:
        ranks = {adapter.rank_of(p) for p in adapter.modules}
        facts |= {"rank": sorted(ranks)}
        if "scale" not in adapter.metadata.get("open", ()):
            alphas = {round(config.scale_of(p) * adapter.rank_of(p), 6) for p in adapter.modules}
            facts |= {"scale": sorted({config.scale_of(p) for p in adapter.modules}), "alpha": sorted(alphas)}
        facts["dropout"] = config.dropout
    elif config.method == "vera" and not problems:
        facts |= {"rank": [config.rank], "projection_prng_key": config.projection_prng_key}
        facts["projections"] = "stored" if "vera_a" in adapter.weights else "drawn from the key"
    if adapter.full_parameters and config.method != "full":
        facts["whole parameters"] = sorted(adapter.full_parameters)
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
        "problems": problems + options.open,
    }
