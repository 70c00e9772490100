"""Keys and values that are kept for requests that begin alike, in mlx-lm's ``LRUPromptCache``: one for each adapter.

Another adapter's, or those of the weights before a reload, are never found. Once the bank has dropped an adapter, what
was kept for it is dropped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bank import AdapterBank
from .requests import Row
from .residents import Key


class KeptPrompts:
    """The kept prompts of one engine.

    Args:
        size: prompts and answers to keep at most.
        nbytes: bytes that they may take.
    """

    def __init__(self, bank: AdapterBank, size: int, nbytes: int):
        self._bank, self._size, self.max_bytes = bank, size, nbytes
        self._kept: dict[Key | None, Any] = {}  # by version of an adapter, the one that was used longest ago first

    def __len__(self) -> int:
        return sum(map(len, list(self._kept.values())))

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in list(self._kept.values()))  # a copy: other threads ask too

    def fetch(self, row: Row) -> tuple[list | None, list[int]]:
        """(a cache for ``row`` or None, the tokens with which the row begins and that the cache holds)."""
        before = row.tokens[:-1]  # the model must read one token at least
        if not before or row.key not in self._kept:
            return None, []
        cache, rest = self._of(row.key).fetch_nearest_cache(_options(row), before)
        return cache, before[: len(before) - len(rest)] if cache is not None else []

    def keep(self, row: Row, tokens: Sequence[int], cache: list, is_prompt: bool = False) -> None:
        """Keep the keys and values of ``tokens``, of the prompt alone or with the answer."""
        if row.resident is None or self._bank.has(row.resident.key):
            kind = "user" if is_prompt else "assistant"
            self._of(row.key).insert_cache(_options(row), list(tokens), cache, cache_type=kind)
            self.trim_to(self._size, self.max_bytes)

    def trim_to(self, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Drop the oldest of the adapter that was used longest ago, until no more than these are left."""
        for key, kept in list(self._kept.items()):
            while len(kept) and (
                (n_sequences is not None and len(self) > n_sequences) or (n_bytes is not None and self.nbytes > n_bytes)
            ):
                kept.trim_to(n_sequences=len(kept) - 1)
            if not len(kept):
                del self._kept[key]

    def drop_stale(self) -> None:
        """Drop what was kept for adapters that the bank no longer has."""
        for key in [key for key in self._kept if key is not None and not self._bank.has(key)]:
            del self._kept[key]

    def _of(self, key: Key | None) -> Any:
        """What is kept for an adapter, which is now the one that was used last."""
        from mlx_lm.models.cache import LRUPromptCache

        self._kept[key] = self._kept.pop(key, None) or LRUPromptCache(self._size, self.max_bytes)
        return self._kept[key]


def _options(row: Row) -> tuple[Any, ...]:
    """What must be equal, besides the adapter, for keys and values to be."""
    config = row.request.config
    quantized = config.kv_bits and (config.kv_bits, config.kv_group_size, config.quantized_kv_start)
    return quantized, config.max_kv_size, config.draft_model
