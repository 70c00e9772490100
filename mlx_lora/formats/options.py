"""What a caller adds to the files: facts that a format does not store, and choices in how to write.

A format names the options it takes (``READS``, ``WRITES``); any other that is given is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..adapter import raise_faults
from ..base.names import BaseModel
from ..errors import ConfigError, FormatError, ModelError

SCALE_RULES = ("scale", "alpha")
MOE_LAYOUTS = ("per_expert", "target_parameters")
PROFILES = ("serving",)


@dataclass(frozen=True)
class Reading:
    """Facts for a reader.

    Args:
        base: the model that the adapter was made for.
        alpha: the adapter's alpha, where the files do not tell it; scale = alpha / rank.
        adapter: name of one of several adapters in sub-folders.
        legacy_scale: what ``scale`` meant to the mlx-lm that wrote an old folder: ``scale``, or ``alpha``
            (scale * alpha / rank).
        enabled: loralib's ``enable_lora`` of merged layers, such as (True, False, True).
        lenient: collect in ``open`` what is not known instead of refusing; for ``describe``.
    """

    base: BaseModel | None = None
    alpha: float | None = None
    adapter: str | None = None
    legacy_scale: str | None = None
    enabled: tuple[bool, ...] | None = None
    lenient: bool = False
    open: list[str] = field(default_factory=list)

    def need(self, message: str, hint: str) -> None:
        """Refuse for want of a fact, or note it."""
        if not self.lenient:
            raise FormatError(message, hint)
        if message not in self.open:
            self.open.append(message)

    def base_for(self, what: str) -> BaseModel | None:
        """The base; where none is given (or its config cannot be had) this refuses, or notes it and returns None."""
        if self.base is not None:
            if not self.lenient:
                self.base.config  # noqa: B018  (raises where it cannot be had)
                return self.base
            try:
                self.base.config  # noqa: B018
                return self.base
            except ModelError:
                pass
        self.need(f"{what} needs the base model's config", "Name the base: --model, or base=.")
        return None


@dataclass(frozen=True)
class Writing:
    """Choices for a writer.

    Args:
        base: the model that the adapter is for.
        moe: how PEFT's folder holds experts: ``per_expert`` or ``target_parameters``.
        profile: ``serving``: one rank, one integer alpha, keys for each expert, for servers such as vLLM.
        allow_lossy: write although something is lost; it is told in ``lost``.
        alpha: the alpha to write in, the scale of the adapter folded into its arrays.
    """

    base: BaseModel | None = None
    moe: str | None = None
    profile: str | None = None
    allow_lossy: bool = False
    alpha: float | None = None
    lost: list[str] = field(default_factory=list)

    def lose(self, faults: list[str], hint: str = "") -> None:
        """Refuse what the format cannot hold, or note it where losses are allowed."""
        if self.allow_lossy:
            self.lost.extend(faults)
        else:
            more = "or convert with --allow-lossy, which leaves them out."
            raise_faults(faults, f"{hint.rstrip('.')}, {more}" if hint else more.capitalize(), FormatError)

    def base_for(self, what: str) -> BaseModel:
        if self.base is None:
            raise FormatError(f"{what} needs the base model's config", "Name the base: --model, or base=.")
        self.base.config  # noqa: B018  (raises where it cannot be had)
        return self.base


# Given by callers, by field; what the command line calls them.
_FLAGS = {
    "alpha": "--alpha",
    "adapter": "--adapter",
    "legacy_scale": "--legacy-scale",
    "enabled": "--enable-lora",
    "moe": "--moe",
    "profile": "--profile",
}
_WRITTEN = {**_FLAGS, "alpha": "--to-alpha"}


def refuse_unused(options: Reading | Writing, taken: set[str], format: str) -> None:
    """Raise for an option that is given and that ``format`` has no use for."""
    verb = "read" if isinstance(options, Reading) else "written"
    given = [f.name for f in fields(options) if f.name in _FLAGS and getattr(options, f.name) is not None]
    flags = _FLAGS if isinstance(options, Reading) else _WRITTEN
    faults = [f"{flags[name]}: {format} is {verb} without it" for name in given if name not in taken]
    for name, choices in (("moe", MOE_LAYOUTS), ("profile", PROFILES), ("legacy_scale", SCALE_RULES)):
        value = getattr(options, name, None)
        if name in taken and value is not None and value not in choices:
            faults.append(f"{_FLAGS[name]} must be one of {', '.join(choices)}, not {value!r}")
    raise_faults(faults, "Leave it out.", ConfigError)
