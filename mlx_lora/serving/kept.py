"""Keys and values that are kept for requests that begin alike, in mlx-lm's ``LRUPromptCache``.

They are those of one adapter, in one version: another adapter's, or those of the weights before a reload, are never
found. Once the bank has dropped an adapter, what was kept for it is dropped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bank import AdapterBank
from .requests import Row


class KeptPrompts:
    """The kept prompts of one engine.

    Args:
        size: prompts and answers to keep at most.
        nbytes: bytes that they may take.
    """

    def __init__(self, bank: AdapterBank, size: int, nbytes: int):
        from mlx_lm.models.cache import LRUPromptCache

        self._bank, self._drops = bank, bank.drops
        self._kept = LRUPromptCache(size, nbytes)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def fetch(self, row: Row) -> tuple[list | None, list[int]]:
        """(a cache for ``row`` or None, the tokens with which the row begins and that the cache holds)."""
        before = row.tokens[:-1]  # the model must read one token at least
        if not before:
            return None, []
        cache, rest = self._kept.fetch_nearest_cache(_key(row), before)
        return cache, before[: len(before) - len(rest)] if cache is not None else []

    def keep(self, row: Row, tokens: Sequence[int], cache: list, is_prompt: bool = False) -> None:
        """Keep the keys and values of ``tokens``, of the prompt alone or with the answer."""
        if row.resident is None or self._bank.has(row.resident.key):
            self._kept.insert_cache(_key(row), list(tokens), cache, cache_type="user" if is_prompt else "assistant")

    def trim_to(self, **limits: int) -> None:
        """Drop the oldest, down to ``n_sequences`` or ``n_bytes``."""
        self._kept.trim_to(**limits)

    def drop_stale(self) -> None:
        """Drop what was kept for adapters that the bank no longer has."""
        if self._bank.drops == self._drops:
            return
        self._drops = self._bank.drops
        kept = self._kept
        for entries in kept._lru._lrus.values():  # mlx-lm has no way to drop those of one model
            for model, tokens in [e for e in entries if e[0][0] is not None and not self._bank.has(e[0][0])]:
                entry = kept._trie.pop(model, tokens)
                kept._n_bytes -= entry.nbytes
                kept._n_bytes_by_type[entry.cache_type] -= entry.nbytes
                entries.remove((model, tokens))


def _key(row: Row) -> tuple[Any, ...]:
    """What must be equal for keys and values to be."""
    config = row.request.config
    quantized = config.kv_bits and (config.kv_bits, config.kv_group_size, config.quantized_kv_start)
    return row.key, quantized, config.max_kv_size, config.draft_model
