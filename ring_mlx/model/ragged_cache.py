"""Keys and values of several rows, each of which may lose as many of its last tokens as it has to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, dynamic_roll


class RaggedKVCache(BatchKVCache):
    """mlx-lm's cache of a batch, whose rows need not end in the same column.

    Row b has its tokens in the columns ``left_padding[b]`` to ``left_padding[b] + offset[b]``, which is ``short[b]`` columns
    before the end of the longest. To take tokens back moves nothing; `flush` puts the rows flush right again.
    """

    keys: mx.array
    values: mx.array
    offset: mx.array
    left_padding: mx.array
    _idx: int

    def __init__(self, left_padding: Sequence[int]) -> None:
        super().__init__(list(left_padding))
        self.short = [0] * len(left_padding)

    @property
    def is_ragged(self) -> bool:
        """Whether some rows end before others; then all must be flushed before rows join or leave."""
        return any(self.short)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, heads, T, D]; returns all, of which each row may see its own."""
        before, T = self._idx, keys.shape[2]
        super().update_and_fetch(keys, values)
        for b, short in enumerate(self.short):
            if short:
                own = slice(before - short, before - short + T)
                self.keys[b : b + 1, :, own] = keys[b : b + 1]
                self.values[b : b + 1, :, own] = values[b : b + 1]
        found: tuple[mx.array, mx.array] = self.keys_and_values()
        return found

    def make_mask(self, N: int, **options: Any) -> mx.array:
        """True where each of the next N tokens may look, [B, 1, N, columns]."""
        if not self.is_ragged:
            mask: mx.array = super().make_mask(N, **options)
            return mask
        first = self.left_padding[:, None, None, None]
        own = first + self.offset[:, None, None, None] + mx.arange(N)[:, None]
        columns = mx.arange(self._idx + N)
        return (columns >= first) & (columns <= own)

    def take_back(self, counts: Sequence[int]) -> None:
        """Lose so many of the last tokens of each row."""
        self.offset = self.offset - mx.array(list(counts))
        short = [a + b for a, b in zip(self.short, counts, strict=True)]
        self._idx -= min(short)
        self.short = [n - min(short) for n in short]

    def flush(self) -> None:
        """Put the rows flush right, with no more padding than the longest of them needs."""
        if not self.is_ragged:
            return
        padding = self.left_padding + mx.array(self.short)
        spare = int(np.asarray(padding).min())
        shifts = mx.array(self.short)[:, None] - spare
        self.keys, self.values = (dynamic_roll(a, shifts, axis=2) for a in (self.keys, self.values))
        self.left_padding = padding - spare
        self._idx -= spare
        self.short = [0] * len(self.short)

    def filter(self, batch_indices: mx.array) -> None:
        """Keep the given rows."""
        super().filter(batch_indices)
        self.short = [0] * self.offset.size

    def extend(self, other: RaggedKVCache) -> None:
        """Take in the rows of another."""
        super().extend(other)
        self.short = [0] * self.offset.size


def flush(cache: Iterable[Any]) -> None:
    """Put the rows of all layers flush right."""
    for c in cache:
        if isinstance(c, RaggedKVCache):
            c.flush()
