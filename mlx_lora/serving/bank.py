"""Named adapters for one base: loaded on first use, reloaded when their folder changes, evicted when unused.

LoRA adapters of linear layers share a batch, whatever their ranks and layers. Each row uses its own (``choose``).
Every other adapter is mounted alone (``mount_alone``). The base is in memory once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..adapter import Adapter
from ..base.origin import base_of
from ..errors import AdapterError
from ..formats import detect_format, load_adapter
from ..model.attach import adapters_on, mount, unmount
from ..model.multi import MultiLoRA, why_alone
from ..model.state import identity, state_of
from .residents import AdapterFolder, Key, Listed, Resident, Source, errors_by_name, signature_of


class AdapterBank:
    """Named adapters for one model.

    Args:
        model: the base, without an adapter.
        memory_limit: bytes of adapters to keep in memory. Adapters that are pinned or in use are never evicted.
        folder: a folder of adapters. Each adapter is a subfolder and has its name.
    """

    def __init__(self, model: nn.Module, memory_limit: int | None = None, folder: str | Path | None = None):
        self._model, self.memory_limit = model, memory_limit
        base = base_of(model)
        self._base = base.folder if base else None
        self.folder = None if folder is None else Path(folder)
        self._in_folder = None if folder is None else AdapterFolder(self.folder)
        self._sources: dict[str, Source] = {}
        self._residents: dict[str, Resident] = {}
        self._in_use: dict[Key, Resident] = {}  # includes older versions
        self._multi: MultiLoRA | None = None
        self._slots: list[Key] = []  # the adapters in _multi
        self._mounted: Key | None = None  # the adapter that is mounted alone
        self._clock = 0
        self.lock = threading.RLock()  # held while the model is changed, and by the engine while it computes
        self._reading = threading.Lock()  # held while an adapter is read, so that concurrent requests read it once
        self._own = adapters_on(model) or state_of(model) is not None
        self._identity = identity(model)

    # Known adapters.

    @property
    def names(self) -> list[str]:
        """All names, loaded or not. It takes no lock, so that no caller waits for a step of the engine."""
        return sorted({*list(self._sources), *self.in_folder()})

    @property
    def registered(self) -> list[str]:
        """The names that ``add`` registered."""
        return list(self._sources)

    def listed(self) -> list[Listed]:
        """All adapters, for a list of models. It takes no lock either."""
        known = {name: Source(path=self.folder / name) for name in self.in_folder()} | dict(self._sources)
        return [self._list(name, source) for name, source in sorted(known.items())]

    def __contains__(self, name: str) -> bool:
        return name in self._sources or (self._in_folder is not None and name in self._in_folder)

    def add(self, name: str, adapter: Adapter | str | Path, pinned: bool = False) -> None:
        """Register an adapter, or a folder with one, as ``name``. The folder is read on first use.

        Raises: FormatError: the folder holds no adapter. AdapterError: the name is not valid.
        """
        if not name or name != name.strip() or any(ord(char) < 32 for char in name):
            raise AdapterError(f"an adapter cannot be named {name!r}", "Use a name of letters, such as pirate.")
        if isinstance(adapter, Adapter):
            mx.eval(list(adapter.weights.values()))  # evaluate in this thread, because another one cannot
        else:
            detect_format(adapter)
        with self.lock:
            path = None if isinstance(adapter, Adapter) else Path(adapter)
            pinned = pinned or (name in self._sources and self._sources[name].pinned)
            self._sources[name] = Source(None if path else adapter, path, pinned)
            self._residents.pop(name, None)

    def pin(self, name: str) -> None:
        """Never evict ``name`` once it is loaded. Raises: AdapterError: unknown name."""
        with self.lock:
            self._sources[name] = replace(self._source(name), pinned=True)

    def check(self, adapter: str | Path) -> tuple[Adapter, list[str]]:
        """Read an adapter by name or path without keeping it. Also return why it cannot share a batch with others.

        Raises: AdapterError: unknown, or not for this model; FormatError.
        """
        source = Source(path=adapter) if isinstance(adapter, Path) else self._source(adapter)
        found = source.adapter or load_adapter(source.path, base=self._base)
        with self.lock, self._bare():
            return found, why_alone(self._model, found)

    def unload(self, name: str) -> None:
        """Drop ``name`` from memory, and remove the name unless it is in the folder. Rows that use the adapter finish.

        Raises: AdapterError: unknown.
        """
        with self.lock:
            if name not in self:
                raise self._unknown(name)
            self._sources.pop(name, None)
            self._residents.pop(name, None)

    # Adapters in use.

    def load(self, name: str) -> Resident:
        """Return adapter ``name``. It is read from its folder unless it is in memory and the folder is unchanged.

        Raises: AdapterError: unknown, or not for this model; FormatError.
        """
        self._check_free()
        if (found := self._in_memory(name)) is None:
            with self._reading:
                found = self._in_memory(name) or self._read(name)
        with self.lock:
            self._clock += 1
            found.used = self._clock
            self._evict(keep=found)
        return found

    def acquire(self, name: str) -> Resident:
        """Like ``load``, and keep this version in memory for a row until ``release``."""
        found = self.load(name)
        with self.lock:
            found.rows += 1
            self._in_use[found.key] = found
        return found

    def _in_memory(self, name: str) -> Resident | None:
        """Return adapter ``name`` if its current version is in memory. Raises: AdapterError: unknown name."""
        source, found = self._source(name), self._residents.get(name)
        same = found is not None and (source.path is None or signature_of(source.path) == found.signature)
        return found if same else None

    def _read(self, name: str) -> Resident:
        """Read adapter ``name`` while the engine continues. It replaces an older version in memory."""
        while True:
            known, source = self._sources.get(name), self._source(name)
            signature = signature_of(source.path)  # taken before reading, so that the next request sees a later change
            with errors_by_name({source.path: name, self._base: self._base and Path(self._base).name}):
                adapter = source.adapter or load_adapter(source.path, base=self._base)
                mx.eval(list(adapter.weights.values()))
                with self.lock:
                    if self._sources.get(name) is not known:  # meanwhile the name got another adapter
                        continue
                    with self._bare():
                        alone = why_alone(self._model, adapter)
                    self._clock += 1
                    self._residents[name] = Resident(name, self._clock, adapter, alone, signature)
                    return self._residents[name]

    def release(self, resident: Resident) -> None:
        """Tell the bank that a row that used ``resident`` has ended."""
        with self.lock:
            resident.rows -= 1
            if resident.rows == 0:
                self._in_use.pop(resident.key, None)
                self._evict()

    def has(self, key: Key) -> bool:
        """Whether the adapter in memory under this name has this version."""
        found = self._residents.get(key[0])
        return found is not None and found.key == key

    # Adapters on the model. Only the generating thread calls these methods.

    def choose(self, keys: Sequence[Key | None]) -> None:
        """Select the adapter of each row for the next batches, None for the base. A single key applies to all rows."""
        with self.lock:
            wanted = {key for key in keys if key is not None}
            if self._mounted is not None:
                unmount(self._model)
                self._mounted = None
            if wanted - set(self._slots):
                self._make_slots(wanted)
            if self._multi is not None:
                if wanted:
                    self._multi.mount()
                    self._multi.choose([None if key is None else str(key) for key in keys])
                else:  # no row has an adapter: compute no low-rank products
                    self._multi.unmount()
            self._identity = identity(self._model)

    def mount_alone(self, resident: Resident) -> None:
        """Mount one adapter for all rows of the next batches."""
        with self.lock:
            if self._mounted == resident.key:
                return
            if self._multi is not None:
                self._multi.unmount()
            mount(self._model, resident.adapter)
            self._mounted, self._identity = resident.key, identity(self._model)

    def clear(self) -> None:
        """Remove all adapters from the model."""
        self.choose([None])
        self._multi, self._slots = None, []

    def changed(self) -> bool:
        """Whether code outside the bank has changed the model since the last call."""
        with self.lock:
            now, before = identity(self._model), self._identity
            self._identity = now
            return now != before

    def _make_slots(self, wanted: set[Key]) -> None:
        """Attach the adapters that rows use, and other adapters in memory, to the model as multi-LoRA."""
        if self._multi is not None:
            self._multi.unmount()
        together = {r.key: r for r in (*self._in_use.values(), *self._residents.values()) if not r.alone}
        self._multi, self._slots = None, []
        adapters = {str(key): resident.adapter for key, resident in together.items()}
        self._multi, self._slots = MultiLoRA(self._model, adapters), list(together)

    def _evict(self, keep: Resident | None = None) -> None:
        """Evict the least recently used adapters until the rest fits the memory limit."""
        if self.memory_limit is None:
            return
        pinned = {name for name, source in self._sources.items() if source.pinned}
        idle = [
            r
            for r in self._residents.values()
            if r is not keep and r.rows == 0 and r.key != self._mounted and r.name not in pinned
        ]
        total = sum({r.key: r.adapter.nbytes for r in (*self._in_use.values(), *self._residents.values())}.values())
        for resident in sorted(idle, key=lambda r: r.used):
            if total <= self.memory_limit:
                break
            total -= resident.adapter.nbytes
            self._residents.pop(resident.name)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """A context that takes the multi-LoRA adapters off the model. An adapter mounted alone may stay."""
        mounted = self._multi is not None and self._multi.mounted
        if mounted:
            self._multi.unmount()
        try:
            yield
        finally:
            if mounted:
                self._multi.mount()
            self._identity = identity(self._model)

    def _check_free(self) -> None:
        if self._own:
            raise AdapterError(
                "the model has an adapter that the bank did not attach", "Remove it with unmount(model), or fuse it."
            )

    def _source(self, name: str) -> Source:
        if (source := self._sources.get(name)) is not None:
            return source
        if name in self:
            return Source(path=self.folder / name)
        self._residents.pop(name, None)  # its folder was deleted
        raise self._unknown(name)

    def _unknown(self, name: str) -> AdapterError:
        return AdapterError(f"no adapter named {name!r}", f"Known: {', '.join(self.names) or 'none'}.")

    def in_folder(self) -> list[str]:
        """The names of adapters in the folder: direct subfolders only, without links."""
        return [] if self._in_folder is None else self._in_folder.names

    def _list(self, name: str, source: Source) -> Listed:
        found = self._residents.get(name)
        path = str(source.path) if source.path else None
        if found is None:
            return Listed(name, path, False, source.pinned)
        config = found.adapter.config
        return Listed(
            *(name, path, True, source.pinned, config.method, config.rank),
            *(found.adapter.nbytes, tuple(found.alone), found.rows),
        )
