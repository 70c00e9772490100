"""The prompt cache: one mlx-lm ``LRUPromptCache`` per adapter version, for requests that begin with the same tokens.

A request never reuses entries of another adapter, or of the weights before a reload. When the bank evicts an adapter,
its entries are dropped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bank import AdapterBank
from .requests import Row
from .residents import Key


class KeptPrompts:
    """The prompt cache of one engine.

    Args:
        size: maximum number of entries.
        nbytes: maximum bytes of all entries.
    """

    def __init__(self, bank: AdapterBank, size: int, nbytes: int):
        self._bank, self._size, self.max_bytes = bank, size, nbytes
        self._kept: dict[Key | None, Any] = {}  # by version of an adapter, the one that was used longest ago first

    def __len__(self) -> int:
        return sum(map(len, list(self._kept.values())))

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in list(self._kept.values()))  # a copy, because other threads read this too

    def fetch(self, row: Row) -> tuple[list | None, list[int]]:
        """Return (a cache for ``row`` or None, the row's first tokens, which the cache holds)."""
        before = row.tokens[:-1]  # the model must read at least one token
        if not before or row.key not in self._kept:
            return None, []
        cache, rest = self._of(row.key).fetch_nearest_cache(_options(row), before)
        return cache, before[: len(before) - len(rest)] if cache is not None else []

    def keep(self, row: Row, tokens: Sequence[int], cache: list, is_prompt: bool = False) -> None:
        """Store the KV cache of ``tokens``: the prompt, or the prompt and the answer."""
        if row.resident is None or self._bank.has(row.resident.key):
            kind = "user" if is_prompt else "assistant"
            self._of(row.key).insert_cache(_options(row), list(tokens), cache, cache_type=kind)
            self.trim_to(self._size, self.max_bytes)

    def trim_to(self, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Drop the oldest entries of the least recently used adapter until these limits hold."""
        for key, kept in list(self._kept.items()):
            while len(kept) and (
                (n_sequences is not None and len(self) > n_sequences) or (n_bytes is not None and self.nbytes > n_bytes)
            ):
                kept.trim_to(n_sequences=len(kept) - 1)
            if not len(kept):
                del self._kept[key]

    def drop_stale(self) -> None:
        """Drop entries of adapters that the bank no longer has in memory."""
        for key in [key for key in self._kept if key is not None and not self._bank.has(key)]:
            del self._kept[key]

    def _of(self, key: Key | None) -> Any:
        """Return an adapter's cache, and mark it as the most recently used."""
        from mlx_lm.models.cache import LRUPromptCache

        self._kept[key] = self._kept.pop(key, None) or LRUPromptCache(self._size, self.max_bytes)
        return self._kept[key]


def _options(row: Row) -> tuple[Any, ...]:
    """The options, besides the adapter, that must be equal for two rows to share keys and values."""
    config = row.request.config
    quantized = config.kv_bits and (config.kv_bits, config.kv_group_size, config.quantized_kv_start)
    return quantized, config.max_kv_size, config.draft_model
