"""Options of reading and writing: information that a format does not store, and choices for writing.

A format names the options it takes (``READS``, ``WRITES``). Any other given option is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..adapter import Adapter, raise_faults, split_layer
from ..base.names import BaseModel
from ..errors import ConfigError, FormatError, ModelError

MOE_LAYOUTS = ("per_expert", "target_parameters")
PROFILES = ("serving",)
LEGACY_SCALES = ("scale", "alpha")
MERGE = "Merge it into the model instead: convert --to merged."
EMBEDDINGS = "embeddings"  # in an adapter's metadata: the adapted modules that are embeddings
NAME_BASE = "Name the base model: --model, or base=."


@dataclass(frozen=True)
class _Options:
    base: BaseModel | None = None  # the model that the adapter was made for

    @property
    def known_base(self) -> BaseModel | None:
        """The base, if its config can be read without a download."""
        return self.base if self.base is not None and self.base.known else None

    def to_mlx(self, path: str) -> str:
        """mlx-lm's path of the module that transformers calls ``path``; without a known base, the same path."""
        return self.known_base.to_mlx(path) if self.known_base else path

    def to_hf(self, path: str) -> str:
        """transformers' path of the module that mlx-lm calls ``path``; without a known base, the same path."""
        return self.known_base.to_hf(path) if self.known_base else path


@dataclass(frozen=True)
class ReadOptions(_Options):
    """Information for reading.

    Args:
        base: the model that the adapter was made for.
        alpha: the adapter's alpha, if the files do not store it; scale = alpha / rank.
        adapter: the name of one of several adapters in subfolders.
        legacy_scale: the meaning of ``scale`` in the mlx-lm version that wrote an old folder: ``scale``, or ``alpha``
            (scale * alpha / rank).
        enabled: loralib's ``enable_lora`` of merged layers, such as (True, False, True).
        lenient: collect missing information in ``unknown`` instead of raising an error; for ``describe``.
    """

    alpha: float | None = None
    adapter: str | None = None
    legacy_scale: str | None = None
    enabled: tuple[bool, ...] | None = None
    lenient: bool = False
    unknown: list[str] = field(default_factory=list)

    def need(self, message: str, hint: str) -> None:
        """Raise an error for missing information or, in lenient reading, add it to ``unknown``."""
        if not self.lenient:
            raise FormatError(message, hint)
        if message not in self.unknown:
            self.unknown.append(message)

    def base_for(self, what: str) -> BaseModel | None:
        """The base, its config read. In lenient reading, None if there is no base or its config cannot be read."""
        if self.base is not None:
            try:
                self.base.config  # noqa: B018  (raises if it cannot be read)
                return self.base
            except ModelError:
                if not self.lenient:
                    raise
        self.need(f"{what}: reading this needs the base model's config", NAME_BASE)
        return None

    def alpha_from(self, stored: Any, source: Any) -> float | None:
        """``stored``, the alpha in the files, if it is a number, else the caller's. Giving both is an error."""
        if isinstance(stored, bool) or not isinstance(stored, (int, float)):
            return self.alpha
        if self.alpha is not None:
            raise ConfigError(f"--alpha: {source} already stores alpha {stored:g}", "Leave --alpha out.")
        return stored


@dataclass(frozen=True)
class WriteOptions(_Options):
    """Choices for writing.

    Args:
        base: the model that the adapter is for.
        moe: how PEFT's folder holds experts: ``per_expert`` or ``target_parameters``.
        profile: ``serving``: one rank, one integer alpha, keys for each expert, for servers such as vLLM.
        allow_lossy: leave out what the format cannot hold, and list it in ``lost``.
        alpha: the alpha to write; the adapter's scale is folded into its arrays accordingly.
    """

    moe: str | None = None
    profile: str | None = None
    allow_lossy: bool = False
    alpha: float | None = None
    lost: list[str] = field(default_factory=list)

    def leave_out(self, faults: list[str], hint: str) -> None:
        """Refuse to write what the format cannot hold or, if losses are allowed, list it in ``lost``."""
        if self.allow_lossy:
            self.lost.extend(faults)
        else:
            hint = f"{hint.rstrip('.')}, or convert with --allow-lossy, which leaves them out."
            raise_faults(faults, hint, FormatError)

    def base_for(self, what: str) -> BaseModel:
        """The base, its config read."""
        if self.base is None:
            raise FormatError(f"{what}: writing this needs the base model's config", NAME_BASE)
        self.base.config  # noqa: B018  (raises if it cannot be read)
        return self.base


# Names of embeddings. Two others look alike: GPT-NeoX's head, and a part of DeepSeek's attention.
_EMBEDDING = re.compile(r"(^|\.)(?!embed_(out|q)$)(wte|wpe|\w*emb\w*)$")


def is_embedding(path: str, adapter: Adapter, base: BaseModel | None = None) -> bool:
    """Whether the module at ``path`` is an embedding.

    Decided by the adapter's files or original model, if they say so, else by ``base``, else by the name.
    """
    if (said := adapter.metadata.get(EMBEDDINGS)) is not None and f"{path}.lora_a" in adapter.weights:
        return path in said
    if base is not None and base.known and not base.same_names and path in base.modules:
        return base.modules[path][0] == "embedding"
    return bool(_EMBEDDING.search(path))


def locate_modules(adapter: Adapter, names: dict[str, str], system: str) -> dict[str, tuple[int | None, str]]:
    """(layer, the system's name) of each module, by its path. Raises a ``FormatError`` for modules without a name.

    Args:
        names: the system's names, by mlx-lm's name relative to a layer or, outside the layers, by its path.
    """
    found, faults = {}, []
    for path in adapter.modules:
        layer, name = split_layer(path)
        if name in names and path in (name, f"model.layers.{layer}.{name}"):
            found[path] = layer, names[name]
        else:
            faults.append(f"{path}: {system} has no such module")
    raise_faults(faults, "Leave those modules out of the adapter, or merge it: convert --to merged.", FormatError)
    return found


# The command line's flags, by field.
_READ_FLAGS = {"alpha": "--alpha", "adapter": "--adapter", "legacy_scale": "--legacy-scale", "enabled": "--enable-lora"}
_WRITE_FLAGS = {"moe": "--moe", "profile": "--profile", "alpha": "--to-alpha"}
_CHOICES = {"moe": MOE_LAYOUTS, "profile": PROFILES, "legacy_scale": LEGACY_SCALES}


def refuse_unused(options: ReadOptions | WriteOptions, taken: set[str], format: str) -> None:
    """Raise a ``ConfigError`` that names every given option that is not in ``taken`` or has an unknown value."""
    flags, verb = (_READ_FLAGS, "reading") if isinstance(options, ReadOptions) else (_WRITE_FLAGS, "writing")
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in flags}
    given = {name: value for name, value in given.items() if value is not None}
    faults = [f"{flags[name]}: {verb} {format} does not use this option" for name in given if name not in taken]
    faults += [
        f"{flags[name]} must be one of {', '.join(_CHOICES[name])}, not {value!r}"
        for name, value in given.items()
        if name in taken and name in _CHOICES and value not in _CHOICES[name]
    ]
    raise_faults(faults, "Leave it out.", ConfigError)
