"""Reads the common start of many prompts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, takewhile

import mlx.core as mx

from ring_mlx.generation.decoding import prefill, step_sizes
from ring_mlx.model.cache import HybridCache
from ring_mlx.model.model import Model


class SharedReader:
    """Reads prompts in the order that shares most, with at most one cache for each place where they differ.

    ``tell`` is called with the tokens of each step; ``read_tokens`` counts what `read` has fed, and the rests it gave out.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        step: int,
        tell: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._model, self._prompts, self._step, self._tell = model, prompts, step, tell
        self.read_tokens = 0

    def total_tokens(self) -> int:
        """What `read` will have fed in the end, but for a token or two where prompts are alike."""
        ordered = sorted(map(list, self._prompts))
        return sum(map(len, ordered)) - sum(shared(a, b) for a, b in pairwise(ordered))

    def read(self) -> Iterator[tuple[int, HybridCache, Sequence[int]]]:
        """Yields the index of a prompt, a cache of its own, and its last tokens, at least one, still to be fed."""
        if self._prompts:
            yield from self._walk(list(range(len(self._prompts))), self._model.make_cache(), 0)

    def _walk(
        self, members: list[int], cache: HybridCache, at: int
    ) -> Iterator[tuple[int, HybridCache, Sequence[int]]]:
        """Prompts that agree up to ``at``, which the cache has read."""
        if len(members) == 1:
            rest = self._prompts[members[0]][at:]
            self.read_tokens += len(rest)
            yield members[0], cache, rest
            return
        # Where these prompts first differ, but before the last token of each.
        end = at + shared(*(self._prompts[i][at:-1] for i in members))
        self._feed(self._prompts[members[0]][at:end], cache)
        groups: dict[int, list[int]] = {}
        for i in members:
            if len(self._prompts[i]) == end + 1:
                self.read_tokens += 1
                yield i, cache.copy(), self._prompts[i][end:]
            else:
                groups.setdefault(self._prompts[i][end], []).append(i)
        # The largest goes last and takes the cache itself, so that few copies live at a time.
        *small, largest = sorted(groups.values(), key=len) or [[]]
        for group in small:
            yield from self._walk(group, cache.copy(), end)
        if largest:
            yield from self._walk(largest, cache, end)

    def _feed(self, ids: Sequence[int], cache: HybridCache) -> None:
        sizes = step_sizes(len(ids), self._step)
        steps = prefill(mx.array(list(ids), dtype=mx.int32), self._model, cache, sizes)
        for size, _ in zip(sizes, steps, strict=True):
            self._tell(size)
        self.read_tokens += len(ids)


def shared(*rows: Sequence[int]) -> int:
    """How many of their first tokens are the same."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
