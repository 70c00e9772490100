"""Named adapters beside one base: loaded when asked for, reloaded when their folder changes, dropped when unused.

LoRA adapters of linear layers, whatever their ranks and layers, share a batch, each row with its own (``choose``).
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
        memory_limit: bytes of adapters to keep in memory; those that are pinned or in use stay anyway.
        folder: a folder whose subfolders are adapters, each under its own name.
    """

    def __init__(self, model: nn.Module, memory_limit: int | None = None, folder: str | Path | None = None):
        self._model, self.memory_limit = model, memory_limit
        base = base_of(model)
        self._base = base.folder if base else None
        self.folder = None if folder is None else Path(folder)
        self._in_folder = None if folder is None else AdapterFolder(self.folder)
        self._sources: dict[str, Source] = {}
        self._residents: dict[str, Resident] = {}
        self._in_use: dict[Key, Resident] = {}  # also older versions
        self._multi: MultiLoRA | None = None
        self._slots: list[Key] = []  # the adapters in _multi
        self._mounted: Key | None = None  # the one that is mounted alone
        self._clock = 0
        self.lock = threading.RLock()  # held while the model is changed, and by the engine while it computes
        self._reading = threading.Lock()  # held while an adapter is read, so that requests at once read it once
        self._own = adapters_on(model) or state_of(model) is not None
        self._identity = identity(model)

    # Which adapters there are.

    @property
    def names(self) -> list[str]:
        """All names, loaded or not. Needs no lock, so that no one waits for a step of the engine."""
        return sorted({*list(self._sources), *self.in_folder()})

    @property
    def registered(self) -> list[str]:
        """The names that were given with ``add``."""
        return list(self._sources)

    def listed(self) -> list[Listed]:
        """All adapters, for a list of models. Needs no lock either."""
        known = {name: Source(path=self.folder / name) for name in self.in_folder()} | dict(self._sources)
        return [self._list(name, source) for name, source in sorted(known.items())]

    def __contains__(self, name: str) -> bool:
        return name in self._sources or (self._in_folder is not None and name in self._in_folder)

    def add(self, name: str, adapter: Adapter | str | Path, pinned: bool = False) -> None:
        """Register ``adapter``, or the one in that folder, as ``name``. A folder is read when it is first used.

        Raises: FormatError: the folder holds no adapter. AdapterError: the name cannot be used.
        """
        if not name or name != name.strip() or any(ord(char) < 32 for char in name):
            raise AdapterError(f"an adapter cannot be named {name!r}", "Use a name of letters, such as pirate.")
        if isinstance(adapter, Adapter):
            mx.eval(list(adapter.weights.values()))  # by this thread: another one cannot
        else:
            detect_format(adapter)
        with self.lock:
            path = None if isinstance(adapter, Adapter) else Path(adapter)
            pinned = pinned or (name in self._sources and self._sources[name].pinned)
            self._sources[name] = Source(None if path else adapter, path, pinned)
            self._residents.pop(name, None)

    def pin(self, name: str) -> None:
        """Never drop ``name`` from memory once it is there. Raises: AdapterError: unknown."""
        with self.lock:
            self._sources[name] = replace(self._source(name), pinned=True)

    def check(self, adapter: str | Path) -> tuple[Adapter, list[str]]:
        """An adapter by its name, or at a path, read but not kept; and why it cannot share a batch with others.

        Raises: AdapterError: unknown, or not for this model; FormatError.
        """
        source = Source(path=adapter) if isinstance(adapter, Path) else self._source(adapter)
        found = source.adapter or load_adapter(source.path, base=self._base)
        with self.lock, self._bare():
            return found, why_alone(self._model, found)

    def unload(self, name: str) -> None:
        """Drop ``name`` from memory, and forget it unless it is in the folder. Rows that use it finish with it.

        Raises: AdapterError: unknown.
        """
        with self.lock:
            if name not in self:
                raise self._unknown(name)
            self._sources.pop(name, None)
            self._residents.pop(name, None)

    # Adapters in use.

    def load(self, name: str) -> Resident:
        """Adapter ``name``, read from its folder unless it is in memory and the folder is unchanged.

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
        """``load``, for a row that keeps this version until ``release``."""
        found = self.load(name)
        with self.lock:
            found.rows += 1
            self._in_use[found.key] = found
        return found

    def _in_memory(self, name: str) -> Resident | None:
        """Adapter ``name`` as its source is now, if it is in memory. Raises: AdapterError: unknown."""
        source, found = self._source(name), self._residents.get(name)
        same = found is not None and (source.path is None or signature_of(source.path) == found.signature)
        return found if same else None

    def _read(self, name: str) -> Resident:
        """Read adapter ``name``; the engine goes on meanwhile. What was in memory of that name is replaced."""
        while True:
            known, source = self._sources.get(name), self._source(name)
            signature = signature_of(source.path)  # before reading: a later change is found by the next request
            with errors_by_name({source.path: name, self._base: self._base and Path(self._base).name}):
                adapter = source.adapter or load_adapter(source.path, base=self._base)
                mx.eval(list(adapter.weights.values()))
                with self.lock:
                    if self._sources.get(name) is not known:  # the name was given to another adapter meanwhile
                        continue
                    with self._bare():
                        alone = why_alone(self._model, adapter)
                    self._clock += 1
                    self._residents[name] = Resident(name, self._clock, adapter, alone, signature)
                    return self._residents[name]

    def release(self, resident: Resident) -> None:
        """A row that used ``resident`` has ended."""
        with self.lock:
            resident.rows -= 1
            if resident.rows == 0:
                self._in_use.pop(resident.key, None)
                self._evict()

    def has(self, key: Key) -> bool:
        """Whether the adapter of that name in memory is this version."""
        found = self._residents.get(key[0])
        return found is not None and found.key == key

    # What is on the model. Called by the thread that generates.

    def choose(self, keys: Sequence[Key | None]) -> None:
        """Make the rows of the next batches use these adapters, None for the base. A single key is for all rows."""
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
                else:  # the base alone takes no update, and no gathering of zeros either
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
        """Leave the model as the base it was."""
        self.choose([None])
        self._multi, self._slots = None, []

    def changed(self) -> bool:
        """Whether something else than the bank has changed the model since the last call."""
        with self.lock:
            now, before = identity(self._model), self._identity
            self._identity = now
            return now != before

    def _make_slots(self, wanted: set[Key]) -> None:
        """Put the adapters that rows use, and those in memory beside them, together on the model."""
        if self._multi is not None:
            self._multi.unmount()
        together = {r.key: r for r in (*self._in_use.values(), *self._residents.values()) if not r.alone}
        self._multi, self._slots = None, []
        adapters = {str(key): resident.adapter for key, resident in together.items()}
        self._multi, self._slots = MultiLoRA(self._model, adapters), list(together)

    def _evict(self, keep: Resident | None = None) -> None:
        """Drop the adapters that were not used for longest, down to the limit."""
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
        """A context in which the shared adapters are not on the model; its other adapters may be."""
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
                "the model has an adapter that the bank did not put there", "Remove it with unmount(model), or fuse it."
            )

    def _source(self, name: str) -> Source:
        if (source := self._sources.get(name)) is not None:
            return source
        if name in self:
            return Source(path=self.folder / name)
        self._residents.pop(name, None)  # its folder is gone
        raise self._unknown(name)

    def _unknown(self, name: str) -> AdapterError:
        return AdapterError(f"no adapter named {name!r}", f"Known: {', '.join(self.names) or 'none'}.")

    def in_folder(self) -> list[str]:
        """The adapters in the folder, by name. Its own subfolders only, and no links out of it."""
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
