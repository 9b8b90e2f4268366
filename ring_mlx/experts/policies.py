"""Which expert makes room for another: the one with the fewest recent uses."""

from __future__ import annotations

import heapq
from collections.abc import Container, Hashable

POLICIES = ("lfu", "none")
HALF_LIFE_PASSES = 64
# Weights of later passes grow; long before a double overflows, all are scaled down.
LARGEST_EXPONENT = 512.0


class LFU:
    """Evicts the key with the lowest score, in which a use counts half as much ``half_life_passes`` passes later.

    ::

        score = sum over uses u of 2^(-(now - u) / half_life)

    Scores are kept times 2^(now / half_life), so that only the used one changes. An evicted key keeps its score.
    """

    def __init__(self, half_life_passes: float = HALF_LIFE_PASSES) -> None:
        self._half_life, self._exponent, self._count = half_life_passes, 0.0, 0
        self._scores: dict[Hashable, float] = {}
        self._held: set[Hashable] = set()
        self._heap: list[tuple[float, int, Hashable]] = []

    def touch(self, key: Hashable) -> None:
        """Count a use of a key, which is held from now on."""
        self._scores[key] = self._scores.get(key, 0.0) + 2.0**self._exponent
        self._held.add(key)
        self._push(key)
        if len(self._heap) > 8 * len(self._held) + 64:
            self._rebuild()

    def forget(self, key: Hashable) -> None:
        """Note that a key is not held any more."""
        self._held.discard(key)

    def victim(self, pinned: Container[Hashable]) -> Hashable:
        """The key to evict: held and not pinned."""
        skipped = []
        try:
            while True:
                entry = heapq.heappop(self._heap)
                score, _, key = entry
                if key not in self._held or score != self._scores[key]:
                    continue
                skipped.append(entry)
                if key not in pinned:
                    return key
        finally:
            for entry in skipped:
                heapq.heappush(self._heap, entry)

    def advance(self) -> None:
        """Begin a pass over all layers."""
        self._exponent += 1 / self._half_life
        if self._exponent > LARGEST_EXPONENT:
            factor = 2.0**-self._exponent
            self._scores = {key: score * factor for key, score in self._scores.items()}
            self._exponent = 0.0
            self._rebuild()

    def _push(self, key: Hashable) -> None:
        # Between equals, the older entry goes first.
        self._count += 1
        heapq.heappush(self._heap, (self._scores[key], self._count, key))

    def _rebuild(self) -> None:
        newest = {key: count for _, count, key in sorted(self._heap, key=lambda e: e[1]) if key in self._held}
        self._heap = []
        for key in sorted(newest, key=newest.__getitem__):
            self._push(key)
