"""Adapters on disk. A format is a file here (``detect``, ``files``, ``read``, ``write``) and a row of ``FORMATS``."""

from __future__ import annotations

from pathlib import Path

from ..adapter import Adapter, split_layer
from ..errors import ConfigError, FormatError
from . import mlx_lm, peft
from .files import write_folder

FORMATS = {"mlx-lm": mlx_lm, "peft": peft}


def detect_format(path: str | Path) -> str:
    """The name of the format of the adapter in folder ``path``, by its files."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FormatError(f"{folder}: {what}", "Name the folder that holds the adapter's weights and config.")
    found = [name for name, form in FORMATS.items() if form.detect(folder)]
    if not found:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FormatError(
            f"{folder}: holds no adapter that mlx-lora knows (it holds {held})",
            f"Known formats: {', '.join(FORMATS)}.",
        )
    if len(found) > 1:
        raise FormatError(f"{folder}: holds adapters of {' and '.join(found)}", "Say which with --from, or format=.")
    return found[0]


def load_adapter(path: str | Path, format: str | None = None) -> Adapter:
    """Read the adapter in folder ``path``.

    Args:
        format: one of ``FORMATS``; detected from the files by default.

    Raises:
        FormatError: the files are not what they claim to be. AdapterError: the arrays are damaged or incomplete.
    """
    return FORMATS[_known(format or detect_format(path))].read(Path(path)).check()


def save_adapter(adapter: Adapter, path: str | Path, format: str = "mlx-lm", overwrite: bool = False) -> Path:
    """Write ``adapter`` into folder ``path``; each file appears whole or not at all.

    Args:
        format: one of ``FORMATS``.
        overwrite: replace an adapter of that format that is already there.

    Raises:
        FormatError: an adapter is there already, or the format cannot express this one.
    """
    form, folder = FORMATS[_known(format)], Path(path)
    adapter.check()
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: is a file", "Name a folder.")
    # The formats' configs share a name: writing one beside another's weights would leave both unreadable.
    others = [name for name, other in FORMATS.items() if other is not form and other.detect(folder)]
    if others:
        raise FormatError(f"{folder}: holds an adapter of format {others[0]}", "Choose another folder.")
    there = [file.name for file in form.files(folder) if file.exists()]
    if there and not overwrite:
        raise FormatError(f"{folder}: already holds {' and '.join(there)}", "Choose another folder, or add --force.")
    write_folder(folder, lambda temporary: form.write(adapter, temporary))
    return folder


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known", f"Known formats: {', '.join(FORMATS)}.")
    return format


def describe(path: str | Path, format: str | None = None) -> dict:
    """What an adapter is, from its files alone: format, method, rank, scale, modules, sizes, base, problems.

    Faults of the adapter itself are listed under ``problems``; files that cannot be read raise ``FormatError``.
    """
    name = _known(format or detect_format(path))
    adapter = FORMATS[name].read(Path(path))
    problems = adapter.faults()
    facts = {"format": name, "method": adapter.config.method, "base": adapter.base or "not told"}
    if adapter.config.method in ("lora", "dora") and adapter.modules and not problems:
        ranks = {adapter.rank_of(p) for p in adapter.modules}
        scales = {adapter.config.scale_of(p) for p in adapter.modules}
        facts |= {"rank": sorted(ranks), "scale": sorted(scales), "dropout": adapter.config.dropout}
        facts["alpha"] = sorted({round(adapter.config.scale_of(p) * adapter.rank_of(p), 6) for p in adapter.modules})
    layers = sorted({i for i, _ in map(split_layer, adapter.modules) if i is not None})
    return {
        **facts,
        "modules": len(adapter.modules),
        "targets": sorted({split_layer(p)[1] for p in adapter.modules}),
        "layers": f"{layers[0]} to {layers[-1]} ({len(layers)})" if layers else "none",
        "parameters": adapter.num_parameters,
        "bytes": adapter.nbytes,
        "dtype": sorted({str(w.dtype).rpartition(".")[2] for w in adapter.weights.values()}),
        "problems": problems,
    }
