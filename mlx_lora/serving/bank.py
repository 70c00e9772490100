"""Named adapters for one model, of which one is mounted at a time. The base is loaded only once."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.nn as nn

from ..adapter import Adapter
from ..base.origin import base_of
from ..errors import AdapterError
from ..formats import load_adapter
from ..model.attach import mount, unmount
from ..model.state import state_of


class AdapterBank:
    """Named adapters for one model.

    Args:
        model: the base, without an adapter.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        base = base_of(model)
        self._base = base.folder if base else None
        self._adapters: dict[str, Adapter] = {}
        self.current: str | None = None
        self.adapter: Adapter | None = None  # the mounted one
        self._state = state_of(model)

    @property
    def names(self) -> list[str]:
        return sorted(self._adapters)

    def add(self, name: str, adapter: Adapter | str | Path) -> None:
        """Store ``adapter``, or the adapter in that folder, as ``name``."""
        self._adapters[name] = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, base=self._base)

    def use(self, name: str | None) -> float:
        """Mount adapter ``name``; None unmounts. An unknown name is read as an adapter's folder.

        Returns: the seconds it took. Raises: AdapterError, FormatError; the present adapter then stays mounted.
        """
        tic = time.perf_counter()
        if name is None:
            unmount(self._model)
        else:
            if name not in self._adapters:
                if not Path(name).is_dir():
                    known = ", ".join(self.names) or "none"
                    raise AdapterError(f"no adapter named {name!r}", f"Known: {known}. An adapter's folder works, too.")
                self.add(name, name)
            # The name may have been given to another adapter, and the caller may have unmounted this one.
            if self._adapters[name] is not self.adapter or state_of(self._model) is not self._state:
                mount(self._model, self._adapters[name])
        self._state = state_of(self._model)
        self.current, self.adapter = name, self._adapters.get(name) if name is not None else None
        return time.perf_counter() - tic
