"""Reads several tokens, and keeps as many of the first as turn out right.

Keys and values are cut off. The state S of a linear layer does not know its past. In a compiled step of one sequence the state
after each token was written, and that after the n tokens that stay is taken. Elsewhere they are folded again into the state
from before; their projections q, k and v are still there, so nothing is read twice::

    S <- exp(-s n) S + sum_i exp(-s (n - i)) k_i v_i^T,  i = 1 .. n
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from ring_mlx.model.attention import Folded


class Tentative:
    """Tokens that a cache has read and may lose again, of each row another number.

    Args:
        model: As `Model.__call__`.
        cache: Of one sequence or of rows whose keys and values are a `RaggedKVCache`; not quantized.
        tokens: Rows of equal length T.

    Attributes:
        logits: After each token [B, T, vocab].
    """

    def __init__(self, model: Callable[..., mx.array], cache: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        """Read the tokens. If the model raises, the cache is as it was before."""
        self._rows, self._count = len(tokens), len(tokens[0])
        self._folded: list[Folded] = []
        self._lengths = [(c, c.size()) for c in cache if not isinstance(c, ArraysCache)]
        linear = [c for c in cache if isinstance(c, ArraysCache)]
        for c in linear:
            c.tentative = self._folded
        try:
            self.logits = model(mx.array([list(row) for row in tokens], dtype=mx.int32), cache)
        except BaseException:
            self.keep([0] * self._rows)
            raise
        finally:
            for c in linear:
                del c.tentative

    def keep(self, counts: Sequence[int]) -> None:
        """Take back all but the first so many tokens of each row, also of a part of the layers."""
        if min(counts) == self._count:
            return
        for folded in self._folded:
            folded.keep(tuple(counts))
        for c, before in self._lengths:
            read = c.size() - before
            if self._rows == 1:
                c.trim(read - counts[0])
            elif read:
                c.take_back([read - n for n in counts])


class Place:
    """Where the cache of one sequence is, to go back to after tokens that were read one by one."""

    def __init__(self, cache: Sequence[Any]) -> None:
        self._states = [(c, c[0]) for c in cache if isinstance(c, ArraysCache)]
        self._lengths = [(c, c.offset) for c in cache if not isinstance(c, ArraysCache)]

    def go_back(self) -> None:
        """Take back what was read since."""
        for c, state in self._states:
            c[0] = state
        for c, before in self._lengths:
            c.trim(c.offset - before)
